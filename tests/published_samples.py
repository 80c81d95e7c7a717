"""Tiny checkpoints with random weights, laid out file for file as the authors publish theirs, and a hub to hold them.

The configurations have the keys that the published ones have, in the order of years they were written in; only widths,
depths and vocabulary are small.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .conftest import tiny_autocompressor, tiny_ccm, tiny_gist, tiny_model, tiny_rcc

STORAGE = ("safetensors", "sharded safetensors", "bin", "sharded bin")

_SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 400}
_LLAMA = {
    **_SIZES,
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "intermediate_size": 64,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
}
_MISTRAL = {
    **{key: value for key, value in _LLAMA.items() if key not in ("pretraining_tp", "rope_scaling")},
    "architectures": ["MistralForCausalLM"],
    "attention_dropout": 0.0,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "sliding_window": None,
}
_QWEN = {
    **_MISTRAL,
    "architectures": ["Qwen2ForCausalLM"],
    "max_window_layers": 28,
    "model_type": "qwen2",
    "sliding_window": 131072,
    "use_sliding_window": False,
}
_OPT = {
    **_SIZES,
    "_remove_final_layer_norm": False,
    "activation_dropout": 0.0,
    "activation_function": "relu",
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "do_layer_norm_before": True,
    "dropout": 0.1,
    "enable_bias": True,
    "eos_token_id": 2,
    "ffn_dim": 64,
    "init_std": 0.02,
    "layer_norm_elementwise_affine": True,
    "layerdrop": 0.0,
    "max_position_embeddings": 2048,
    "model_type": "opt",
    "pad_token_id": 1,
    "prefix": "</s>",
    "torch_dtype": "float32",
    "transformers_version": "4.28.1",
    "use_cache": True,
    "word_embed_proj_dim": 16,
}
_NEOX = {
    **_SIZES,
    "architectures": ["GPTNeoXForCausalLM"],
    "bos_token_id": 0,
    "classifier_dropout": 0.1,
    "eos_token_id": 0,
    "hidden_act": "gelu",
    "initializer_range": 0.02,
    "intermediate_size": 64,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neox",
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.40.2",
    "use_cache": True,
    "use_parallel_residual": True,
}
_SUMMARIES = {"accumulate_summary": True, "segment_gradient_checkpointing": True, "summary_length": 50}
_RATIOS = [2, 4, 8, 16, 32]


def _gist_keys(prefix: str, code: str, attention: str, window: int, letters: str, **more: Any) -> dict[str, Any]:
    """Return the gist methods' part of ``config.json``, with the code that must not run."""
    keys = {"attn": attention, "embed_init": "eos", "param": list(letters), "ratio": _RATIOS}
    keys |= {"stride": window, "window": window, **more}
    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}[code]
    auto = {
        "AutoConfig": f"configuration_{code}.{name}Config",
        "AutoModelForCausalLM": f"modeling_{code}.{name}ForCausalLM",
    }
    return {"auto_map": auto, **{f"{prefix}_{key}": value for key, value in keys.items()}}


_BEACON = {"attend_prev": True, "parallel_window": 1, "pos": "interleave", "ratio_mix": "step-random", "sink_size": 0}
_ULTRAGIST = {"ratio_mix": "adapt-1024", "sink_size": 1}

