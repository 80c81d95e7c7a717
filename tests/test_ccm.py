"""CCM beyond the golden cases: variants, adapters in the authors' format, conversations, streams."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ctxdocs import CheckpointError, InputError, load_compressor
from ctxdocs.compressors.ccm import ATTENTION_TYPES
from ctxdocs.compressors.ccm_sessions import Window
from ctxdocs.modeling.kv import KeysValues

from .conftest import tiny_ccm

IDS = torch.arange(20, 60)
SMALL = Window(window_size=16, comp_size=6, comp_cache_size=5, sink_size=1)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def same(first, second):
    assert (first.span, first.source_tokens) == (second.span, second.source_tokens)
    for name, tensor in first.tensors().items():
        close(tensor, second.tensors()[name])


@pytest.mark.parametrize("attn_type", ATTENTION_TYPES)
@pytest.mark.parametrize("sink", [False, True])
def test_a_memory_holds_a_group_per_segment_or_their_mean(attn_type, sink):
    compressor = tiny_ccm(attn_type=attn_type, sink=sink, segment_tokens=9)
    memory = compressor.compress_ids([IDS])[0]
    assert memory.slots == sink + 2 * (1 if compressor.merges else 5)
    assert memory.span == memory.source_tokens == 40
    if not compressor.merges:
        groups = [9, 10, 18, 19, 27, 28, 36, 37, 40, 41]
        assert memory.positions.tolist() == [0] * sink + groups


@pytest.mark.parametrize("attn_type", ATTENTION_TYPES)
@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_a_batch_of_unequal_documents_equals_each_alone(attn_type, architecture):
    compressor = tiny_ccm(architecture, attn_type=attn_type, sink=True, segment_tokens=8)
    documents = [IDS, IDS[:9], IDS[5:28], IDS[:8], IDS[:1]]
    for document, memory in zip(documents, compressor.compress_ids(documents), strict=True):
        same(memory, compressor.compress_ids([document])[0])


@pytest.mark.parametrize("attn_type", ATTENTION_TYPES)
@pytest.mark.parametrize("sink", [False, True])
def test_a_session_fed_segment_by_segment_equals_compressing_at_once(attn_type, sink):
    compressor = tiny_ccm(attn_type=attn_type, sink=sink)
    session = compressor.session(segment_tokens=16)
    fed = torch.cat([session.feed(piece) for piece in IDS.split([1, 7, 8, 5, 19])])
    assert session.tokens_seen == 40
    same(session.memory(), compressor.compress_ids([IDS], segment_lengths=16)[0])
    same(session.memory(), compressor.compress_ids([IDS], segment_lengths=16)[0])  # asking changes nothing
    again = compressor.session(segment_tokens=16)
    close(again.feed(IDS), fed)
    session.reset()
    close(session.feed(IDS[:16]), fed[:16])
    session.end_turn()
    close(session.feed([7, 8]), compressor.logits([7, 8], compressor.compress_ids([IDS[:16]])))


@pytest.mark.parametrize("attn_type", ["concat_recur", "merge_recur"])
def test_a_session_may_start_from_memories(attn_type):
    compressor = tiny_ccm(attn_type=attn_type, sink=True)
    memories = compressor.compress_ids([IDS, IDS[:9]])
    session = compressor.session(memories)
    close(session.feed(IDS[:5]), compressor.logits(IDS[:5], memories))
    session.end_turn()
    whole = session.memory()
    assert whole.source_tokens == whole.span == 54
    assert whole.slots == sum(memory.slots for memory in memories) + 2  # the first token brings no second sink
    close(session.feed([7, 8]), compressor.logits([7, 8], [whole]))


def test_a_turn_is_compressed_together_with_its_answer():
    compressor = tiny_ccm()
    session = compressor.session()
    with pytest.raises(InputError, match="feed it before"):
        session.generate_ids(1)
    with pytest.raises(InputError, match="feed the session first"):
        session.memory()
    session.feed(IDS[:6])
    answer = session.generate_ids(5)
    assert answer == compressor.generate_ids(IDS[:6], max_new_tokens=5, eos_token_ids=())
    session.feed([7, 8])
    first_turn = compressor.compress_ids([[*IDS[:6].tolist(), *answer]])
    same(session.memory(), compressor.compress_ids([[*IDS[:6].tolist(), *answer, 7, 8]], segment_lengths=[11, 2])[0])
    rest = compressor.session(first_turn)
    close(rest.feed([7, 8]), compressor.logits([7, 8], first_turn))
    assert session.generate_ids(8, eos_token_ids=(rest.generate_ids(1)[0],)) == []


def test_special_tokens_alone_use_the_lora():
    compressor = tiny_ccm()
    plain = compressor.model(IDS[None]).logits[0]
    close(compressor.session().feed(IDS), plain)
    before = compressor.compress_ids([IDS])[0]
    torch.nn.init.zeros_(compressor.lora[0]["k_proj"].lora_B.weight)
    assert torch.equal(compressor.model(IDS[None]).logits[0], plain)
    assert not torch.allclose(compressor.compress_ids([IDS])[0].keys, before.keys, atol=1e-3)
    assert not any(module._forward_hooks for module in compressor.modules())


def test_new_embeddings_are_means_of_the_base_table():
    from ctxdocs.compressors.ccm import CCM

    from .conftest import tiny_model

    compressor = CCM(tiny_model(), num_comp_tokens=2, attn_type="merge_recur")
    base = compressor.backbone.embedding.weight
    close(compressor.comp_embeddings.weight[3], base[0::4].mean(0))
    close(compressor.comp_embeddings.weight[0], base[3::4].mean(0))


def test_gradients_flow_through_all_steps_and_back_to_the_text_embeddings():
    compressor = tiny_ccm(attn_type="merge_recur", num_hidden_layers=3, segment_tokens=8).requires_grad_(True)
    memory = compressor.compress_ids([IDS])[0]
    compressor.logits([5, 6, 7], [memory]).logsumexp(-1).sum().backward()
    used, unused = compressor.comp_embeddings.weight.grad.split(2)
    assert used.abs().sum() > 0
    assert unused.abs().sum() == 0
    assert compressor.lora[0]["q_proj"].lora_A.weight.grad.abs().sum() > 0
    # The first segment reaches the end only by way of its slots.
    assert compressor.backbone.embedding.weight.grad[IDS[:8]].abs().sum() > 0


@pytest.mark.parametrize("attn_type", ["concat_recur", "merge_recur"])
@pytest.mark.parametrize("keeps", ["memory", "text"])
def test_a_stream_is_bounded_and_may_be_fed_in_any_pieces(attn_type, keeps):
    compressor = tiny_ccm(attn_type=attn_type)
    window = Window(**{**SMALL.__dict__, "keeps": keeps})
    stream, pieces = compressor.session(window=window), compressor.session(window=window)
    ids = torch.arange(200) + 100
    whole = stream.feed(ids)
    held = []
    parts = []
    for piece in ids.split([1, 3, 40, 1, 1, 54, 100]):
        parts.append(pieces.feed(piece))
        held.append(pieces.cached)
    close(torch.cat(parts), whole)
    assert max(held) <= SMALL.window_size
    assert stream.compressions == pieces.compressions > 20
    memory = stream.memory()
    assert memory.source_tokens == 200
    assert memory.slots == memory.span == (stream.cached if keeps == "text" else 6 if attn_type[0] == "c" else 3)
    assert compressor.logits([5, 6], [memory]).shape == (2, 400)
    new = stream.generate_ids(12)
    assert len(new) == 12
    assert stream.tokens_seen == 212
    stream.reset()
    close(stream.feed(ids[:30]), whole[:30])


def test_a_merging_stream_keeps_means_of_unrotated_keys_and_of_values():
    compressor = tiny_ccm(attn_type="merge_recur")
    stream = compressor.session(window=SMALL)
    stream.feed(IDS[:17])
    before = stream.held
    stream.feed(IDS[17:21])
    assert (stream.compressions, stream.cached) == (2, 17 - 6)
    # The second step read the sink, the first group and the six tokens behind them.
    read = KeysValues(before.keys[..., :9, :], before.values[..., :9, :], torch.arange(9)[None])
    new = compressor.write(read.cache(compressor.model), 9)
    close(stream.held.part(1, 3).keys, (before.part(1, 3).keys + new.keys) / 2)
    close(stream.held.part(1, 3).values, (before.part(1, 3).values + new.values) / 2)


def test_until_a_window_is_full_a_stream_is_the_base_model():
    compressor = tiny_ccm()
    stream = compressor.session(window=SMALL)
    close(stream.feed(IDS[:17]), compressor.model(IDS[None, :17]).logits[0])
    assert stream.compressions == 1
    assert stream.cached == 17 - 6 + 2


@pytest.mark.parametrize(
    ("window", "message"),
    [
        (Window(window_size=10, comp_size=6, comp_cache_size=5), "too small.*take 12"),
        (Window(comp_cache_size=1), "at least the 2 special tokens"),
        (Window(keeps="all"), "'memory' or 'text'"),
        (Window(window_size=3000), "needs 3003 positions, the model has 2048"),
    ],
)
def test_unusable_windows_are_refused(window, message):
    with pytest.raises(InputError, match=message):
        tiny_ccm().session(window=window)


def test_other_wrong_input_is_refused():
    with pytest.raises(InputError, match="unknown attn_type 'gist'"):
        tiny_ccm(attn_type="gist")
    with pytest.raises(InputError, match="at least one token, got num_comp_tokens=0"):
        tiny_ccm(num_comp_tokens=0)
    with pytest.raises(InputError, match="between 1 and 30 tokens"):
        tiny_ccm(max_position_embeddings=32, segment_tokens=31)
    with pytest.raises(InputError, match="no separate q, k, v and o projections"):
        tiny_ccm("opt")
    with pytest.raises(InputError, match="cannot stream"):
        tiny_ccm(attn_type="concat").session(window=SMALL)
    small = tiny_ccm(max_position_embeddings=32)
    with pytest.raises(InputError, match="a document of 40 tokens takes 8 positions more than the model's 32"):
        small.compress_ids([IDS])
    session = small.session()
    with pytest.raises(InputError, match="with 40 more tokens the session takes 42 positions, 10 more"):
        session.feed(IDS)
    with pytest.raises(InputError, match="what is fed holds token id 400"):
        session.feed([400])
    with pytest.raises(InputError, match="what is fed is empty"):
        session.feed([])
    with pytest.raises(InputError, match="at least one token"):
        small.session(segment_tokens=0)
    with pytest.raises(InputError, match="at least one token"):
        small.compress_ids([IDS[:5]], segment_lengths=[5, 0])
    memories = small.compress_ids([IDS[:20]])
    with pytest.raises(InputError, match="window starts empty"):
        small.session(memories, window=SMALL)
    with pytest.raises(InputError, match="take 40 positions, 8 more"):
        small.logits(IDS[:20], memories)


# Adapters in the authors' format.

PREFIX = "base_model.model.model."


@pytest.fixture
def adapter(tmp_path) -> Path:
    """A folder as published, named as published, on top of another adapter beside it; the base is ``tmp_path/base``."""
    compressor = tiny_ccm(attn_type="merge_recur", sink=True, lora_rank=4)
    compressor.model.save_pretrained(tmp_path / "base")
    folder = tmp_path / "finetune" / "llama-7b-no-online-merge_recur-ntok2-sink_pajama"
    stage = tmp_path / "llama-7b-no"
    tensors = {published(name): parameter.data for name, parameter in compressor.own_parameters().items()}
    write_adapter(folder, tensors)
    write_adapter(stage, {name: tensor for name, tensor in tensors.items() if "lora" in name})
    return folder


def published(name: str) -> str:
    """What the authors call one of our tensors."""
    if name.startswith("comp_embeddings"):
        return f"{PREFIX}embed_tokens.{name}"
    _, layer, factor = name.split(".", 2)
    return f"{PREFIX}layers.{layer}.self_attn.{factor}"


def write_adapter(folder: Path, tensors) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "base_model_name_or_path": None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    torch.save(tensors, folder / "pytorch_model.bin")


def change(folder: Path, edit) -> None:
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    edit(tensors)
    torch.save(tensors, folder / "pytorch_model.bin")


def test_the_folders_name_says_what_its_files_do_not(adapter):
    compressor = load_compressor(adapter, base_model=adapter.parents[1] / "base", device="cpu")
    assert (compressor.method, compressor.attn_type, compressor.num_comp_tokens) == ("ccm", "merge_recur", 2)
    assert compressor.sink
    made = tiny_ccm(attn_type="merge_recur", sink=True, lora_rank=4)
    factors = made.lora[1]["v_proj"]
    merged = made.model.model.layers[1].self_attn.v_proj.weight + 4 * factors.lora_B.weight @ factors.lora_A.weight
    close(compressor.model.model.layers[1].self_attn.v_proj.weight, merged)
    assert torch.equal(compressor.lora[1]["v_proj"].lora_A.weight, factors.lora_A.weight)
    assert compressor.lora[1]["v_proj"].scale == 4
    assert not any(parameter.requires_grad for parameter in compressor.parameters())
    # Saved, it needs neither the adapter's base nor the other adapter.
    compressor.save(adapter.parents[1] / "saved")
    again = load_compressor(adapter.parents[1] / "saved", device="cpu")
    assert again.fingerprint == compressor.fingerprint
    assert (again.sink, again.segment_tokens) == (True, 128)
    memory = compressor.compress_ids([IDS])[0]
    assert torch.equal(again.logits([7], [memory]), compressor.logits([7], [memory]))


@pytest.mark.parametrize(("attn_type", "tokens"), [("concat_recur", 4), ("merge_recur", 2), ("merge", 2)])
def test_in_a_folder_of_another_name_the_type_must_be_given(adapter, attn_type, tokens):
    base = adapter.parents[1] / "base"
    plain = adapter.rename(adapter.parents[1] / "mine")
    with pytest.raises(CheckpointError, match=r"pass attn_type=\.\.\.") as error:
        load_compressor(plain, base_model=base)
    assert "concat_recur" in str(error.value)
    compressor = load_compressor(plain, base_model=base, attn_type=attn_type, sink=True, segment_tokens=5)
    assert (compressor.attn_type, compressor.num_comp_tokens, compressor.sink) == (attn_type, tokens, True)
    assert compressor.segment_tokens == 5


def test_what_an_adapter_lacks_is_named(adapter, tmp_path):
    base = tmp_path / "base"
    with pytest.raises(CheckpointError, match=r"does not say of which model \(pass base_model"):
        load_compressor(adapter)
    shutil.move(tmp_path / "llama-7b-no", tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"LoRA adapter llama-7b-no, which is not beside it \(pass finetune"):
        load_compressor(adapter, base_model=base)
    options = {"base_model": base, "finetune": tmp_path / "elsewhere"}
    assert load_compressor(adapter, **options).num_comp_tokens == 2
    with pytest.raises(CheckpointError, match="4 special tokens, not 6"):
        load_compressor(adapter, num_comp_tokens=3, **options)
    with pytest.raises(CheckpointError, match="no CCM adapter here"):
        load_compressor(base, method="ccm")
    change(adapter, lambda tensors: tensors.update({published("lora.9.q_proj.lora_A.weight"): torch.zeros(4, 32)}))
    with pytest.raises(CheckpointError, match="the base model has no place"):
        load_compressor(adapter, **options)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.update({"x": torch.zeros(1)}), "holds x, which no CCM adapter has"),
        (lambda t: t.pop(published("lora.1.k_proj.lora_B.weight")), r"lacks tensors of ccm: lora\.1\.k_proj"),
        (
            lambda t: t.update({published("lora.1.k_proj.lora_B.weight"): torch.zeros(9, 4)}),
            r"lora\.1\.k_proj\.lora_B\.weight is \(9, 4\), not \(16, 4\)",
        ),
    ],
)
def test_missing_extra_and_misshapen_tensors_are_named(adapter, edit, message):
    change(adapter, edit)
    with pytest.raises(CheckpointError, match=message):
        load_compressor(adapter, base_model=adapter.parents[1] / "base")


def test_half_precision_keeps_the_adapter_as_it_is(adapter):
    base = adapter.parents[1] / "base"
    half = load_compressor(adapter, base_model=base, dtype="bfloat16", device="cpu")
    assert half.backbone.dtype == torch.bfloat16
    assert half.comp_embeddings.weight.dtype == half.lora[0]["q_proj"].lora_A.weight.dtype == torch.float32
    memory = half.compress_ids([IDS])[0]
    assert memory.keys.dtype == torch.bfloat16
    assert half.logits([7], [memory]).dtype == torch.bfloat16


def test_safetensors_and_old_names_are_read(adapter):
    base = adapter.parents[1] / "base"
    first = load_compressor(adapter, base_model=base)
    tensors = torch.load(adapter / "pytorch_model.bin", weights_only=True)
    tensors = {name.replace("comp_emb", "gist_emb").replace("_A.w", "_A.default.w"): t for name, t in tensors.items()}
    save_file(tensors, adapter / "model.safetensors")
    assert load_file(adapter / "model.safetensors").keys() == tensors.keys()
    (adapter / "pytorch_model.bin").unlink()
    assert load_compressor(adapter, base_model=base).fingerprint == first.fingerprint


def test_a_library_finds_its_adapter_again(adapter, corpus, tokenizer, embedder, monkeypatch):
    from ctxdocs import Library

    home = adapter.parents[1]
    tokenizer.save_pretrained(home / "base")
    plain = adapter.rename(home / "mine")
    monkeypatch.chdir(home)
    compressor = load_compressor("mine", base_model="base", finetune="llama-7b-no", attn_type="concat_recur", sink=True)
    library = Library.create(home / "library", compressor, embedder, chunk_tokens=16, overlap_tokens=4)
    assert library.add(corpus).documents == 3
    chunks = library.store.chunks([hit.id for hit in library.search("tide gauge", k=3)])
    for chunk, memory in zip(chunks, library.store.memories(chunks), strict=True):
        same(memory, compressor.compress([chunk.text])[0])
    assert library.ask("When does the ferry sail?", k=2, max_new_tokens=4).memory_slots > 8
    monkeypatch.chdir(plain)
    again = Library.open(home / "library", embedder=embedder)
    assert again.compressor.fingerprint == compressor.fingerprint
    assert again.compressor.base_places == {"base_model": str(home / "base"), "finetune": str(home / "llama-7b-no")}
