"""Writing a compressor to a folder: the base model as transformers saves it, the method's own tensors beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxdocs.errors import CheckpointError
from ctxdocs.quiet import quiet_transformers

if TYPE_CHECKING:
    from ctxdocs.compressors.base import Compressor

#: Says which method a folder holds and how it is run; its presence marks the folder as saved by ctxdocs.
CARD = "ctxdocs.json"
#: The method's own tensors, under the names its published checkpoints use.
OWN_TENSORS = "compressor.safetensors"
#: Configuration of a method's second model; without the file, it is that of the base model.
ENCODER_CONFIG = "encoder_config.json"
FORMAT_VERSION = 1


def save(compressor: Compressor, folder: Path) -> None:
    """Write ``folder``: weights, configuration, tokenizer, settings and prompt format."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    for name, value in compressor.format_settings.items():
        setattr(compressor.model.config, name, value)
    with quiet_transformers():
        compressor.model.save_pretrained(folder)
    if compressor.tokenizer is not None:
        compressor.tokenizer.save_pretrained(folder)
    own = {name: tensor.detach().contiguous().cpu() for name, tensor in compressor.own_parameters().items()}
    if own:
        save_file(own, folder / OWN_TENSORS, metadata={"format": "pt"})
    card = {
        "format_version": FORMAT_VERSION,
        "method": compressor.method,
        "settings": compressor.run_settings,
        "prompt_format": compressor.prompt_format.to_dict(),
    }
    (folder / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def read_card(folder: Path) -> dict[str, Any] | None:
    """Return what :func:`save` wrote about the method, or None where the folder was not saved by ctxdocs.

    Raises
    ------
    CheckpointError
        If the file is damaged or of a newer format.
    """
    path = folder / CARD
    if not path.is_file():
        return None
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        version = card["format_version"]
        card["method"], card["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}", "save the compressor again") from error
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}; this ctxdocs reads up to {FORMAT_VERSION}", "upgrade ctxdocs"
        )
    return card
