"""Folders in the authors' format and in ours become compressors; what cannot is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ctxdocs import CheckpointError, InputError, load_compressor
from ctxdocs.checkpoint_files import read_weights

from .conftest import tiny_autocompressor, tiny_ccm
from .published_samples import CONFIGS, STORAGE, made, write_ccm, write_checkpoint, write_llama

GOLDEN = Path(__file__).parent / "golden"
PUBLISHED = GOLDEN / "autocompressor-llama-explicit"


@pytest.fixture
def published(tmp_path) -> Path:
    """A checkpoint as the authors publish it: config, and weights with ``embed_summary.weight`` among them."""
    folder = tmp_path / "published"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(PUBLISHED / name, folder)
    return folder


def edit(path: Path, **changes) -> None:
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def weights_of(compressor):
    return dict(compressor.named_parameters())


def same_weights(a, b) -> bool:
    first, second = weights_of(a), weights_of(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("architecture", ["llama", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_and_loading_is_bit_exact(architecture, dtype, tokenizer, tmp_path):
    made = tiny_autocompressor(architecture, tokenizer, segment_tokens=17, accumulate_summary=False)
    made.save(tmp_path / "made")
    compressor = load_compressor(tmp_path / "made", device="cpu", dtype=dtype)
    compressor.save(tmp_path / "saved")
    again = load_compressor(tmp_path / "saved", device="cpu")
    assert same_weights(again, compressor)
    assert again.fingerprint == compressor.fingerprint
    assert again.backbone.dtype == dtype
    assert (again.segment_tokens, again.accumulate_summary, again.summary_length) == (17, False, 4)
    assert again.prompt_format == compressor.prompt_format
    assert again.tokenizer("Café")["input_ids"] == tokenizer("Café")["input_ids"]
    assert not again.training
    assert not any(parameter.requires_grad for parameter in again.parameters())
    memory = compressor.compress_ids([[5, 6, 7]])[0]
    assert torch.equal(again.logits([8], [memory]), compressor.logits([8], [memory]))


def test_settings_replace_those_of_the_checkpoint(tiny_checkpoint):
    assert load_compressor(tiny_checkpoint, segment_tokens=33).segment_tokens == 33
    with pytest.raises(InputError, match="no setting segment_length"):
        load_compressor(tiny_checkpoint, segment_length=33)


def test_dtype_may_be_chosen_and_is_part_of_the_identity(tiny_checkpoint):
    half = load_compressor(tiny_checkpoint, dtype="bfloat16")
    assert half.backbone.dtype == half.embed_summary.weight.dtype == torch.bfloat16
    assert half.fingerprint != load_compressor(tiny_checkpoint).fingerprint


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("kind", CONFIGS)
def test_every_published_format_is_read_from_one_file_and_from_shards(kind, storage, tmp_path):
    compressor = made(kind)
    folder = write_checkpoint(tmp_path / "published", kind, storage)
    assert ("model.safetensors" in {path.name for path in folder.iterdir()}) == (storage == "safetensors")
    loaded = load_compressor(folder, method=compressor.method, device="cpu")
    assert same_weights(loaded, compressor)
    assert loaded.format_settings == compressor.format_settings
    assert loaded.fingerprint == compressor.fingerprint
    ids = [list(range(20, 60)), [7, 8, 9]]
    for memory, other in zip(loaded.compress_ids(ids), compressor.compress_ids(ids), strict=True):
        torch.testing.assert_close(memory.tensors(), other.tensors())


@pytest.mark.parametrize("storage", STORAGE)
def test_an_adapters_base_may_be_in_an_old_format(storage, tmp_path):
    folder = write_ccm(tmp_path / "chat-online-concat_recur-ntok2", "concat_recur", 2)
    base = write_llama(tmp_path / "base", storage)
    assert "model.layers.1.self_attn.rotary_emb.inv_freq" in read_weights(base)
    compressor = tiny_ccm(lora_rank=4)
    loaded = load_compressor(folder, base_model=base, device="cpu")
    assert same_weights(loaded, compressor)
    assert loaded.fingerprint == compressor.fingerprint
    ids = list(range(20, 60))
    torch.testing.assert_close(loaded.compress_ids([ids])[0].keys, compressor.compress_ids([ids])[0].keys)


def test_of_a_table_with_too_many_rows_the_first_are_taken(tmp_path):
    base = write_llama(tmp_path / "base")
    exact, longer = (
        load_compressor(
            write_ccm(tmp_path / str(rows) / "chat-online-merge_recur-ntok2", "merge_recur", 2, rows=rows),
            base_model=base,
            device="cpu",
        )
        for rows in (0, 3)
    )
    assert exact.comp_embeddings.weight.shape == (4, 32)
    assert longer.fingerprint == exact.fingerprint


def test_a_tied_head_may_be_in_the_file_or_not(tmp_path):
    source = GOLDEN / "autocompressor-opt-fused"
    for name in ("config.json", "model.safetensors"):
        shutil.copy(source / name, tmp_path)
    without = load_compressor(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in weights
    weights["lm_head.weight"] = weights["model.decoder.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors")
    assert same_weights(load_compressor(tmp_path), without)


def test_a_bin_file_that_runs_code_is_refused(published, tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    (published / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Trap()}, published / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin cannot be read"):
        load_compressor(published)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.norm.weight"), r"lacks tensors of LlamaForCausalLM: model\.norm\.weight"),
        (lambda w: w.pop("embed_summary.weight"), r"lacks tensors of autocompressor: embed_summary\.weight"),
        (lambda w: w.update({"model.extra.weight": torch.zeros(2)}), r"no place for: model\.extra\.weight"),
        (lambda w: w.update({"model.norm.weight": torch.zeros(3)}), r"wrong shape: model\.norm\.weight is \(3,\), not"),
        (lambda w: w.update({"embed_summary.weight": torch.zeros(9, 64)}), r"embed_summary\.weight is \(9, 64\)"),
    ],
)
def test_missing_extra_and_misshapen_tensors_are_named(published, change, message):
    weights = load_file(published / "model.safetensors")
    change(weights)
    save_file(weights, published / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_compressor(published)


def test_folders_that_are_no_checkpoints(published, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint folder at"):
        load_compressor(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_compressor(tmp_path / "empty")
    (published / "model.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        load_compressor(published)
    (published / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_compressor(published)
    (published / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        load_compressor(published)


def test_a_plain_model_is_compressed_without_training_unless_a_method_is_named(published):
    weights = load_file(published / "model.safetensors")
    table = weights.pop("embed_summary.weight")
    save_file(weights, published / "model.safetensors")
    edit(published / "config.json", summary_length=None, accumulate_summary=None, architectures=["LlamaForCausalLM"])
    assert load_compressor(published).method == "kvzip"
    assert load_compressor(published, method="autocompressor").summary_length == 0
    save_file({**weights, "embed_summary.weight": table}, published / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"names no compression method.*no place for: embed_summary\.weight"):
        load_compressor(published)


def test_an_index_must_not_reach_outside_its_folder(published):
    (published / "model.safetensors").rename(published.parent / "stray.safetensors")
    (published / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": "../stray.safetensors"}})
    )
    with pytest.raises(CheckpointError, match="outside its folder"):
        load_compressor(published)


def test_a_hub_name_out_of_reach_says_so():
    with pytest.raises(CheckpointError, match="owner/no-such-model is not in the local cache"):
        load_compressor("owner/no-such-model")


def test_a_saved_folder_of_a_newer_format_is_refused(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "newer")
    edit(folder / "ctxdocs.json", format_version=99)
    with pytest.raises(CheckpointError, match="format version 99"):
        load_compressor(folder)
    (folder / "ctxdocs.json").write_text("[]")
    with pytest.raises(CheckpointError, match="is damaged"):
        load_compressor(folder)


@pytest.fixture
def adapter(tmp_path) -> Path:
    """A folder with a LoRA adapter alone; its base lies elsewhere."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in ("config.json", "adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(GOLDEN / "autocompressor-llama-lora" / name, folder)
    edit(folder / "adapter_config.json", base_model_name_or_path=None)
    return folder


def test_an_adapter_finds_its_base(adapter):
    base = GOLDEN / "autocompressor-llama-lora"
    with pytest.raises(CheckpointError, match="does not say of which model"):
        load_compressor(adapter)
    given = load_compressor(adapter, base_model=base)
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(base))
    assert same_weights(load_compressor(adapter), given)
    assert same_weights(load_compressor(base), given)
    # As older versions of peft saved it, or as a running model names its factors.
    tensors = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(
        {name.replace(".weight", ".default.weight"): t for name, t in tensors.items() if "lora" in name}
        | {name: t for name, t in tensors.items() if "lora" not in name},
        adapter / "adapter_model.bin",
    )
    assert same_weights(load_compressor(adapter), given)


def test_an_adapter_on_the_wrong_base_is_refused(adapter, tmp_path):
    wide = tiny_autocompressor(hidden_size=48)
    wide.save(tmp_path / "wide")
    with pytest.raises(CheckpointError, match="is this the adapter's base model"):
        load_compressor(adapter, base_model=tmp_path / "wide")
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_B" in name)
    del tensors[name]
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="only one of the two LoRA factors"):
        load_compressor(adapter, base_model=GOLDEN / "autocompressor-llama-lora")
