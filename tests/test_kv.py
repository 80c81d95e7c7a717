"""Exact key/value memories of any model: reading one is reading the text, behind whatever the text stood behind."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import transformers

from ctxdocs import CheckpointError, FingerprintMismatch, InputError, Library, load_compressor
from ctxdocs.compressors.kv import KVCompressor
from ctxdocs.conversation import Conversation
from ctxdocs.errors import ContextTooLong
from ctxdocs.prompts import with_prefix

from .conftest import FakeEmbedder, tiny_autocompressor, tiny_gist, tiny_kv, tiny_model
from .test_conversation import CHATML, heard, whole
from .test_reading_kv import MODELS, TINY

PREFIX = [3, 9, 4]
DOCUMENT = list(range(20, 61))
OTHER = list(range(70, 93))
PROMPT = [5, 6, 7, 8]
NO_END = {"eos_token_ids": ()}


def family(name, method="kv", dtype=torch.float32, **settings):
    """A compressor around a random model of a family, which reads documents behind a prefix."""
    class_name, changes = MODELS[name]
    torch.manual_seed(3)
    config = getattr(transformers, class_name)(**{**TINY, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    return tiny_kv(method, model=model, **{"prefix": PREFIX, **settings})


@pytest.fixture(scope="module", params=MODELS)
def exact(request):
    return family(request.param)


def close(a, b, **tolerances):
    torch.testing.assert_close(a, b, **{"rtol": 1e-4, "atol": 1e-5, **tolerances})


def plain(compressor, ids):
    return compressor.model(torch.tensor([ids])).logits[0]


def test_one_memory_behind_its_prefix_is_the_text(exact):
    memory = exact.compress_ids([DOCUMENT])[0]
    assert memory.slots == memory.span == memory.source_tokens == len(DOCUMENT)
    read = [exact.prefix_memory(), memory]
    whole_text = PREFIX + DOCUMENT
    close(exact.logits(PROMPT, read), plain(exact, whole_text + PROMPT)[len(whole_text) :])
    expected = exact.model.generate(
        torch.tensor([whole_text + PROMPT]), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    new = exact.generate_ids(PROMPT, read, max_new_tokens=8, **NO_END)
    assert new == expected[0, len(whole_text) + 4 :].tolist()


def test_a_session_is_the_text_too(exact):
    memory = exact.compress_ids([OTHER])[0]
    session = exact.session([memory])
    logits = torch.cat([session.feed(DOCUMENT[:9]), session.feed(DOCUMENT[9:])])
    text = PREFIX + OTHER
    close(logits, plain(exact, text + DOCUMENT)[len(text) :])
    closed = session.memory()
    assert (closed.span, closed.source_tokens) == (len(OTHER + DOCUMENT), len(OTHER + DOCUMENT))
    close(closed.tensors(), exact.compress_ids([OTHER + DOCUMENT])[0].tensors(), atol=3e-5)


def test_documents_that_do_not_see_each_other_are_what_composition_reads(exact):
    """Without a prefix, memories side by side are one forward in which no document sees another one."""
    alone = tiny_kv(model=exact.model, prefix="none")
    first, second = alone.compress_ids([DOCUMENT, OTHER])
    ids = torch.tensor([DOCUMENT + OTHER + PROMPT])
    text, split = ids.shape[1], len(DOCUMENT)
    sees = torch.ones(text, text, dtype=torch.bool).tril()
    sees[split : split + len(OTHER), :split] = False
    mask = torch.zeros(1, 1, text, text).masked_fill(sees.logical_not(), torch.finfo(torch.float32).min)
    expected = exact.model(ids, attention_mask=mask, position_ids=torch.arange(text)[None]).logits[0]
    close(alone.logits(PROMPT, [first, second]), expected[-len(PROMPT) :])
    assert not torch.allclose(alone.logits(PROMPT, [second, first]), expected[-len(PROMPT) :], atol=1e-3)


def test_the_order_of_memories_changes_positions_alone(exact):
    first, second = exact.compress_ids([DOCUMENT, OTHER])
    there = exact.model_input([exact.prefix_ids, first, second, torch.tensor(PROMPT)])
    back = exact.model_input([exact.prefix_ids, second, first, torch.tensor(PROMPT)])
    assert there.positions.equal(back.positions)
    own = slice(len(PREFIX), len(PREFIX) + len(DOCUMENT))
    moved = slice(len(PREFIX) + len(OTHER), len(PREFIX) + len(OTHER) + len(DOCUMENT))
    assert there.values[:, :, own].equal(back.values[:, :, moved])
    assert not there.keys[:, :, own].equal(back.keys[:, :, moved])


def test_shifting_all_positions_changes_nothing(exact):
    memory = exact.compress_ids([DOCUMENT])[0]
    shifted = replace(memory, positions=memory.positions + 100, span=memory.span + 100)
    close(exact.logits(PROMPT, [shifted]), exact.logits(PROMPT, [memory]), atol=3e-5)


@pytest.mark.parametrize("name", MODELS)
def test_in_bfloat16_a_memory_is_as_near_to_the_model_as_its_own_prefill(name):
    """Rounding apart, both compute the same: their errors against float32 are of one size, not one beside the other."""
    half, exact = family(name, dtype=torch.bfloat16), family(name)
    exact.load_state_dict({key: value.float() for key, value in half.state_dict().items()})
    text = PREFIX + DOCUMENT + PROMPT
    true = plain(exact, text)[-len(PROMPT) :]
    own = plain(half, text)[-len(PROMPT) :].float()
    memory = half.compress_ids([DOCUMENT])[0]
    assert memory.keys.dtype == torch.bfloat16
    read = half.logits(PROMPT, [half.prefix_memory(), memory]).float()
    assert (own - true).abs().max() > 0
    assert (read - true).square().mean() <= 2 * (own - true).square().mean()
    # What is cached of the document is what the model would have put there, to the bit.
    row = half.model_input([half.prefix_ids, memory, torch.tensor(PROMPT)])
    layers = half.model(torch.tensor([text[: -len(PROMPT)]])).past_key_values.layers
    behind = slice(len(PREFIX), None)
    assert row.keys[:, :, behind].equal(torch.cat([layer.keys[:, :, behind] for layer in layers]))
    assert row.values[:, :, behind].equal(torch.cat([layer.values[:, :, behind] for layer in layers]))


def test_nothing_needs_a_mask(monkeypatch):
    compressor = tiny_kv(prefix=PREFIX)
    seen = []
    run = type(compressor.backbone).run
    monkeypatch.setattr(
        type(compressor.backbone),
        "run",
        lambda self, *args, mask=None, **options: (seen.append(mask), run(self, *args, mask=mask, **options))[1],
    )
    memories = compressor.compress_ids([DOCUMENT, OTHER, [1]])
    assert len(seen) == 1  # one batch
    prefix, prompt = compressor.prefix_ids, torch.tensor(PROMPT)
    compressor.prefill([[prefix, *memories, prompt], [prefix, *memories, prompt[:2]]])
    compressor.session(memories).feed(PROMPT)
    assert len(seen) == 4  # the prefix was read once
    assert all(mask is None for mask in seen)


def test_text_that_is_no_prefix_in_front_of_a_memory_is_read_as_it_is():
    compressor = tiny_kv(prefix=PREFIX)
    memory = compressor.compress_ids([DOCUMENT])[0]
    front = torch.tensor([*PREFIX, 30])
    logits, _ = compressor.prefill([[front, memory, torch.tensor(PROMPT)]])
    session = compressor.session()
    session.feed([30])
    assert compressor.model_input([front, memory, torch.tensor(PROMPT)]).place.tolist() == [4] * len(DOCUMENT)
    text = tiny_kv(prefix="none").compress_ids([[*PREFIX, 30]])[0]
    text = replace(text, fingerprint=compressor.fingerprint)
    close(logits[0], compressor.logits(PROMPT, [text, memory])[-1])


# The prefix.


class BosTokenizer:
    """What the tokenizer does, with a beginning-of-sequence token in front."""

    def __new__(cls, tokenizer, template=None):
        from tokenizers.processors import TemplateProcessing

        made = copy.deepcopy(tokenizer)
        made.add_special_tokens({"bos_token": "<|end|>"})
        made._tokenizer.post_processor = TemplateProcessing(
            single="<|end|> $A", special_tokens=[("<|end|>", made.bos_token_id)]
        )
        made.chat_template = template
        return made


def test_kinds_of_prefix(tokenizer):
    bos = BosTokenizer(tokenizer, CHATML)
    assert bos("a")["input_ids"][0] == bos.bos_token_id == 0
    header = bos("<|im_start|>user\n", add_special_tokens=False)["input_ids"]
    expected = {"auto": header, "bos": [0], "none": [], "chat": header}
    made = {kind: tiny_kv(tokenizer=bos, prefix=kind) for kind in expected}
    assert {kind: compressor.prefix_ids.tolist() for kind, compressor in made.items()} == expected
    fingerprints = {kind: compressor.fingerprint for kind, compressor in made.items()}
    assert fingerprints["auto"] == fingerprints["chat"]
    assert len(set(fingerprints.values())) == 3
    plain = {tiny_kv(tokenizer=each).prefix: tiny_kv(tokenizer=each) for each in (BosTokenizer(tokenizer), tokenizer)}
    assert {kind: compressor.prefix_ids.tolist() for kind, compressor in plain.items()} == {"bos": [0], "none": []}
    assert tiny_kv(prefix="bos", model=tiny_model(bos_token_id=7)).prefix_ids.tolist() == [7]
    assert tiny_kv(prefix="none").prefix_memory().slots == 0


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("system", "unknown prefix 'system'"),
        ("bos", "no beginning-of-sequence token"),
        ("chat", "needs a tokenizer with a chat template"),
        ([400], "the prefix holds token id 400"),
        ([0.5], "must be integers"),
    ],
)
def test_prefixes_that_cannot_be(prefix, message, tokenizer):
    with pytest.raises(InputError, match=message):
        tiny_kv(tokenizer=tokenizer, prefix=prefix)


def test_text_is_read_behind_the_prefix_and_ids_as_they_are(tokenizer):
    compressor = tiny_kv(tokenizer=BosTokenizer(tokenizer))
    memory = compressor.compress(["The ferry sails twice a day."])[0]
    ids = tokenizer("How often?", add_special_tokens=False)["input_ids"]
    options = {"max_new_tokens": 6, **NO_END}

    def text_of(new):
        return tokenizer.decode(new, skip_special_tokens=True)

    front = compressor.prefix_memory()
    by_hand = compressor.generate_ids(ids, [front, memory], **options)
    assert compressor.generate("How often?", [memory], **options) == text_of(by_hand)
    assert "".join(compressor.stream("How often?", [memory], **options)) == text_of(by_hand)
    # Given as ids, nothing is put in front, nor in front of what begins with the prefix.
    assert compressor.generate([[0], memory, ids], **options) == text_of(by_hand)
    assert compressor.generate("How often?", **options) == text_of(compressor.generate_ids([0, *ids], **options))
    close(compressor.logits([0, *ids])[1:], compressor.logits(ids, [front]))
    assert by_hand != compressor.generate_ids(ids, [memory], **options)


def test_the_prefix_stands_in_front_once():
    prefix, text = torch.tensor([3, 9]), torch.tensor([3, 9, 5])
    memory = tiny_kv().compress_ids([[1]])[0]
    assert with_prefix([text], prefix) == [text]
    assert with_prefix([], prefix) == []
    assert with_prefix([memory, text], prefix[:0]) == [memory, text]
    assert [part.tolist() for part in with_prefix([text[1:]], prefix)] == [[3, 9], [9, 5]]
    assert with_prefix([memory, text], prefix)[0] is prefix


def test_a_library_asks_behind_the_prefix(tokenizer, tmp_path, corpus):
    compressor = tiny_kv(tokenizer=BosTokenizer(tokenizer))
    library = Library.create(tmp_path / "l", compressor, FakeEmbedder(), chunk_tokens=32, overlap_tokens=4)
    library.add(corpus)
    question = len(tokenizer("Question: lighthouse\nAnswer:")["input_ids"])
    answer = library.ask("lighthouse", k=2, max_new_tokens=4)
    assert answer.prompt_tokens == 1 + len(tokenizer("\n\nQuestion: lighthouse\nAnswer:")["input_ids"])
    assert answer.memory_slots == sum(hit.tokens for hit in answer.sources)
    assert library.ask("lighthouse", mode="none", max_new_tokens=4).prompt_tokens == 1 + question
    prompts, _, _ = library._prepare(["lighthouse"], 1, "text", 4, {})
    assert torch.cat(prompts[0]).tolist().count(0) == 1
    assert library.search("lighthouse", rerank="likelihood")


def test_a_conversation_begins_with_the_prefix_once(tokenizer, monkeypatch, tmp_path, corpus):
    for template, kind in ((None, "auto"), (CHATML, "chat"), ("<|end|>" + CHATML, "auto")):
        compressor = tiny_kv(tokenizer=BosTokenizer(tokenizer, template), prefix=kind)
        conversation = Conversation(compressor, max_new_tokens=3, **NO_END)
        fed = heard(conversation, monkeypatch)
        whole(conversation.ask("Who?"))
        written = compressor.tokenizer.decode([*compressor.prefix_ids, *fed])
        opening = conversation.format.opening
        assert written.startswith(("<|end|>" if template is None else "") + opening)
        assert not written.removeprefix(opening).startswith(opening or "<|end|><|end|>")
        whole(conversation.ask("When?"))
        assert conversation.memory().source_tokens == len(fed)
    library = Library.create(tmp_path / "l", compressor, FakeEmbedder(), chunk_tokens=32, overlap_tokens=4)
    library.add(corpus)
    conversation = Conversation(compressor, library, k=1, max_new_tokens=3, **NO_END)
    whole(conversation.ask("Who?"))
    history = conversation.memory()
    _, answer = whole(conversation.ask("When?"))
    assert answer.memory_slots == history.slots + answer.sources[0].slots
    line_breaks = tokenizer("\n\n")["input_ids"]
    written = [*compressor.prefix_ids, *conversation._encoded("When?", []), *line_breaks]
    assert answer.prompt_tokens == len(written)


# Checkpoints.


def test_a_plain_model_is_compressed_without_training(tokenizer, tmp_path):
    tiny_model().save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    compressor = load_compressor(tmp_path / "plain")
    assert (compressor.method, compressor.chosen_by_default, compressor.ratio) == ("kvzip", True, 2)
    assert compressor.compress_ids([DOCUMENT])[0].slots == len(DOCUMENT) // 2
    named = load_compressor(tmp_path / "plain", method="kvzip", slots=7)
    assert (named.chosen_by_default, named.compress_ids([DOCUMENT])[0].slots) == (False, 7)
    named.save(tmp_path / "saved")
    again = load_compressor(tmp_path / "saved")
    assert (again.method, again.slots, again.chosen_by_default) == ("kvzip", 7, False)
    assert again.fingerprint == named.fingerprint
    assert load_compressor(tmp_path / "plain", method="kv").fingerprint != named.fingerprint
    with pytest.raises(InputError, match=r"kv has no setting ratio \(it has: prefix\)"):
        load_compressor(tmp_path / "plain", method="kv", ratio=2)


def test_a_library_of_a_plain_model_opens_again(tokenizer, tmp_path, corpus):
    tiny_model().save_pretrained(tmp_path / "plain")
    BosTokenizer(tokenizer, CHATML).save_pretrained(tmp_path / "plain")
    made = load_compressor(tmp_path / "plain", method="kvzip", prefix="chat", ratio=3)
    Library.create(tmp_path / "l", made, FakeEmbedder(), chunk_tokens=32, overlap_tokens=4).add(corpus)
    again = Library.open(tmp_path / "l", embedder=FakeEmbedder())
    assert (again.compressor.ratio, again.compressor.prefix) == (3, "chat")
    assert again.ask("lighthouse", max_new_tokens=3).memory_slots


def test_the_base_of_another_methods_checkpoint_will_do(tokenizer, tmp_path):
    for number, other in enumerate((tiny_autocompressor(tokenizer=tokenizer), tiny_gist(tokenizer=tokenizer))):
        other.save(tmp_path / str(number))
        compressor = load_compressor(tmp_path / str(number), method="kv")
        close(compressor.logits(PROMPT), other.logits(PROMPT))
        with pytest.raises(FingerprintMismatch):
            compressor.logits(PROMPT, other.compress_ids([DOCUMENT]))


def test_models_that_are_no_plain_causal_language_model(tmp_path):
    shared = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    bert = transformers.BertConfig(**shared, intermediate_size=32)
    mamba = transformers.MambaConfig(vocab_size=90, hidden_size=32, num_hidden_layers=2, state_size=4)
    t5 = transformers.T5Config(vocab_size=90, d_model=32, d_ff=32, num_layers=2, num_heads=4, d_kv=8)
    transformers.BertForMaskedLM(bert).save_pretrained(tmp_path / "bert")
    transformers.MambaForCausalLM(mamba).save_pretrained(tmp_path / "mamba")
    transformers.T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    tiny_model("opt").save_pretrained(tmp_path / "opt")
    with pytest.raises(CheckpointError, match="no causal language model of the kind t5"):
        load_compressor(tmp_path / "t5")
    with pytest.raises(InputError, match="does not compute its logits"):
        load_compressor(tmp_path / "bert", method="kv")
    with pytest.raises(InputError, match="keep a running state"):
        load_compressor(tmp_path / "mamba")
    with pytest.raises(InputError, match="OPTForCausalLM has no rotary embedding"):
        load_compressor(tmp_path / "opt")


# Wrong input.


def test_what_does_not_fit_is_refused_and_says_by_how_much():
    small = tiny_kv(model=tiny_model(max_position_embeddings=32), prefix=PREFIX)
    with pytest.raises(ContextTooLong, match="behind its prefix takes 33 positions, 1 more than the model's 32"):
        small.compress_ids([list(range(30)), [5]])
    memory = small.compress_ids([list(range(29))])[0]
    assert memory.slots == 29
    with pytest.raises(ContextTooLong, match="take 36 positions, 4 more than the model's 32"):
        small.logits(PROMPT, [small.prefix_memory(), memory])
    sliding = transformers.AutoModelForCausalLM.from_config(
        transformers.MistralConfig(**{**TINY, "num_key_value_heads": 2, "sliding_window": 16})
    )
    with pytest.raises(ContextTooLong, match="the 16 of its sliding window"):
        tiny_kv(model=sliding.eval()).compress_ids([list(range(17))])


def test_memories_of_another_method_prefix_or_model_are_refused():
    memory = tiny_kv(prefix=PREFIX).compress_ids([DOCUMENT])[0]
    for other in (tiny_kv(), tiny_kv("kvzip", prefix=PREFIX), tiny_kv(prefix=PREFIX, model=tiny_model(seed=1))):
        with pytest.raises(FingerprintMismatch, match=f"{other.method} compressor"):
            other.logits(PROMPT, [memory])
        with pytest.raises(FingerprintMismatch):
            other.session([memory])


def test_changed_weights_are_told_to_the_prefix():
    compressor = tiny_kv(prefix=PREFIX)
    before = compressor.prefix_memory()
    assert compressor.prefix_memory() is before
    compressor.model.model.embed_tokens.weight.data.mul_(2)
    compressor.forget_fingerprint()
    assert not torch.equal(compressor.prefix_memory().keys, before.keys)
    compressor.requires_grad_(True)
    compressor.forget_fingerprint()
    assert compressor.prefix_memory() is not compressor.prefix_memory()


def test_gradients_reach_the_model_through_memories():
    compressor = tiny_kv("kvzip", prefix=PREFIX).requires_grad_(True)
    memory = compressor.compress_ids([DOCUMENT])[0]
    compressor.logits(PROMPT, [compressor.prefix_memory(), memory]).logsumexp(-1).sum().backward()
    assert compressor.model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0


def test_it_is_one_class_for_the_method():
    assert isinstance(tiny_kv(), KVCompressor)
