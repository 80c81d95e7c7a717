"""RCC beyond the golden cases: filled windows, states on the way, checkpoints, sessions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ctxdocs import CheckpointError, FingerprintMismatch, InputError, Library, load_compressor
from ctxdocs.compressors.rcc import RECONSTRUCTION_PROMPT, answer_of, with_instruction

from .conftest import tiny_rcc

GOLDEN = Path(__file__).parent / "golden" / "rcc-neox-instruction-reconstruction"
SETTINGS = {"method": "rcc", "ratio": 8, "window": 64}
IDS = torch.arange(20, 75)
PROMPT = [11, 12, 13, 14]


@pytest.fixture(scope="module")
def rcc():
    return tiny_rcc()


@pytest.fixture
def published(tmp_path) -> Path:
    """A checkpoint as the authors publish it, with the encoder and two unused heads in it."""
    folder = tmp_path / "published"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / name, folder)
    return folder


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def filled_as_published(ids, window):
    """The authors' rule, step by step; a text that divides the window is tiled, as they meant it."""
    if len(ids) > window:
        return ids[-(window - len(ids) % window) :] + ids
    times, rest = divmod(window, len(ids))
    return (ids[-rest:] if rest else []) + ids * times


@given(length=st.integers(1, 70))
def test_windows_are_filled_as_published(rcc, length):
    ids = list(range(length))
    assert rcc.fill_windows(torch.tensor(ids)).tolist() == filled_as_published(ids, 16)


def test_a_memory_holds_every_hidden_state_of_the_encoder(rcc):
    memory = rcc.compress_ids([IDS[:32]])[0]
    windows = rcc.fill_windows(IDS[:32]).reshape(-1, 16)
    assert (memory.slots, memory.span, memory.source_tokens) == (12, 12, 32)
    states = torch.stack(rcc.encoder(windows, output_hidden_states=True).hidden_states, dim=2)
    close(memory.states, states[:, 3::4].flatten(0, 1))


def test_windows_of_all_documents_run_as_one_batch(rcc):
    batches = []
    handle = rcc.encoder.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    rcc.compress_ids([IDS, IDS[:5], IDS[:32]])
    handle.remove()
    assert batches == [4 + 1 + 3]


