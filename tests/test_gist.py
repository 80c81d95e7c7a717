"""Gist tokens beyond the golden cases: documents of any length, sessions, checkpoints, bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ctxdocs import CheckpointError, InputError, KVMemory, load_compressor
from ctxdocs.compressors.gist_ratios import RatioChoice

from .conftest import tiny_gist, tiny_model

GOLDEN = Path(__file__).parent / "golden"
IDS = torch.arange(20, 90)
APPEND = {"placement": "append"}
STEPWISE = {**APPEND, "attention": "step-expansion"}
VARIANTS = {
    "interleave": ("beacon", {}),
    "interleave-sink": ("beacon", {"sink_size": 2}),
    "interleave-uneven": ("beacon", {"ratio": 3}),
    "append": ("beacon", APPEND),
    "append-sink": ("beacon", {**APPEND, "sink_size": 1}),
    "append-uneven": ("beacon", {**STEPWISE, "ratio": 5}),
    "stepwise-alone": ("beacon", {**STEPWISE, "attend_prev": False}),
    "mix": ("beacon", {"ratio": (0, 2, 4, 8), "ratio_mix": "sequence"}),
    "random": ("beacon", {"ratio": (2, 4, 8), "ratio_mix": "step-random"}),
    "raw": ("beacon", {"ratio": 0, "sink_size": 1}),
    "ultragist": ("ultragist", {}),
    "ultragist-alone": ("ultragist", {"attend_prev": False, "ratio": 6}),
    "ultragist-segments": ("ultragist", {"attention": "segmentation"}),
    "ultragist-overlap": ("ultragist", {"stride": 8}),
    "ultragist-mlp": ("ultragist", {"projections": ("q", "k", "v", "o", "mlp")}),
}


@pytest.fixture(scope="module", params=VARIANTS)
def gist(request):
    method, changes = VARIANTS[request.param]
    return tiny_gist(method, **changes)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def same(a, b):
    assert (a.slots, a.span, a.source_tokens) == (b.slots, b.span, b.source_tokens)
    for name, tensor in a.tensors().items():
        close(tensor, b.tensors()[name])


@given(st.lists(st.integers(1, 70), min_size=1, max_size=5))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_batch_of_any_lengths_equals_its_rows(gist, lengths):
    together = gist.compress_ids([IDS[-length:] for length in lengths], batch_tokens=10_000)
    for length, memory in zip(lengths, together, strict=True):
        same(memory, gist.compress_ids([IDS[-length:]])[0])
        assert memory.positions.tolist() == list(range(memory.span))


def test_whole_windows_become_what_a_session_keeps_of_them(gist):
    if gist.stride < gist.window:
        pytest.skip("windows that overlap leave something to close")
    session = gist.session()
    session.feed(IDS[:48])
    memory = gist.compress_ids([IDS[:48]])[0]
    close(memory.keys, session.windows.slots[0, :, 0])
    close(memory.values, session.windows.slots[1, :, 0])
    same(session.memory(), memory)


@pytest.mark.parametrize(
    ("method", "changes", "length", "slots"),
    [
        ("beacon", {}, 39, 8 + 1 + 3),  # two windows of 4; one interleaved, three tokens stay
        ("beacon", {}, 3, 3),
        ("beacon", {"sink_size": 2}, 3, 3),
        ("beacon", {"sink_size": 2}, 39, 2 + 8 + 1 + 3),
        ("beacon", {"ratio": 3}, 20, 5 + 1 + 2),  # one token of the first window counts towards the second's gist token
        ("beacon", APPEND, 39, 8 + 2),
        ("beacon", APPEND, 3, 1),
        ("beacon", {"ratio": 0}, 39, 39),
        ("ultragist", {}, 39, 1 + 8 + 2),
        ("ultragist", {"stride": 8}, 20, 1 + 2 + 3),  # of 20 tokens, 12 are left when the first window is done
    ],
)
def test_the_last_window_is_closed(method, changes, length, slots):
    assert tiny_gist(method, **changes).compress_ids([IDS[:length]])[0].slots == slots


def test_closing_a_session_equals_compressing_the_text_and_leaves_it_open():
    for method, changes in (("beacon", {}), ("beacon", APPEND), ("ultragist", {"sink_size": 0})):
        gist = tiny_gist(method, **changes)
        session, other = gist.session(), gist.session()
        for piece in IDS[:39].split([5, 1, 20, 13]):
            session.feed(piece)
            same(session.memory(), session.memory())
        other.feed(IDS[:39])
        same(session.memory(), gist.compress_ids([IDS[:39]])[0])
        close(session.feed(IDS[39:]), other.feed(IDS[39:]))


def test_the_model_is_never_copied(gist, monkeypatch):
    def refuse(model, memo):
        raise AssertionError("the model was copied")

    monkeypatch.setattr(type(gist.model), "__deepcopy__", refuse, raising=False)
    gist.compress_ids([IDS[:40], IDS[:16], IDS[:7]], batch_tokens=1000)
    session = gist.session()
    session.feed(IDS[:20])
    session.memory()


def test_a_prompt_behind_a_memory_is_read_like_the_text_that_goes_on():
    gist = tiny_gist("beacon", **APPEND)
    session = gist.session()
    session.feed(IDS[:32])
    memory = gist.compress_ids([IDS[:32]])[0]
    close(session.feed(IDS[32:44]), gist.logits(IDS[32:44], [memory]))
    behind = gist.session([memory])
    close(behind.feed(IDS[32:44]), gist.logits(IDS[32:44], [memory]))
    assert behind.memory().source_tokens == 44
    assert behind.memory().slots == 8 + 3
    behind.reset()
    close(behind.feed(IDS[:3]), gist.logits(IDS[:3], [memory]))


def test_a_session_generates_across_windows_and_holds_what_it_said():
    gist = tiny_gist("beacon")
    session, again = gist.session(), gist.session()
    with pytest.raises(InputError, match="feed it before"):
        session.generate_ids(1)
    session.feed(IDS[:12])
    new = session.generate_ids(20)
    logits = again.feed([*IDS[:12].tolist(), *new])
    assert logits[11:-1].argmax(-1).tolist() == new
    assert session.windows.tokens_read == 32
    assert session.memory().slots == 8


def test_an_endless_stream_grows_by_gist_tokens_only():
    session = tiny_gist("ultragist", ratio=16).session()
    for _ in range(12):
        session.feed(IDS[:16])
        assert session.windows.raw.shape[-2] == 0
    assert session.windows.slots.shape[-2] == 1 + 12


def test_skipped_tokens_stay_as_they_are():
    session = tiny_gist("beacon").session()
    session.feed(IDS[:50], skip_first=5, skip_last=37)
    assert [part.shape[-2] for part in (session.windows.sink, session.windows.gist, session.windows.raw)] == [5, 8, 13]
    assert session.memory().slots == 26
    with pytest.raises(InputError, match="whole windows of 16 tokens"):
        tiny_gist("beacon").session().feed(IDS, skip_first=5, skip_last=30)


@pytest.mark.parametrize("changes", [{}, APPEND, {**APPEND, "sink_size": 1, "ratio": (0, 4), "ratio_mix": "sequence"}])
def test_full_coverage_needs_no_mask(changes, monkeypatch):
    gist, masks = tiny_gist("beacon", **changes), []
    run = gist.backbone.run

    def watched(*args, mask=None, **options):
        masks.append(mask)
        return run(*args, mask=mask, **options)

    monkeypatch.setattr(gist.backbone, "run", watched)
    gist.compress_ids([IDS[:length] for length in (3, 16, 40, 41, 55)], batch_tokens=1000)
    session = gist.session()
    session.feed(IDS)
    session.memory()
    assert masks
    assert all(mask is None for mask in masks)


@pytest.mark.parametrize("method", ["beacon", "ultragist"])
def test_a_library_of_gist_memories(method, tokenizer, embedder, corpus, tmp_path):
    from ctxdocs import Library

    gist = tiny_gist(method, tokenizer)
    library = Library.create(tmp_path / "library", gist, embedder, chunk_tokens=32, overlap_tokens=4)
    assert library.add(corpus).documents == 3
    answer = library.ask("When was the lighthouse built?", max_new_tokens=4)
    assert answer.memory_slots > 0


FAMILIES = {
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "olmo2": ("Olmo2Config", {}),
    "llama-3": (
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_of_models(family, tmp_path):
    import transformers

    name, changes = FAMILIES[family]
    shared = {"vocab_size": 120, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    shared |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    config = getattr(transformers, name)(**shared, **changes, bos_token_id=None, eos_token_id=3, pad_token_id=None)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    gist = tiny_gist("beacon", model=model, **APPEND)
    memory = gist.compress_ids([IDS[:40]])[0]
    session = gist.session()
    session.feed(IDS[:32])
    close(session.feed(IDS[32:36]), gist.logits(IDS[32:36], gist.compress_ids([IDS[:32]])))
    gist.save(tmp_path / family)
    same(load_compressor(tmp_path / family, device="cpu").compress_ids([IDS[:40]])[0], memory)


@pytest.mark.parametrize("method", ["beacon", "ultragist"])
def test_saving_and_loading_is_bit_exact(method, tokenizer, tmp_path):
    made = tiny_gist(method, tokenizer, ratio=(2, 8), ratio_mix="adapt-7", sink_size=3, projections=("k", "v"))
    made.save(tmp_path / "made")
    own = load_file(tmp_path / "made" / "compressor.safetensors")
    assert f"model.layers.1.self_attn.{method}_k_proj.weight" in own
    again = load_compressor(tmp_path / "made", device="cpu")
    assert type(again) is type(made)
    assert again.fingerprint == made.fingerprint
    assert (again.run_settings, again.format_settings) == (made.run_settings, made.format_settings)
    memory, other = made.compress_ids([IDS])[0], again.compress_ids([IDS])[0]
    assert torch.equal(memory.keys, other.keys)
    assert torch.equal(again.logits([8], [memory]), made.logits([8], [memory]))
    assert load_compressor(tmp_path / "made", device="cpu", ratio=4).fingerprint == made.fingerprint


@pytest.fixture
def published(tmp_path) -> Path:
    """A checkpoint as the authors publish it."""
    source = GOLDEN / "beacon-qwen2-interleave-r4"
    for name in ("config.json", "model.safetensors"):
        shutil.copy(source / name, tmp_path)
    return tmp_path


def test_missing_and_misshapen_gist_tensors_are_named(published):
    weights = load_file(published / "model.safetensors")
    name = "model.layers.0.self_attn.beacon_q_proj.bias"
    bias = weights.pop(name)
    save_file(weights, published / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks tensors of beacon: .*beacon_q_proj\.bias"):
        load_compressor(published)
    save_file({**weights, name: bias[:-1].clone()}, published / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"beacon_q_proj\.bias is \(63,\), not \(64,\)"):
        load_compressor(published)


def test_a_base_model_becomes_a_compressor_that_starts_from_its_own_weights(published):
    weights = {k: v for k, v in load_file(published / "model.safetensors").items() if "beacon" not in k}
    save_file(weights, published / "model.safetensors")
    config = json.loads((published / "config.json").read_text())
    kept = {key: value for key, value in config.items() if not key.startswith("beacon_")}
    (published / "config.json").write_text(json.dumps(kept))
    gist = load_compressor(published, method="beacon", device="cpu", window=32)
    own = gist.own_parameters()
    assert torch.equal(own["model.beacon_embed_tokens.weight"][0], weights["model.embed_tokens.weight"][2])
    assert torch.equal(
        own["model.layers.2.self_attn.beacon_v_proj.bias"], weights["model.layers.2.self_attn.v_proj.bias"]
    )


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("beacon", {"ratio": 17}, "cannot hold ratio 17"),
        ("beacon", {"ratio": (3, 5)}, "cannot hold ratio 3, 5"),
        ("beacon", {"ratio": -1}, "cannot hold ratio -1"),
        ("beacon", {"ratio": []}, "cannot hold"),
        ("beacon", {"ratio_mix": "often"}, "unknown ratio mix 'often'"),
        ("beacon", {"ratio_mix": "adapt-x"}, "unknown ratio mix"),
        ("beacon", {"attention": "some"}, "unknown attention 'some'"),
        ("beacon", {"placement": "prepend"}, "unknown placement"),
        ("beacon", {"projections": ("q", "w")}, "unknown projections 'w'"),
        ("beacon", {"attention": "step-expansion"}, "interleaved gist tokens cannot use step-expansion"),
        ("beacon", {"stride": 8}, "cannot move on by 8"),
        ("ultragist", {"placement": "interleave"}, "ultragist has no placement 'interleave'"),
        ("ultragist", {"stride": 17}, "cannot move on by 17"),
        ("ultragist", {"sink_size": -1}, "cannot be negative"),
        ("beacon", {"window": 2050}, "2050 tokens is 2 longer than the model's 2048 positions"),
    ],
)
def test_unusable_settings_are_refused(method, changes, message):
    with pytest.raises(InputError, match=message):
        tiny_gist(method, **changes)


def test_models_without_rotary_embedding_are_refused():
    with pytest.raises(InputError, match="OPTForCausalLM has no rotary embedding"):
        tiny_gist("beacon", model=tiny_model("opt"))


def test_a_kernel_without_masks_is_refused_where_one_is_needed():
    model = tiny_model().to("meta")  # the kernel itself is not at hand
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(InputError, match="step-expansion needs a mask, which flash_attention_2 does not take"):
        tiny_gist("ultragist", model=model)
    tiny_gist("beacon", model=model)


def test_ids_outside_the_vocabulary_are_refused_by_a_session():
    with pytest.raises(InputError, match="token id 400"):
        tiny_gist().session().feed([400])
    with pytest.raises(InputError, match="is empty"):
        tiny_gist().session().feed([])


def test_memories_beyond_the_positions_say_by_how_much():
    gist = tiny_gist(model=tiny_model(max_position_embeddings=32))
    memory = gist.compress_ids([IDS[:64]])[0]
    with pytest.raises(InputError, match="take 33 positions, 1 more than the model's 32"):
        gist.logits([5], [memory, memory])


def test_ratios_are_chosen_as_published():
    def draws(mix, count=12, tokens=90):
        choice = RatioChoice([2, 4, 8, 5], mix, 16, lambda ratio: 24 * ratio + 16)
        return [choice.draw(tokens) for _ in range(count)]

    assert draws("step-random") == [2, 8, 4, 4, 4, 8, 2, 8, 2, 2, 4, 8]
    assert draws("instance-random", 3) == [2, 2, 2]
    assert draws("sequence", 4) == [2, 4, 8, 2]
    assert draws("adapt-12", 2) == [4, 4]
    assert draws("adapt-12", 1, tokens=20) == [2]
    assert draws("adapt-12", 1, tokens=2000) == [8]


def test_documents_of_different_reach_get_their_own_ratio():
    gist = tiny_gist(model=tiny_model(max_position_embeddings=40), ratio=(2, 4), ratio_mix="adapt-0")
    short, long = gist.compress_ids([IDS[:32], IDS[:64].repeat(2)[:80]], batch_tokens=1000)
    assert (short.slots, long.slots) == (16, 20)


def test_training_reaches_every_gist_parameter():
    gist = tiny_gist("ultragist", projections=("q", "k", "v", "o", "mlp"))
    for parameter in gist.own_parameters().values():
        parameter.requires_grad_(True)
    memory = gist.compress_ids([IDS])[0]
    assert isinstance(memory, KVMemory)
    gist.logits([5, 6], [memory]).logsumexp(-1).sum().backward()
    last = {name for name in gist.own_parameters() if "layers.1" in name and name.split("_")[-2] in "qoupdown"}
    for name, parameter in gist.own_parameters().items():
        # What the last layer's queries find is read by nobody: a memory holds its keys and values only.
        if name not in last and not ("layers.1" in name and "mlp" in name):
            assert parameter.grad.abs().sum() > 0, name
    assert not any(module._forward_hooks for module in gist.model.modules())
