"""Blending: documents that were compressed apart, told of each other by computing a share of their tokens again."""

from __future__ import annotations

import pytest
import torch
import transformers

from ctxdocs import FingerprintMismatch, InputError, Library, Memory, prompts
from ctxdocs.compressors.blending import blended
from ctxdocs.errors import ContextTooLong
from ctxdocs.modeling import attention_layers
from ctxdocs.modeling.kv import recorded_keys_values
from ctxdocs.modeling.rotary import rotate_keys
from ctxdocs.prompts import encode_text

from .conftest import FakeEmbedder, tiny_gist, tiny_kv, tiny_model
from .test_conversation import CHATML
from .test_kv import BosTokenizer
from .test_reading_kv import MODELS, TINY

PREFIX = [3, 9, 4]
DOCUMENTS = [list(range(20, 45)), list(range(60, 71)), list(range(30, 52))]
JOINED = [token for document in DOCUMENTS for token in document]
PROMPT = [5, 6, 7, 8]
NO_END = {"eos_token_ids": ()}


def family(name, method="kv", dtype=torch.float32, **settings):
    """A compressor around a random model of four layers."""
    class_name, changes = MODELS[name]
    torch.manual_seed(3)
    config = getattr(transformers, class_name)(**{**TINY, **changes, "num_hidden_layers": 4})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    return tiny_kv(method, model=model, **{"prefix": PREFIX, **settings})


@pytest.fixture(scope="module", params=MODELS)
def exact(request):
    return family(request.param)


def close(a, b, **tolerances):
    torch.testing.assert_close(a, b, **{"rtol": 1e-4, "atol": 1e-5, **tolerances})


def plain(compressor, ids):
    return compressor.model(torch.tensor([ids])).logits[0]


def same(memories, others):
    return all(
        tensor.equal(other.tensors()[name])
        for memory, other in zip(memories, others, strict=True)
        for name, tensor in memory.tensors().items()
    )


