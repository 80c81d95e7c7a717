"""The files of a checkpoint folder: tensors in the formats they are published in, and configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxdocs.compressors.saving import OWN_TENSORS
from ctxdocs.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from ctxdocs.modeling.lora import Adapter

#: Where the weights of a model may be; the first one found is read.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
#: Marks a folder with a LoRA adapter.
ADAPTER_CONFIG = "adapter_config.json"

_MODEL_FILES = ("model.safetensors", "pytorch_model.bin")
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


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

    found = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise CheckpointError(f"{folder} holds no weights", f"expected one of {', '.join(WEIGHTS)}")
    if found.suffix == ".json":
        names = set(read_json(found).get("weight_map", {}).values())
        if unsafe := sorted(name for name in names if Path(name).name != name):
            raise CheckpointError(f"{found} names files outside its folder: {listed(unsafe)}")
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
            raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from error
    return weights


def read_adapter(folder: Path) -> Adapter:
    """Read a LoRA adapter. In a folder without a model's ``config.json`` its weights may be named like a model's."""
    import torch
    from safetensors.torch import load_file

    from ctxdocs.modeling.lora import Adapter

    alone = not (folder / "config.json").is_file()
    names = (*_ADAPTER_WEIGHTS, *(_MODEL_FILES if alone else ()))
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise CheckpointError(f"{folder} has {ADAPTER_CONFIG} but no adapter weights")
    config = read_json(folder / ADAPTER_CONFIG)
    try:
        if path.suffix == ".safetensors":
            return Adapter(folder.name, config, load_file(path))
        return Adapter(folder.name, config, torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # as in read_weights
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from error


def read_json(path: Path, *, may_lack: bool = False) -> dict[str, Any]:
    """Return the object in a JSON file; a file that ``may_lack`` is an empty one.

    Raises
    ------
    CheckpointError
        If the file cannot be read, or holds something else.
    """
    if may_lack and not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return values


def first_line(error: Exception) -> str:
    """Return an error's kind and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no details'}"


def listed(names: list[str], most: int = 8) -> str:
    """Return the first names in a line, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
