"""A published checkpoint, a saved one or the bundled one becomes the right compressor."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxdocs.compressors import METHODS, compressor_class
from ctxdocs.compressors.saving import ENCODER_CONFIG, OWN_TENSORS, read_card
from ctxdocs.errors import CheckpointError, InputError
from ctxdocs.prompts import PromptFormat
from ctxdocs.published import BUNDLED, bundled_path
from ctxdocs.quiet import quiet_transformers

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ctxdocs.compressors.base import Compressor
    from ctxdocs.modeling.lora import Adapter

_MODEL_FILES = ("model.safetensors", "pytorch_model.bin")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_PLACES: tuple[str, ...] = ("base_model", "finetune")
_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def load_compressor(
    name_or_path: str | os.PathLike[str] | None = None,
    method: str | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    attn_implementation: str = "auto",
    **settings: Any,
) -> Compressor:
    """Load a compressor, in evaluation mode and with gradients off.

    Parameters
    ----------
    name_or_path : str or path, optional
        A folder in the authors' checkpoint format or saved by :meth:`Compressor.save`, or a name on the Hugging Face
        hub. None, or ``"bundled"``, is the small model that comes with the package.
    method : str, optional
        Method of the checkpoint; found from its configuration when left out.
    device : str or torch.device
        ``"auto"`` is the first CUDA device, or the CPU.
    dtype : str or torch.dtype
        ``"auto"`` is the dtype the checkpoint was saved in. A name like ``"bfloat16"`` works too.
    attn_implementation : str
        ``"auto"`` lets transformers choose; ``"sdpa"``, ``"eager"``, ``"flash_attention_2"`` force one.
    **settings
        The method's run settings, for example ``segment_tokens=512``; they replace what the checkpoint says. For a
        LoRA adapter without its base beside it, ``base_model`` names the base; where it was trained on top of another
        adapter, ``finetune`` names that one, which is merged into the base first.

    Returns
    -------
    Compressor
        Ready to compress and to read.

    Raises
    ------
    CheckpointError
        If there is no checkpoint there, it is incomplete, or its method cannot be told.
    InputError
        If the device cannot be used, or the method does not have a setting.
    """
    name_or_path = BUNDLED if name_or_path is None else str(name_or_path)
    device = _device(device)
    folder = _folder(bundled_path() if name_or_path == BUNDLED else name_or_path)
    card = read_card(folder)
    told = {name: settings.pop(name, None) for name in _PLACES}
    places = {name: _place(where) for name, where in told.items() if where is not None}
    base = _base_folder(folder, places.get("base_model"))
    config = {**_read_json(base / "config.json"), **_read_json(folder / "config.json", may_lack=base != folder)}
    if (folder / ENCODER_CONFIG).is_file():
        config["encoder_config"] = _read_json(folder / ENCODER_CONFIG)
    adapter = _read_adapter(folder) if (folder / _ADAPTER_CONFIG).is_file() else None
    method = method or (card["method"] if card else _detect(config, adapter, folder))
    cls = compressor_class(method)
    if adapter:
        config.update(cls.adapter_settings(adapter))
    finetune = places.get("finetune") or _beside(folder, config.get("finetune"))
    run_settings = _settings(cls, {**(card["settings"] if card else {}), **settings})
    weights = read_weights(base)
    own_names = cls.own_tensors(config)
    own = {name: weights.pop(name) for name in own_names & weights.keys()}
    for name in cls.unused_tensors(config):
        weights.pop(name, None)
    model = _build_model(base, weights, dtype, attn_implementation)
    if finetune:
        _read_adapter(_folder(finetune)).merge_into(model)
    if adapter:
        own.update(cls.adapter_tensors(model, adapter, own_names))
    if missing := sorted(own_names - own.keys()):
        raise CheckpointError(f"{folder} lacks tensors of {method}: {_listed(missing)}")
    compressor = cls.build(
        model.to(device),  # type: ignore[arg-type]
        _load_tokenizer(folder) or _load_tokenizer(base),
        config,
        own,
        prompt_format=PromptFormat.from_dict(card["prompt_format"]) if card else None,
        **run_settings,
    )
    compressor.name_or_path = name_or_path if name_or_path == BUNDLED else _place(name_or_path)
    compressor.base_places = places
    compressor.requires_grad_(False)
    return compressor.eval()


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of a checkpoint by name, mapped from its files and not yet read.

    One file or shards, safetensors or ``.bin`` (loaded with ``weights_only``); where both are there, safetensors.

    Raises
    ------
    CheckpointError
        If there are no weights, or a shard that the index names is missing or damaged.
    """
    import torch
    from safetensors.torch import load_file

    found = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise CheckpointError(f"{folder} holds no weights", f"expected one of {', '.join(_WEIGHTS)}")
    if found.suffix == ".json":
        names = set(_read_json(found).get("weight_map", {}).values())
        if unsafe := sorted(name for name in names if Path(name).name != name):
            raise CheckpointError(f"{found} names files outside its folder: {_listed(unsafe)}")
        files = [folder / name for name in sorted(names)]
    else:
        files = [found]
    if (folder / OWN_TENSORS).is_file():
        files.append(folder / OWN_TENSORS)
    weights: dict[str, Tensor] = {}
    for path in files:
        try:
            if path.suffix == ".safetensors":
                weights.update(load_file(path))
            else:
                weights.update(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
        except Exception as error:  # each reader raises kinds of its own; every one means a file that cannot be read
            raise CheckpointError(f"{path} cannot be read: {_first_line(error)}") from error
    return weights


def _place(name_or_path: str | os.PathLike[str]) -> str:
    """Return a hub name as it is, and a folder as an absolute path: good for finding it again."""
    path = Path(name_or_path).expanduser()
    return str(path.resolve()) if path.is_dir() else str(name_or_path)


def _base_folder(folder: Path, base_model: str | os.PathLike[str] | None) -> Path:
    """Where the base model lies: beside the adapter, where the caller says, or where the adapter says."""
    is_model = (folder / "config.json").is_file() and any((folder / name).is_file() for name in _WEIGHTS)
    if is_model or not (folder / _ADAPTER_CONFIG).is_file():
        return folder
    named = base_model or _read_json(folder / _ADAPTER_CONFIG).get("base_model_name_or_path")
    if not named:
        raise CheckpointError(f"{folder} is an adapter and does not say of which model", "pass base_model=...")
    return _folder(named)


def _folder(name_or_path: str | os.PathLike[str]) -> Path:
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if not any((path / name).is_file() for name in ("config.json", _ADAPTER_CONFIG)):
            raise CheckpointError(f"{path} is no checkpoint: it has no config.json", "give a model folder")
        return path
    name = str(name_or_path)
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(
            f"there is no checkpoint folder at {path}", "check the path, or give a hub name owner/model"
        )
    return _download(name)


def _download(name: str) -> Path:
    """Fetch a checkpoint from the hub into its local cache; only weights, configuration and tokenizer."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    patterns = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except GatedRepoError as error:
        raise CheckpointError(
            f"{name} is gated on the hub", "accept its licence there, then run: hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"there is no model {name} on the hub, nor a folder of that name") from error
    except HFValidationError as error:
        raise CheckpointError(f"{name!r} is neither a folder nor a valid hub name") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"{name} is not in the local cache and could not be downloaded",
            "check the network, or give the path of a local copy",
        ) from error


def _detect(config: Mapping[str, Any], adapter: Adapter | None, folder: Path) -> str:
    for method in METHODS:
        cls = compressor_class(method)
        if cls.recognises({**config, **(cls.adapter_settings(adapter) if adapter else {})}):
            return method
    raise CheckpointError(
        f"{folder} is a model, but its config.json names no compression method",
        f"pass method=..., one of: {', '.join(METHODS)}",
    )


def _settings(cls: type[Compressor], settings: dict[str, Any]) -> dict[str, Any]:
    """Refuse settings the method does not have, by name."""
    parameters = inspect.signature(cls.__init__).parameters.values()
    known = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY} - {"prompt_format"}
    if unknown := sorted(settings.keys() - known):
        raise InputError(f"{cls.method} has no setting {_listed(unknown)}", f"it has: {', '.join(sorted(known))}")
    return settings


def _build_model(
    folder: Path, weights: dict[str, Tensor], dtype: str | torch.dtype, attn_implementation: str
) -> PreTrainedModel:
    """Build the stock transformers model that ``config.json`` names and fill it; every tensor must find its place."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, GenerationConfig

    options: dict[str, Any] = {} if attn_implementation == "auto" else {"attn_implementation": attn_implementation}
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        with quiet_transformers():
            model, info = model_class.from_pretrained(
                None,
                config=config,
                state_dict=weights,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many kinds; each means that this folder cannot be loaded
        raise CheckpointError(f"{folder} could not be loaded: {_first_line(error)}") from error
    name = type(model).__name__
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(f"{folder} lacks tensors of {name}: {_listed(missing)}")
    if mismatched := info["mismatched_keys"]:
        shapes = [f"{key} is {tuple(found)}, not {tuple(wanted)}" for key, found, wanted in sorted(mismatched)]
        raise CheckpointError(f"{folder} holds tensors of the wrong shape: {_listed(shapes)}")
    if unexpected := sorted(info["unexpected_keys"]):
        raise CheckpointError(
            f"{folder} holds tensors that {name} has no place for: {_listed(unexpected)}",
            "another method, or another version of the model?",
        )
    return model


def _read_adapter(folder: Path) -> Adapter:
    """Read a LoRA adapter. In a folder without a model's ``config.json`` its weights may be named like a model's."""
    import torch
    from safetensors.torch import load_file

    from ctxdocs.modeling.lora import Adapter

    alone = not (folder / "config.json").is_file()
    names = (*_ADAPTER_WEIGHTS, *(_MODEL_FILES if alone else ()))
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise CheckpointError(f"{folder} has {_ADAPTER_CONFIG} but no adapter weights")
    config = _read_json(folder / _ADAPTER_CONFIG)
    try:
        if path.suffix == ".safetensors":
            return Adapter(folder.name, config, load_file(path))
        return Adapter(folder.name, config, torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # as in read_weights
        raise CheckpointError(f"{path} cannot be read: {_first_line(error)}") from error


def _beside(folder: Path, name: str | None) -> Path | None:
    """Find the adapter that the one in ``folder`` was trained on top of, as published: beside it, or one level up."""
    if name is None:
        return None
    found = next((parent / name for parent in folder.resolve().parents[:2] if (parent / name).is_dir()), None)
    if found is None:
        raise CheckpointError(
            f"{folder} was trained on top of the LoRA adapter {name}, which is not beside it", "pass finetune=..."
        )
    return found


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # as above
        raise CheckpointError(f"the tokenizer in {folder} could not be loaded: {_first_line(error)}") from error


def _device(device: str | torch.device) -> str | torch.device:
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either, by device
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise InputError(f"device {str(device)!r} cannot be used: {reason}", "try the device cpu") from error
    return device


def _read_json(path: Path, *, may_lack: bool = False) -> dict[str, Any]:
    if may_lack and not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {_first_line(error)}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return values


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no details'}"


def _listed(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