def test_no_hook_stays_behind_even_after_an_error(monkeypatch):
    compressor = tiny_rcc()
    memory = compressor.compress_ids([IDS])[0]
    compressor.logits(PROMPT, [memory])

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    for layers in (compressor.backbone.layers, compressor.encoder_backbone.layers):
        monkeypatch.setattr(layers[1].mlp, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        compressor.logits(PROMPT, [memory])
    with pytest.raises(RuntimeError, match="out of memory"):
        compressor.compress_ids([IDS])
    assert not any(module._forward_hooks for module in compressor.modules())


def test_reading_a_prompt_equals_the_batched_forward(rcc):
    memories = rcc.compress_ids([IDS[:16], IDS[16:32]])
    states = torch.stack([memory.states for memory in memories])
    logits = rcc(states, torch.tensor([PROMPT, PROMPT]))
    for row, memory in zip(logits, memories, strict=True):
        close(row[memory.slots :], rcc.logits(PROMPT, [memory]))


def test_every_layers_states_count_but_those_behind_the_last_layer(rcc):
    memory = rcc.compress_ids([IDS])[0]
    for index, matters in enumerate([True, True, False]):
        changed = rcc.as_memory(memory.states.clone(), 55)
        changed.states[:, index] += 1
        same = torch.allclose(rcc.logits(PROMPT, [changed]), rcc.logits(PROMPT, [memory]), atol=1e-5)
        assert same is not matters


def test_pairs_of_an_encoder_twice_as_deep_are_averaged():
    compressor = tiny_rcc(encoder_layers=4, layer_map="pairs")
    states = compressor.compress_ids([IDS])[0].states
    embeds, added = compressor.project(states)
    assert states.shape[1:] == (5, 32)
    close(embeds, compressor.embedding_projection(states[:, 0]))
    close(added[1], compressor.layer_projections[1]((states[:, 3] + states[:, 4]) / 2))


def test_training_takes_the_same_path():
    trained = tiny_rcc().requires_grad_(True)
    memory = trained.compress_ids([IDS])[0]
    trained.logits(PROMPT, [memory]).logsumexp(-1).sum().backward()
    first, last = trained.layer_projections
    assert trained.encoder.layers[0].attention.query_key_value.weight.grad.abs().sum() > 0
    assert trained.embedding_projection.weight.grad.abs().sum() > 0
    assert first.weight.grad.abs().sum() > 0
    assert last.weight.grad.abs().sum() == 0


def test_saving_and_loading_is_bit_exact(tokenizer, tmp_path):
    made = tiny_rcc(tokenizer, encoder_layers=4, layer_map="pairs")
    made.save(tmp_path / "saved")
    again = load_compressor(tmp_path / "saved", device="cpu")
    assert again.fingerprint == made.fingerprint
    assert (again.method, again.ratio, again.window, again.layer_map) == ("rcc", 4, 16, "pairs")
    assert again.prompt_format == made.prompt_format
    assert not any(parameter.requires_grad for parameter in again.parameters())
    memory = made.compress_ids([IDS])[0]
    assert torch.equal(again.logits(PROMPT, [memory]), made.logits(PROMPT, [memory]))
    half = load_compressor(tmp_path / "saved", device="cpu", dtype="bfloat16")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_the_published_format_is_read_and_written_back(published, tmp_path):
    compressor = load_compressor(published, **SETTINGS)
    weights = load_file(published / "model.safetensors")
    assert torch.equal(compressor.model.lm_head.weight, weights["embed_out.weight"])
    compressor.save(tmp_path / "saved")
    own = load_file(tmp_path / "saved" / "compressor.safetensors")
    assert len(own) > 20
    assert all(torch.equal(tensor, weights[name]) for name, tensor in own.items())
    assert load_compressor(tmp_path / "saved").fingerprint == compressor.fingerprint
    del weights["gpt_neox.embed_out.weight"], weights["gpt_neox.rcc_encoder.embed_out.weight"]
    (published / "model.safetensors").unlink()
    torch.save(weights, published / "pytorch_model.bin")
    assert load_compressor(published, **SETTINGS).fingerprint == compressor.fingerprint


def test_the_published_format_has_the_published_settings(published):
    config = json.loads((published / "config.json").read_text())
    (published / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    compressor = load_compressor(published, method="rcc")
    assert (compressor.ratio, compressor.window, compressor.layer_map) == (32, 2048, "one")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("rcc_encoder2gpt_embed.weight", None, r"lacks tensors of rcc: gpt_neox\.rcc_encoder2gpt_embed\.weight"),
        ("rcc_encoder.gpt_neox.embed_in.weight", None, r"lacks tensors of rcc: gpt_neox\.rcc_encoder\.gpt_neox\.emb"),
        ("rcc_encoder2gpt_A_matrix.1.weight", torch.zeros(64, 3), r"A_matrix\.1\.weight is \(64, 3\), not \(64, 64\)"),
        ("rcc_encoder.gpt_neox.final_layer_norm.bias", torch.zeros(3), r"encoder\.gpt_neox\.final.* is \(3,\), not"),
        ("rcc_encoder.gpt_neox.layers.3.mlp.bias", torch.zeros(3), r"no place for: gpt_neox\.rcc_encoder\.gpt_neox"),
    ],
)
def test_missing_extra_and_misshapen_tensors_are_named(published, name, change, message):
    weights = load_file(published / "model.safetensors")
    weights.pop(f"gpt_neox.{name}", None)
    if change is not None:
        weights[f"gpt_neox.{name}"] = change
    save_file(weights, published / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_compressor(published, **SETTINGS)


def test_unusable_settings_are_refused(published):
    with pytest.raises(InputError, match="window of 2048 tokens does not fit the encoder's 512 positions"):
        load_compressor(published, method="rcc")
    with pytest.raises(InputError, match="window of 64 tokens cannot be compressed at ratio 7"):
        load_compressor(published, method="rcc", ratio=7, window=64)
    with pytest.raises(InputError, match="decoder of 3 layers needs an encoder of 6, not of 3"):
        load_compressor(published, **SETTINGS, layer_map="pairs")
    with pytest.raises(InputError, match="no setting encoder"):
        load_compressor(published, **SETTINGS, encoder=3)
    with pytest.raises(InputError, match="layer_map is 'one' or 'pairs', not 'two'"):
        tiny_rcc(layer_map="two")


def test_unusable_input_is_refused(rcc):
    with pytest.raises(InputError, match="10 tokens do not fill windows of 16"):
        rcc.encode(torch.zeros(1, 10, dtype=torch.long))
    small = tiny_rcc(seed=1, max_position_embeddings=32)
    with pytest.raises(InputError, match="take 34 positions, 2 more than the model's 32"):
        small.logits([1, 2], small.compress_ids([IDS, IDS]))
    with pytest.raises(FingerprintMismatch):
        rcc.logits(PROMPT, small.compress_ids([IDS]))
    with pytest.raises(FingerprintMismatch):
        rcc.session(small.compress_ids([IDS]))


def test_a_session_reads_text_behind_the_states_of_the_text_before_it(rcc):
    start = rcc.compress_ids([IDS[:16]])
    session = rcc.session(start, segment_tokens=10)
    fed = torch.cat([session.feed(piece) for piece in IDS.split([1, 7, 13, 34])])
    close(fed[:10], rcc.logits(IDS[:10], start))
    # Ten tokens are an open window, twenty are a full one and an open one of four.
    close(fed[10:20], rcc.logits(IDS[10:20], [*start, *rcc.compress_ids([IDS[:10]])]))
    windows = rcc.compress_ids([IDS[:16], IDS[16:20]])
    close(fed[20:30], rcc.logits(IDS[20:30], [*start, *windows]))
    assert session.tokens_seen == 55
    close(fed[-5:], rcc.logits(IDS[-5:], [*start, *rcc.compress_ids([IDS[:16], IDS[16:32], IDS[32:48], IDS[48:50]])]))


def test_a_sessions_memory_is_closed_and_leaves_it_as_it_is(rcc):
    session = rcc.session(segment_tokens=6)
    session.feed(IDS[:11])
    close(session.memory().states, rcc.compress_ids([IDS[:11]])[0].states)
    session.feed(IDS[11:40])
    memory = session.memory()
    assert (memory.slots, memory.source_tokens) == (12, 40)
    close(memory.states, torch.cat([m.states for m in rcc.compress_ids([IDS[:16], IDS[16:32], IDS[32:40]])]))
    assert rcc.logits(PROMPT, [memory]).shape == (4, 400)
    session.reset()
    close(session.feed(IDS[:3]), rcc.logits(IDS[:3]))
    assert session.memory().source_tokens == 3


def test_a_session_generates_what_the_compressor_generates_within_a_segment(rcc):
    start = rcc.compress_ids([IDS])
    session = rcc.session(start, segment_tokens=16)
    with pytest.raises(InputError, match="feed it before"):
        session.generate_ids(1)
    session.feed(PROMPT)
    assert session.generate_ids(8) == rcc.generate_ids(PROMPT, start, max_new_tokens=8, eos_token_ids=())
    assert session.tokens_seen == 12
    assert len(session.generate_ids(30)) == 30


def test_a_session_says_where_its_positions_end():
    session = tiny_rcc(max_position_embeddings=32).session(segment_tokens=16)
    session.feed(IDS[:40])
    with pytest.raises(InputError, match="the session takes 36 positions, 4 more than the model's 32"):
        session.feed(IDS)
    assert session.tokens_seen == 40
    session.feed(IDS[:30])
    with pytest.raises(InputError, match="between 1 and 16 tokens"):
        session.compressor.session(segment_tokens=17)
    with pytest.raises(InputError, match="what is fed is empty"):
        session.feed([])


def test_instruction_reconstruction_is_a_prompt(tokenizer):
    compressor = tiny_rcc(tokenizer)
    memory = compressor.compress([with_instruction("The ferry sails twice a day.", "How often?")])[0]
    text = compressor.generate(RECONSTRUCTION_PROMPT, [memory], max_new_tokens=4, eos_token_ids=())
    assert answer_of(f"How often?<|im_end|>\n<|im_start|>assistant\n{text}") == text
    parts = compressor.prompt_format.build("How often?", [memory], tokenizer)
    assert parts[0] is memory
    asked = tokenizer.decode(parts[1])
    assert asked == f"{RECONSTRUCTION_PROMPT}How often?<|im_end|>\n<|im_start|>assistant\n"


def test_a_library_knows_the_settings_that_the_checkpoint_does_not(tokenizer, tmp_path, corpus, embedder):
    made = tmp_path / "made"
    tiny_rcc(tokenizer).save(made)
    (made / "ctxdocs.json").unlink()
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, "mem_len": 32, "rcc_encoder_max_input": 2048}))
    compressor = load_compressor(made, method="rcc", ratio=4, window=16, device="cpu")
    library = Library.create(tmp_path / "library", compressor, embedder, chunk_tokens=32, overlap_tokens=4)
    assert library.add(corpus).documents == 3
    again = Library.open(tmp_path / "library", embedder=embedder, device="cpu")
    assert again.ask("lighthouse", max_new_tokens=4).memory_slots > 0