#: Configurations by kind of checkpoint.
CONFIGS: dict[str, dict[str, Any]] = {
    "autocompressor-llama": {**_LLAMA, **_SUMMARIES, "architectures": ["LlamaAutoCompressorModel"]},
    "autocompressor-opt": {**_OPT, **_SUMMARIES, "architectures": ["AutoCompressorModel"]},
    "rmt-opt": {**_OPT, **_SUMMARIES, "accumulate_summary": False, "architectures": ["AutoCompressorModel"]},
    "full-attention-opt": {
        **_OPT,
        "accumulate_summary": True,
        "architectures": ["AutoCompressorModel"],
        "max_position_embeddings": 4096,
        "summary_length": 0,
    },
    "full-attention-llama": _LLAMA,
    "beacon-qwen2": {**_QWEN, **_gist_keys("beacon", "qwen2", "full-coverage", 2048, "qkv", **_BEACON)},
    "beacon-llama": {**_LLAMA, **_gist_keys("beacon", "llama", "full-coverage", 1024, "qkv", **_BEACON)},
    "ultragist-llama": {
        **_LLAMA,
        **_gist_keys("ultragist", "llama", "step-expansion", 1024, "qkvo", attend_prev=True, **_ULTRAGIST),
    },
    "ultragist-mistral": {
        **_MISTRAL,
        **_gist_keys("ultragist", "mistral", "step-expansion", 2048, "qkvo", attend_prev=False, **_ULTRAGIST),
    },
    "rcc": _NEOX,
}


def made(kind: str):
    """Make the compressor that a checkpoint of this kind holds."""
    config = CONFIGS[kind]
    positions = config["max_position_embeddings"]
    if kind == "rcc":
        return tiny_rcc(ratio=32, window=2048)
    family, _, architecture = kind.rpartition("-")
    if family in ("beacon", "ultragist"):
        names = {"sink_size": "sink_size", "attend_prev": "attend_prev", "ratio_mix": "ratio_mix", "window": "window"}
        settings = {name: config[f"{family}_{key}"] for name, key in names.items()}
        model = _qwen2() if architecture == "qwen2" else tiny_model(architecture, max_position_embeddings=positions)
        return tiny_gist(family, model=model, ratio=config[f"{family}_ratio"], **settings)
    return tiny_autocompressor(
        architecture,
        summary_length=config.get("summary_length", 0),
        accumulate_summary=config.get("accumulate_summary", False),
        max_position_embeddings=positions,
    )


def _qwen2():
    """Build a model whose query, key and value projections have biases."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config.from_dict({**CONFIGS["beacon-qwen2"], "torch_dtype": None})).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def published_tensors(kind: str, compressor) -> dict[str, Tensor]:
    """Return a compressor's tensors under the names of its published checkpoint."""
    tensors = {name: tensor.clone() for name, tensor in compressor.model.state_dict().items()}
    if kind.endswith("opt"):
        tensors["lm_head.weight"] = tensors["model.decoder.embed_tokens.weight"]
    if kind == "rcc":
        tensors["embed_out.weight"] = tensors.pop("lm_head.weight")
        unused = torch.zeros_like(tensors["embed_out.weight"])
        tensors |= {"gpt_neox.embed_out.weight": unused, "gpt_neox.rcc_encoder.embed_out.weight": unused.clone()}
    own = {name: parameter.data.clone() for name, parameter in compressor.own_parameters().items() if len(parameter)}
    return tensors | own