def test_all_of_the_tokens_are_one_prefill(exact):
    memories = exact.compress_ids(DOCUMENTS)
    together = exact.blend(memories, DOCUMENTS, share=1)
    text = PREFIX + JOINED
    read = [exact.prefix_memory(), *together]
    close(exact.logits(PROMPT, read), plain(exact, text + PROMPT)[len(text) :])
    expected = exact.model.generate(
        torch.tensor([text + PROMPT]), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert exact.generate_ids(PROMPT, read, max_new_tokens=8, **NO_END) == expected[0, len(text) + 4 :].tolist()
    # What is cached is what the prefill caches, so that nothing but rounding can differ behind it either.
    with recorded_keys_values(exact.model) as recorded:
        plain(exact, text)
    for kind in ("keys", "values"):
        cached = torch.cat([getattr(memory, kind) for memory in together], dim=2)
        close(cached, getattr(recorded, kind)[:, 0, :, len(PREFIX) :])


def test_none_of_the_tokens_is_plain_composition(exact):
    memories = exact.compress_ids(DOCUMENTS)
    assert same(exact.blend(memories, DOCUMENTS, share=0), memories)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_share_is_what_the_whole_model_computes_with_the_others_held_fixed(exact, share):
    """The slow way to the same: all tokens run, and keys and values of those not chosen are put back in every layer."""
    memories = exact.compress_ids(DOCUMENTS)
    together = exact.blend(memories, DOCUMENTS, share)
    text = torch.tensor([PREFIX + JOINED])
    first = len(PREFIX) + len(DOCUMENTS[0])
    composed = {kind: torch.cat([getattr(memory, kind) for memory in memories], dim=2) for kind in ("keys", "values")}
    with recorded_keys_values(exact.model) as whole:
        exact.model(text)
    behind = whole.values[1, 0, :, first:] - composed["values"][1, :, len(DOCUMENTS[0]) :]
    count = round(share * behind.shape[1])
    chosen = behind.square().sum((0, 2)).topk(count).indices + first
    fixed = torch.ones(text.shape[1], dtype=torch.bool)
    fixed[: len(PREFIX)] = fixed[chosen] = False

    with recorded_keys_values(exact.model) as wanted:
        exact.backbone.run(
            exact.backbone.embed(text), torch.arange(len(fixed))[None], cache=held(exact, composed, fixed)
        )
    # In the first two layers everything is computed; in the others, what was chosen.
    for kind in ("keys", "values"):
        found = torch.cat([getattr(memory, kind) for memory in together], dim=2)
        here, behind_prefix = chosen - len(PREFIX), slice(len(PREFIX), None)
        close(found[:2], getattr(whole, kind)[:2, 0, :, behind_prefix], atol=3e-5)
        close(found[2:, :, here], getattr(wanted, kind)[2:, 0, :, chosen], atol=3e-5)
        left = fixed[len(PREFIX) :]
        assert found[2:, :, left].equal(composed[kind][2:, :, left])


class HeldLayer(transformers.DynamicLayer):
    """A layer's cache that gives fixed tokens the keys and values it was given for them."""

    def __init__(self, keys, values, fixed):
        super().__init__()
        self.held, self.fixed = (keys, values), fixed

    def update(self, key_states, value_states, *args, **kwargs):
        fixed = self.fixed[:, None]
        return tuple(torch.where(fixed, a, b) for a, b in zip(self.held, (key_states, value_states), strict=True))


def held(compressor, composed, fixed):
    """A cache that holds fixed tokens, behind a prefix, to what was composed of them, from the third layer on."""
    keys = rotate_keys(compressor.model, composed["keys"], torch.arange(len(PREFIX), len(fixed)))
    keys, values = (torch.nn.functional.pad(each, (0, 0, len(PREFIX), 0)) for each in (keys, composed["values"]))
    nothing = torch.zeros_like(fixed)
    return transformers.Cache(
        layers=[HeldLayer(*each, fixed if i > 1 else nothing) for i, each in enumerate(zip(keys, values, strict=True))]
    )


def test_a_larger_share_is_nearer_to_the_prefill(exact):
    memories = exact.compress_ids(DOCUMENTS)
    text = PREFIX + JOINED
    wanted = plain(exact, text + PROMPT)[len(text) :]
    errors = []
    for share in (0, 0.3, 0.8, 1):
        together = exact.blend(memories, DOCUMENTS, share)
        errors.append(float((exact.logits(PROMPT, [exact.prefix_memory(), *together]) - wanted).square().mean()))
    assert errors[0] > errors[2] > errors[3]
    assert errors[1] < errors[0]


def test_text_around_memories_is_part_of_it(exact):
    """A header in front, a frame between: blended in full the prompt is a prefill of all of it."""
    head, between = [11, 12], [13]
    memories = exact.compress_ids(DOCUMENTS[:2])
    prompt = [torch.tensor(PREFIX), torch.tensor(head), memories[0], torch.tensor(between), memories[1]]
    prompt.append(torch.tensor(PROMPT))
    text = PREFIX + head + DOCUMENTS[0] + between + DOCUMENTS[1] + PROMPT
    made = blended(exact, prompt, DOCUMENTS[:2], 1)
    assert [type(part) for part in made] == [type(part) for part in prompt]
    assert all(new is old for new, old in zip(made, prompt, strict=True) if torch.is_tensor(old))
    close(exact.prefill([made])[0][0], plain(exact, text)[-1])
    apart = exact.prefill([prompt])[0][0]
    half = exact.prefill([blended(exact, prompt, DOCUMENTS[:2], 0.5)])[0][0]
    assert (half - plain(exact, text)[-1]).norm() < (apart - plain(exact, text)[-1]).norm()


def test_the_first_memory_behind_the_prefix_is_exact_already():
    compressor = family("llama")
    memories = compressor.compress_ids(DOCUMENTS)
    assert compressor.blend(memories[:1], DOCUMENTS[:1])[0] is memories[0]
    together = compressor.blend(memories, DOCUMENTS, 0.5)
    assert together[0] is memories[0]
    # Behind something else it is not.
    moved = blended(compressor, [torch.tensor([7]), *memories], DOCUMENTS, 0.5)
    assert not same([moved[1]], memories[:1])


def test_without_a_prefix():
    compressor = family("qwen3", prefix="none")
    memories = compressor.compress_ids(DOCUMENTS)
    together = compressor.blend(memories, DOCUMENTS, 1)
    text = JOINED
    close(compressor.logits(PROMPT, together), plain(compressor, text + PROMPT)[len(text) :])
    assert compressor.blend([], []) == []


@pytest.mark.parametrize("layers", [1, 2])
def test_few_layers_are_computed_whole(layers):
    compressor = tiny_kv(model=tiny_model(num_hidden_layers=layers), prefix=PREFIX)
    together = compressor.blend(compressor.compress_ids(DOCUMENTS), DOCUMENTS, 0.1)
    text = PREFIX + JOINED
    wanted = plain(compressor, text + PROMPT)[len(text) :]
    close(compressor.logits(PROMPT, [compressor.prefix_memory(), *together]), wanted)


def test_pruning_methods_blend_what_they_kept_whole():
    compressor = family("llama", "kvzip", piece_tokens=20)
    whole = compressor.compress_ids(DOCUMENTS, ratio=1)
    together = compressor.blend(whole, DOCUMENTS, 1)
    text = PREFIX + JOINED
    wanted = plain(compressor, text + PROMPT)[len(text) :]
    close(compressor.logits(PROMPT, [compressor.prefix_memory(), *together]), wanted)
    for options in ({"ratio": 2}, {"ratio": 2, "budget": "global"}, {"ratio": 2, "positions": "compact"}):
        with pytest.raises(InputError, match=r"memory 1 does not keep every key and value.*ratio 1"):
            compressor.blend([whole[0], *compressor.compress_ids(DOCUMENTS[1:2], **options)], DOCUMENTS[:2])


@pytest.mark.parametrize("name", ["llama", "qwen3-yarn", "gpt-neox"])
def test_in_bfloat16_the_blended_prompt_is_as_near_to_float32_as_the_prefill(name):
    half, exact = family(name, dtype=torch.bfloat16), family(name)
    exact.load_state_dict({key: value.float() for key, value in half.state_dict().items()})
    text = PREFIX + JOINED
    true = plain(exact, text + PROMPT)[len(text) :]
    own = plain(half, text + PROMPT)[len(text) :].float()
    together = half.blend(half.compress_ids(DOCUMENTS), DOCUMENTS, 1)
    assert together[1].keys.dtype == torch.bfloat16
    read = half.logits(PROMPT, [half.prefix_memory(), *together]).float()
    assert (read - true).square().mean() <= 2 * (own - true).square().mean()


def test_only_what_was_chosen_runs_through_the_later_layers():
    compressor = family("mistral")
    memories = compressor.compress_ids(DOCUMENTS)
    compressor.prefix_memory()
    lengths = []
    hooks = [
        layer.register_forward_hook(lambda module, inputs, output: lengths.append(output.shape[1]))
        for layer in compressor.backbone.layers
    ]
    before = compressor.model.config._attn_implementation
    compressor.blend(memories, DOCUMENTS, 0.15)
    for hook in hooks:
        hook.remove()
    behind = sum(map(len, DOCUMENTS[1:]))
    assert lengths == [behind, behind, round(0.15 * behind), round(0.15 * behind)]
    assert compressor.model.config._attn_implementation == before
    assert not any(layer._forward_pre_hooks for layer in compressor.backbone.layers)


# A library.


@pytest.fixture
def make_kv_library(tokenizer, tmp_path, corpus):
    def make(name="kv", template=None, prefix="bos", **settings):
        model = tiny_model(num_hidden_layers=4)
        compressor = tiny_kv(tokenizer=BosTokenizer(tokenizer, template), model=model, prefix=prefix)
        settings = {"chunk_tokens": 32, "overlap_tokens": 4, **settings}
        library = Library.create(tmp_path / name, compressor, FakeEmbedder(), **settings)
        library.add(corpus)
        return library

    return make


@pytest.mark.parametrize(("template", "prefix"), [(None, "bos"), (CHATML, "chat"), (CHATML, "bos")])
def test_a_library_asks_with_its_chunks_blended(make_kv_library, template, prefix):
    library = make_kv_library(template=template, prefix=prefix)
    options = {"k": 3, "max_new_tokens": 8, "stop": (), **NO_END}
    plainly = library.ask("lighthouse", **options)
    assert library.ask("lighthouse", blend=0, **options).text == plainly.text
    answer = library.ask("lighthouse", blend=1, **options)
    assert (answer.prompt_tokens, answer.memory_slots) == (plainly.prompt_tokens, plainly.memory_slots)
    compressor = library.compressor
    sources = iter(encode_text(compressor.tokenizer, hit.text) for hit in answer.sources)
    parts = library._prepare(["lighthouse"], 3, "memory", 8, {})[0][0]
    text = torch.cat([next(sources) if isinstance(part, Memory) else part for part in parts])
    whole = compressor.generate_ids(text, max_new_tokens=8, **NO_END)
    assert answer.text == compressor.tokenizer.decode(whole, skip_special_tokens=True).strip()
    assert answer.text != plainly.text
    stream = library.stream("lighthouse", blend=1, **options)
    assert "".join(stream).strip() == answer.text
    both = library.ask_many(["lighthouse", "ferry"], blend=1, **options)
    assert both[0].text == answer.text
    assert both[1].text == library.ask("ferry", blend=1, **options).text


@pytest.mark.parametrize("codec", ["int8", "bfloat16"])
def test_rounded_memories_are_blended_too(codec, make_kv_library):
    library = make_kv_library(codec, codec=codec)
    assert library.ask("lighthouse", k=3, blend=0.5, max_new_tokens=2).memory_slots


def test_characters_of_more_tokens_than_a_chunk_are_blended_as_they_were_cut(make_kv_library, tmp_path):
    library = make_kv_library(chunk_tokens=2, overlap_tokens=0)
    (tmp_path / "mathematics.txt").write_text("\U0001d6fc \U0001d6fd", encoding="utf-8")
    library.add(tmp_path / "mathematics.txt")
    hits = library.search("\U0001d6fc", k=50)
    assert any(len(encode_text(library.compressor.tokenizer, hit.text)) > hit.tokens for hit in hits)
    assert library.ask("\U0001d6fc", k=50, blend=0.5, max_new_tokens=2).memory_slots


def test_a_tokenizer_that_changed_is_noticed(make_kv_library, monkeypatch):
    library = make_kv_library()
    encode = prompts.encode_text
    monkeypatch.setattr(prompts, "encode_text", lambda tokenizer, text: encode(tokenizer, text)[1:])
    with pytest.raises(InputError, match="was the tokenizer changed since"):
        library.ask("lighthouse", k=3, blend=0.15)
    monkeypatch.setattr(prompts, "encode_text", lambda tokenizer, text: (encode(tokenizer, text) + 1) % 400)
    with pytest.raises(InputError, match="was the tokenizer changed since"):
        library.ask("lighthouse", k=3, blend=0.15)


def test_a_library_that_cannot_blend_says_why(make_kv_library, make_library, corpus):
    library = make_kv_library()
    with pytest.raises(InputError, match=r"mode='text' reads none \(leave blend out\)"):
        library.ask("lighthouse", mode="text", blend=0.15)
    with pytest.raises(InputError, match="blend is 2, and must lie between"):
        library.ask("lighthouse", blend=2)
    summaries = make_library()
    summaries.add(corpus)
    with pytest.raises(InputError, match="those of autocompressor are others"):
        summaries.ask("lighthouse", blend=0.15)


def test_the_command_line_blends(tokenizer, tmp_path, corpus, monkeypatch):
    from click.testing import CliRunner

    from ctxdocs.cli import main

    folder = tmp_path / "plain"
    tiny_kv(tokenizer=tokenizer, model=tiny_model(num_hidden_layers=4)).save(folder)
    library = Library.create(tmp_path / "l", folder, FakeEmbedder(), chunk_tokens=32, overlap_tokens=4)
    library.add(corpus)
    given = []
    ask = Library.ask
    monkeypatch.setattr(
        Library, "ask", lambda self, *args, **options: (given.append(options), ask(library, *args, **options))[1]
    )
    arguments = ["ask", "lighthouse", "--library", str(tmp_path / "l"), "--max-new-tokens", "2", "--json"]
    result = CliRunner().invoke(main, [*arguments, "--blend", "0.5"])
    assert result.exit_code == 0, result.output
    assert given[0]["blend"] == 0.5
    result = CliRunner().invoke(main, [*arguments, "--blend", "3"])
    assert result.exit_code == 1
    assert "must lie between" in result.output


# Wrong input.


def test_documents_that_are_not_those_of_the_memories_are_refused():
    compressor = family("llama")
    memories = compressor.compress_ids(DOCUMENTS)
    with pytest.raises(InputError, match="3 memories to blend, and token ids of 2 documents"):
        compressor.blend(memories, DOCUMENTS[:2])
    with pytest.raises(InputError, match="document 1 has 10 tokens, and its memory was made of 11"):
        compressor.blend(memories, [DOCUMENTS[0], DOCUMENTS[1][1:], DOCUMENTS[2]])
    other = [*DOCUMENTS[1][:-1], 99]
    with pytest.raises(InputError, match=r"token 99, at place 10 .* is not the one that the memory was made of"):
        compressor.blend(memories, [DOCUMENTS[0], other, DOCUMENTS[2]])


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan"), "much", None, True])
def test_shares_that_cannot_be(share):
    compressor = family("llama")
    with pytest.raises(InputError, match="blend"):
        compressor.blend(compressor.compress_ids(DOCUMENTS), DOCUMENTS, share)


def test_what_cannot_be_blended_is_refused(monkeypatch):
    gist = tiny_gist()
    memory = gist.compress_ids([DOCUMENTS[0]])[0]
    with pytest.raises(InputError, match=r"those of beacon are others \(use the method kv"):
        blended(gist, [memory], [DOCUMENTS[0]], 0.15)
    compressor = family("llama")
    with pytest.raises(FingerprintMismatch):
        compressor.blend(family("llama", prefix="none").compress_ids(DOCUMENTS), DOCUMENTS)
    small = tiny_kv(model=tiny_model(num_hidden_layers=4, max_position_embeddings=48), prefix=PREFIX)
    with pytest.raises(ContextTooLong, match="the documents to be blended take 61 positions, 13 more than"):
        small.blend(small.compress_ids(DOCUMENTS), DOCUMENTS)
    memories = compressor.compress_ids(DOCUMENTS)
    compressor.prefix_memory()
    monkeypatch.setattr(attention_layers, "_MASKABLE", ("eager",))  # as flash_attention_2, which is not here, would be
    with pytest.raises(InputError, match=r"a share is computed again need a mask, which sdpa does not take"):
        compressor.blend(memories, DOCUMENTS)
    assert len(compressor.blend(memories, DOCUMENTS, 1)) == 3
