"""The self-check: it passes models that read memories as text, and fails every one that does not."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import transformers
from click.testing import CliRunner

from ctxdocs import InputError, Library, LibraryError
from ctxdocs.cli import main
from ctxdocs.compressors import kv, reading
from ctxdocs.compressors.base import Compressor
from ctxdocs.compressors.kv import KVCompressor
from ctxdocs.doctor import costs, examination, examine, examined
from ctxdocs.doctor.quality import distance
from ctxdocs.errors import ContextTooLong
from ctxdocs.modeling.rotary import rotate_keys

from .conftest import TEXT, FakeEmbedder, tiny_autocompressor, tiny_kv, tiny_model
from .test_blending import family
from .test_reading_kv import MODELS

SMALL = {"most": 2, "document_tokens": 24}
EXACT = ["cache", "logits", "tokens", "moved", "all of 2 blended"]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(examination, "COUNTS", (2, 3))
    monkeypatch.setattr(examination, "RATIOS", (2,))
    monkeypatch.setattr(costs, "_ROUNDS", 2)


def verdicts(report):
    return {check.name: check.verdict for check in report.checks}


def failing(report):
    assert report.to_dict()["verdict"] == "FAIL"
    return {check.name for check in report.failed}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in MODELS), ("qwen3-yarn", torch.bfloat16), ("phi3-partial", torch.bfloat16)],
    ids=str,
)
def test_models_that_read_memories_as_text_pass(name, dtype):
    report = examine(family(name, "kvzip", dtype=dtype), **SMALL)
    assert not report.failed, report.failed
    assert list(verdicts(report)) == ["model", *EXACT, "composed 2", "ratio 2", "size", "time"]
    assert all(verdicts(report)[name] == "ok" for name in EXACT)
    # With room to spare, so that no healthy model fails: what is allowed is twice what rounding was seen to move.
    values = {check.name: check.values for check in report.checks}
    assert values["logits"]["largest_difference"] <= 0.5 * values["logits"]["allowed"]
    assert max(values[name]["share_of_allowed"] for name in ("cache", "moved")) <= 0.5


def test_the_report_is_one_of_numbers_too():
    compressor = family("llama", "kvzip")
    report = json.loads(json.dumps(examine(compressor, most=3, document_tokens=24).to_dict()))
    values = {check["name"]: check for check in report["checks"]}
    assert values["model"]["documents"] == 3
    assert values["model"]["prefix_tokens"] == len(compressor.prefix_ids)
    assert 0 <= values["logits"]["largest_difference"] <= values["logits"]["allowed"] < 1e-3
    assert values["tokens"] == {**values["tokens"], "same": 32, "ties": 0, "wrong": 0}
    assert values["composed 3"]["blended"]["nats"] < values["composed 3"]["nats"]
    assert [row["documents"] for row in values["ratio 2"]["documents"]] == [2, 3]
    exact = compressor.compress_ids([list(range(24))], ratio=1)[0].nbytes / 24
    assert values["size"]["bytes_per_token"] == pytest.approx(exact)
    assert values["ratio 2"]["bytes_per_token"] < 0.6 * exact
    assert set(values["time"]["seconds"]) == {"text", "memories", "blended"}
    assert len(values["time"]["gain"]["rounds"]) == 2


def test_distances_are_those_of_the_distributions():
    logits, other = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0))
    wanted = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=logits), torch.distributions.Categorical(logits=other)
    ).mean()
    found = distance(other, logits)
    assert found.nats == pytest.approx(float(wanted), rel=1e-5)
    assert found.agreement == (logits.argmax(1) == other.argmax(1)).float().mean()
    assert (distance(logits, logits).nats, distance(logits, logits).agreement) == (0, 1)


# Sabotage, behind the back of the probe that a compressor was built with.


@DTYPES
def test_keys_that_are_placed_with_another_theta(monkeypatch, dtype):
    compressor = family("llama", "kvzip", dtype=dtype)
    other = tiny_model(
        hidden_size=32, num_hidden_layers=1, rope_parameters={"rope_type": "default", "rope_theta": 20000.0}
    )
    monkeypatch.setattr(reading, "rotate_keys", lambda model, keys, positions: rotate_keys(other, keys, positions))
    assert {"cache", "logits"} <= failing(examine(compressor, **SMALL))


@DTYPES
def test_layers_that_turn_by_another_theta_than_the_rotary_module(dtype):
    compressor = family("llama", "kvzip", dtype=dtype)
    other = tiny_model(rope_parameters={"rope_type": "default", "rope_theta": 20000.0}).model.rotary_emb

    def turn(module, inputs, options):
        places = options["position_ids"]
        return inputs, {**options, "position_embeddings": other(torch.empty(1, dtype=dtype), places)}

    for layer in compressor.backbone.layers:
        layer.self_attn.register_forward_pre_hook(turn, with_kwargs=True)
    report = examine(compressor, **SMALL)
    assert {"cache", "logits"} <= failing(report)
    assert "keys of layer" in next(check.message for check in report.failed)


def test_a_rotary_module_that_changed_for_all_is_no_fault():
    compressor = family("llama", "kvzip")
    compressor.model.model.rotary_emb.inv_freq.mul_(0.5)
    assert not examine(compressor, **SMALL).failed


CHANGES = {
    "keys' heads swapped": lambda memory: replace(memory, keys=memory.keys.flip(1)),
    "values' heads swapped in one layer": lambda memory: replace(
        memory, values=torch.cat([memory.values[:-1], memory.values[-1:].flip(1)])
    ),
    "positions off by one": lambda memory: replace(memory, positions=memory.positions + 1),
    "span off by one": lambda memory: replace(memory, span=memory.span + 1),
    "layers swapped": lambda memory: replace(memory, keys=memory.keys.flip(0), values=memory.values.flip(0)),
    "one slot lost": lambda memory: replace(
        memory, keys=memory.keys[:, :, 1:], values=memory.values[:, :, 1:], positions=memory.positions[1:]
    ),
    "no numbers": lambda memory: replace(memory, keys=memory.keys * torch.nan),
}


@DTYPES
@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_memories_that_are_not_what_the_model_computes(monkeypatch, change, dtype):
    compressor = family("qwen3", "kvzip", dtype=dtype)
    everything = KVCompressor.everything
    monkeypatch.setattr(KVCompressor, "everything", lambda *args: [change(memory) for memory in everything(*args)])
    assert failing(examine(compressor, most=1, document_tokens=24)) & set(EXACT)


@DTYPES
def test_keys_that_were_kept_after_the_rotary_embedding(monkeypatch, dtype):
    compressor = family("llama", "kvzip", dtype=dtype)
    everything = KVCompressor.everything

    def rotated(self, memory):
        return replace(memory, keys=rotate_keys(self.model, memory.keys, memory.positions))

    monkeypatch.setattr(KVCompressor, "everything", lambda self, r: [rotated(self, m) for m in everything(self, r)])
    assert {"cache", "logits"} <= failing(examine(compressor, most=1, document_tokens=24))


@DTYPES
def test_a_key_norm_that_is_applied_behind_the_cache(dtype):
    """What the norm puts out is recorded as the keys, but the cache holds what goes into it."""
    compressor = family("qwen3", "kvzip", dtype=dtype)
    sdpa = transformers.AttentionInterface()["sdpa"]

    def attend(module, query, key, value, mask, **options):
        normed = module.late_norm(key.transpose(1, 2)).transpose(1, 2)
        return sdpa(module, query, normed, value, mask, **options)

    def without_norm(attention, forward):
        norm, nothing = attention.k_norm, torch.nn.Identity()
        torch.nn.init.uniform_(norm.weight, 0.5, 2)
        attention.late_norm = norm

        def run(*args, **options):
            attention.k_norm = nothing
            try:
                return forward(*args, **options)
            finally:
                attention.k_norm = norm

        return run

    transformers.AttentionInterface.register("late", attend)
    transformers.AttentionMaskInterface.register("late", transformers.AttentionMaskInterface()["sdpa"])
    compressor.model.config._attn_implementation = "late"
    for layer in compressor.backbone.layers:
        layer.self_attn.forward = without_norm(layer.self_attn, layer.self_attn.forward)
    report = examine(compressor, **SMALL)
    assert {"cache", "logits"} <= failing(report)
    assert report.checks[-1].name == "rest"
    with pytest.raises(InputError, match="caches something else than its key and value projections"):
        tiny_kv(model=compressor.model)


@DTYPES
def test_keys_that_are_placed_wrongly_from_some_position_on(monkeypatch, dtype):
    """Each memory alone is read as its text, but not where another one stands in front."""
    compressor = family("llama", "kvzip", dtype=dtype)
    monkeypatch.setattr(
        reading,
        "rotate_keys",
        lambda model, keys, positions: rotate_keys(model, keys, positions - (positions > 40).long()),
    )
    assert failing(examine(compressor, **SMALL)) == {"moved"}


@DTYPES
def test_steps_at_the_wrong_positions(monkeypatch, dtype):
    """The memory is right, and so are the logits behind it; what is generated is not."""
    compressor = family("mistral", "kvzip", dtype=dtype)
    step = Compressor.step

    def ahead(self, ids, state):
        state.next_position = state.next_position + 40
        try:
            return step(self, ids, state)
        finally:
            state.next_position = state.next_position - 40

    monkeypatch.setattr(Compressor, "step", ahead)
    assert failing(examine(compressor, most=1, document_tokens=24)) == {"tokens"}


def test_blending_that_forgets_a_document(monkeypatch):
    compressor = family("llama", "kvzip")
    blended = kv.blended
    monkeypatch.setattr(kv, "blended", lambda self, prompt, documents, share: blended(self, prompt, documents, 0.01))
    assert failing(examine(compressor, **SMALL)) == {"all of 2 blended"}


def test_weights_that_changed_by_a_ten_thousandth(monkeypatch):
    """In float32 the check is sharp: a memory of another model, however near, is not exact."""
    compressor = family("llama", "kvzip")
    near = family("llama", "kvzip")
    near.backbone.layers[2].self_attn.k_proj.weight.data.mul_(1.0001)
    monkeypatch.setattr(compressor, "read", near.read)
    assert {"cache", "logits"} <= failing(examine(compressor, most=1, document_tokens=24))


def test_a_model_whose_logits_are_no_numbers():
    compressor = family("llama", "kvzip")
    compressor.model.lm_head.weight.data[5] = torch.nan
    assert "logits" in failing(examine(compressor, most=1, document_tokens=24))


# What it is examined on.


def test_what_does_not_fit_is_left_out_and_said():
    compressor = tiny_kv("kvzip", model=tiny_model(max_position_embeddings=110), prefix=[3, 9])
    report = examine(compressor, most=8, document_tokens=24)
    first = report.checks[0]
    assert (first.verdict, first.values["documents"]) == ("note", 2)
    assert "8 were wanted, no more than 2 fit the model's 110 positions" in first.message
    assert "composed 2" in verdicts(report)
    assert "composed 3" not in verdicts(report)
    with pytest.raises(ContextTooLong, match=r"--document-tokens"):
        examine(compressor, document_tokens=100)


def test_ratios_that_cannot_be_measured_are_a_note():
    request = {"first": [5] * 70, "next": [5] * 70, "suffix": []}
    compressor = tiny_kv("kvzip", model=tiny_model(max_position_embeddings=110), request=request)
    check = next(check for check in examine(compressor, **SMALL).checks if check.name == "ratio 2")
    assert check.verdict == "note"
    assert "not measured: a document and its repetition take" in check.message


def test_kernels_that_take_no_mask_are_examined_without_blending(monkeypatch):
    from ctxdocs.modeling import attention_layers

    monkeypatch.setattr(attention_layers, "_MASKABLE", ())
    report = examine(family("llama", "kvzip"), **SMALL)
    assert not report.failed
    values = {check.name: check.values for check in report.checks}
    assert values["composed 2"]["blended"] is None
    assert "blended" not in values["time"]["seconds"]


@pytest.mark.parametrize("method", ["kv", "snapkv", "streaming"])
def test_other_methods_without_training_are_examined_too(method, tokenizer):
    report = examine(tiny_kv(method, tokenizer), [TEXT, TEXT[::-1], "Short."], **SMALL)
    assert not report.failed
    assert ("ratio 2" in verdicts(report)) == (method != "kv")
    assert "the given texts" in report.checks[0].message


def test_one_text_is_enough_and_none_is_not(tokenizer):
    compressor = tiny_kv("kvzip", tokenizer)
    report = examine(compressor, [TEXT])
    assert report.checks[0].values["documents"] == 1
    assert not report.failed
    with pytest.raises(InputError, match="too little text"):
        examine(compressor, [""])
    with pytest.raises(InputError, match="documents come in a list, got str"):
        examine(compressor, TEXT)
    with pytest.raises(InputError, match="documents are strings, got int"):
        examine(compressor, [TEXT, 5])
    with pytest.raises(InputError, match="no tokenizer to read texts with"):
        examine(tiny_kv("kvzip"), [TEXT])


def test_wrong_arguments(tokenizer):
    with pytest.raises(InputError, match="autocompressor has memories that no prefill"):
        examine(tiny_autocompressor(tokenizer=tokenizer))
    for wrong in ({"most": 0}, {"document_tokens": 0}, {"most": 2.5}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            examine(tiny_kv("kvzip"), **wrong)


# The command line.


@pytest.fixture
def plain(tokenizer, tmp_path):
    tiny_model(num_hidden_layers=3).save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def run(*arguments, code=0):
    result = CliRunner().invoke(main, ["doctor", "--document-tokens", "24", "--documents", "2", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def test_the_command_prints_a_line_for_each_check(plain):
    lines = run("--model", plain).stdout.splitlines()
    assert [line[:4].strip() for line in lines[1:5]] == ["ok"] * 4
    assert lines[0].startswith(
        "ok    model             llama of 3 layers, float32, cpu; 2 documents of up to 24 tokens"
    )
    values = json.loads(run("--model", plain, "--json", "--dtype", "bfloat16").stdout)
    assert (values["verdict"], values["base_of"]) == ("ok", None)
    assert values["checks"][0]["dtype"] == "bfloat16"


def test_a_failed_check_is_the_exit_code(plain, monkeypatch):
    everything, change = KVCompressor.everything, CHANGES["keys' heads swapped"]
    monkeypatch.setattr(KVCompressor, "everything", lambda *args: [change(memory) for memory in everything(*args)])
    result = run("--model", plain, code=1)
    assert "FAIL  cache             keys of layer" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("FAIL: cache, logits")
    assert json.loads(run("--model", plain, "--json", code=1).stdout)["verdict"] == "FAIL"


def test_a_library_is_examined_on_its_chunks(plain, tmp_path, corpus):
    from ctxdocs import load_compressor

    made = load_compressor(plain, method="kv", prefix=[7, 8])
    library = Library.create(tmp_path / "l", made, FakeEmbedder(), chunk_tokens=32, overlap_tokens=4)
    library.add(corpus)
    values = json.loads(run("--library", tmp_path / "l", "--json").stdout)
    assert (values["checks"][0]["method"], values["checks"][0]["prefix_tokens"]) == ("kvzip", 2)
    assert str(tmp_path / "l") in values["checks"][0]["source"]
    (tmp_path / "empty").mkdir()
    empty = Library.create(tmp_path / "empty", made, FakeEmbedder())
    with pytest.raises(InputError, match="too little text"):
        examine(made, empty)


def test_the_base_of_a_trained_method_is_examined(tiny_checkpoint, tmp_path, corpus):
    result = run("--model", tiny_checkpoint)
    assert result.stdout.startswith("autocompressor is trained")
    library = Library.create(tmp_path / "l", tiny_checkpoint, FakeEmbedder(), chunk_tokens=32, overlap_tokens=4)
    library.add(corpus)
    values = json.loads(run("--library", tmp_path / "l", "--json").stdout)
    assert values["base_of"] == "autocompressor"
    library = Library.create(
        tmp_path / "m", tiny_autocompressor(tokenizer=library.compressor.tokenizer), FakeEmbedder()
    )
    with pytest.raises(LibraryError, match="does not say where its compressor is"):
        examined(None, library)


def test_models_that_are_refused_say_why(tmp_path, tokenizer):
    tiny_model("opt").save_pretrained(tmp_path / "opt")
    tokenizer.save_pretrained(tmp_path / "opt")
    result = run("--model", tmp_path / "opt", code=1)
    assert "OPTForCausalLM has no rotary embedding" in result.stderr
    result = run("--library", tmp_path / "nothing", code=1)
    assert "there is no library" in result.stderr
