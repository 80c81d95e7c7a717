"""Models under evaluation: how each is loaded, and what a report says of it."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ctxdocs.evaluation.reading import Reading

if TYPE_CHECKING:
    from ctxdocs.compressors.base import Compressor


@dataclass(frozen=True)
class Model:
    """A model under a short name; it is loaded when its turn comes.

    Parameters
    ----------
    label : str
        Its name in tables.
    load : callable
        Returns the compressor.
    """

    label: str
    load: Callable[[], Compressor]


def facts(compressor: Compressor, readings: Sequence[Reading]) -> dict[str, Any]:
    """Return what a report says about a model."""
    return {
        "name": compressor.name_or_path,
        "method": compressor.method,
        "base": compressor.model.config.model_type,
        "parameters": sum(parameter.numel() for parameter in compressor.parameters()),
        "dtype": str(compressor.backbone.dtype).removeprefix("torch."),
        "positions": compressor.backbone.max_positions,
        "settings": {**compressor.format_settings, **compressor.run_settings},
        "readings": [reading.name for reading in readings],
        "ratio_can_be_chosen": bool(compressor.ratios),
        "fingerprint": compressor.fingerprint,
        "device": _device_name(compressor),
        "torch": torch.__version__,
    }


def _device_name(compressor: Compressor) -> str:
    device = compressor.backbone.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
