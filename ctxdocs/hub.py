"""Checkpoints on the Hugging Face hub: fetched into the local cache, or looked up there."""

from __future__ import annotations

import json
from pathlib import Path

from ctxdocs.errors import CheckpointError

_TOKENIZER = ("*.json", "*.model", "*.txt", "*.jinja")
_SAFE = ("*.safetensors",)
_BIN = ("pytorch_model*.bin", "adapter_model.bin")
# Nothing in a subfolder is read, nor weights in the format of another program.
_IGNORED = ("*/*", "consolidated*")


def download(name: str) -> Path:
    """Fetch a checkpoint into the local cache: weights, configuration, tokenizer, and nothing that is code.

    Raises
    ------
    CheckpointError
        If there is no such checkpoint, its licence was not accepted, or the hub cannot be reached.
    """
    folder = _snapshot(name, (*_TOKENIZER, *_SAFE))
    # Many repositories hold their weights twice; the older format is fetched only where it is the only one.
    return folder if any(folder.glob("*.safetensors")) else _snapshot(name, (*_TOKENIZER, *_BIN))


def download_tokenizer(name: str) -> Path:
    """Fetch what a checkpoint has beside its weights; see :func:`download`."""
    return _snapshot(name, _TOKENIZER)


def cached_folder(name: str) -> Path | None:
    """Return the folder of a hub checkpoint in the local cache; asks nothing of the network.

    Returns
    -------
    pathlib.Path or None
        None unless the configuration and all weights are there.
    """
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json")
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    return folder if any(map(_has_weights, [folder / "model.safetensors", folder / "pytorch_model.bin"])) else None


def _has_weights(weights: Path) -> bool:
    """Whether the file is there, or every shard that the index beside it names."""
    if weights.is_file():
        return True
    try:
        index = json.loads(Path(f"{weights}.index.json").read_text(encoding="utf-8"))
        shards = set(index["weight_map"].values())
        return bool(shards) and all((weights.parent / shard).is_file() for shard in shards)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # no index, or a damaged one
        return False


def _snapshot(name: str, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=list(_IGNORED)))
    except GatedRepoError as error:
        raise CheckpointError(
            f"{name} is gated on the hub",
            f"accept its licence at https://huggingface.co/{name}, then run: hf auth login",
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"there is no model {name} on the hub, nor a folder of that name",
            "check the name; to see a private one, run: hf auth login",
        ) from error
    except HFValidationError as error:
        raise CheckpointError(f"{name!r} is neither a folder nor a valid hub name") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{name} is not in the local cache and could not be downloaded",
            "check the network, or give the path of a local copy",
        ) from error
    except Exception as error:  # a broken transfer, a full disk: kinds of several libraries, some not public
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{name} could not be downloaded: {type(error).__name__}: {reason}", "run it again to go on"
        ) from error