def write_checkpoint(folder: Path, kind: str, storage: str = "safetensors", **changes: Any) -> Path:
    """Write a whole model; ``changes`` are to its configuration."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**CONFIGS[kind], **changes}))
    (folder / "generation_config.json").write_text(json.dumps({"_from_model_config": True, "eos_token_id": 2}))
    write_weights(folder, published_tensors(kind, made(kind)), storage)
    return folder


def write_weights(folder: Path, tensors: Mapping[str, Tensor], storage: str) -> None:
    """Write tensors in one file or two, as either format does it: safetensors leave out a tied head."""
    if "bin" not in storage:
        tensors = {name: t for name, t in tensors.items() if name != "lm_head.weight" or not _shared(t, tensors)}
    stem, suffix = ("pytorch_model", ".bin") if "bin" in storage else ("model", ".safetensors")
    names, parts = sorted(tensors), {f"{stem}{suffix}": slice(None)}
    if "sharded" in storage:
        parts = {f"{stem}-0000{i + 1}-of-00002{suffix}": slice(i, None, 2) for i in range(2)}
        index = {name: file for file, part in parts.items() for name in names[part]}
        total = sum(tensor.nbytes for tensor in tensors.values())
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
        (folder / f"{stem}{suffix}.index.json").write_text(text)
    for file, part in parts.items():
        own = {name: tensors[name] for name in names[part]}
        if suffix == ".bin":
            torch.save(own, folder / file)
        else:
            save_file(own, folder / file, metadata={"format": "pt"})


def _shared(tensor: Tensor, tensors: Mapping[str, Tensor]) -> bool:
    return sum(other.data_ptr() == tensor.data_ptr() for other in tensors.values()) > 1


# CCM: a LoRA adapter in a folder whose name says what its files do not, on top of a base in an old format.


def write_llama(folder: Path, storage: str = "sharded bin", **changes: Any) -> Path:
    """Write a Llama as transformers 4.29 saved it, with the buffers of its rotary embeddings."""
    model = tiny_model(max_position_embeddings=2048)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    folder.mkdir(parents=True)
    config = {**_LLAMA, "max_position_embeddings": 2048, "transformers_version": "4.29.2", **changes}
    (folder / "config.json").write_text(json.dumps(config))
    write_weights(folder, tensors, storage)
    return folder


def write_ccm(folder: Path, attn_type: str, slots: int, *, rows: int = 0, base: str | None = "/data/llama-7b") -> Path:
    """Write an adapter, and the LoRA it was trained on top of one folder up, if its name has one.

    ``rows`` are embeddings beyond those in use; ``base`` is a path on the authors' machine.
    """
    compressor = tiny_ccm(attn_type=attn_type, num_comp_tokens=slots, lora_rank=4, max_position_embeddings=2048)
    tensors = {ccm_name(name): parameter.data for name, parameter in compressor.own_parameters().items()}
    table = ccm_name("comp_embeddings.weight")
    tensors[table] = torch.cat([tensors[table], torch.full((rows, 32), 9.0)])
    _write_lora(folder, tensors, base)
    if "-no-online" in folder.name:
        stage = {name: tensor for name, tensor in tensors.items() if "lora" in name}
        _write_lora(folder.parent / "llama-7b-no", stage, base)
    return folder


def ccm_name(name: str) -> str:
    """Return what the authors call one of our tensors."""
    if name.startswith("comp_embeddings"):
        return f"base_model.model.model.embed_tokens.{name}"
    _, layer, factor = name.split(".", 2)
    return f"base_model.model.model.layers.{layer}.self_attn.{factor}"


def _write_lora(folder: Path, tensors: Mapping[str, Tensor], base: str | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 4,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    torch.save(dict(tensors), folder / "pytorch_model.bin")


class FakeHub:
    """What ``huggingface_hub.snapshot_download`` is replaced by: repositories in a folder, and ways to fail.

    Parameters
    ----------
    home : pathlib.Path
        Where repositories and the cache go.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.failures: dict[str, Exception] = {}
        #: Names in the order they were asked for.
        self.asked: list[str] = []

    def repository(self, name: str) -> Path:
        """Return the folder of a repository."""
        return self.home / "repositories" / name

    def snapshot(self, name: str) -> Path:
        """Return the folder in the cache."""
        return self.home / "cache" / f"models--{name.replace('/', '--')}" / "snapshots" / "0"

    def __call__(self, name: str, *, allow_patterns: Iterable[str], ignore_patterns: Iterable[str]) -> str:
        from huggingface_hub.utils import filter_repo_objects

        self.asked.append(name)
        if name in self.failures:
            raise self.failures[name]
        source, target = self.repository(name), self.snapshot(name)
        if not source.is_dir():
            raise hub_error("RepositoryNotFoundError")
        target.mkdir(parents=True, exist_ok=True)
        files = [str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()]
        for file in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / file, target / file)
        return str(target)


def hub_error(kind: str) -> Exception:
    """Return an error as the hub's client raises it."""
    from huggingface_hub import errors

    if kind == "LocalEntryNotFoundError":
        return errors.LocalEntryNotFoundError("outgoing traffic has been disabled")
    return getattr(errors, kind)("403 Client Error", response=SimpleNamespace(headers={}, request=None))
