"""Everything a stopped run needs to go on: weights, optimisers, step, time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxdocs.errors import InputError
from ctxdocs.training.bundled.optimisers import load_state, state_tensors

if TYPE_CHECKING:
    import torch

    from ctxdocs.compressors.base import Compressor

_FILE = "checkpoint.safetensors"
#: The progress, beside the model.
LOG = "training_log.json"


@dataclass
class Progress:
    """How far a run is.

    Parameters
    ----------
    preset : str
        Name of the recipe.
    device : str
        Where the last part of the run took place.
    step : int
        Steps done; the next batch is the one of this number.
    seconds : float
        Training time over all runs into the folder.
    tokens : int
        Slots the model has run over: tokens and summary slots.
    log : list of dict
        Losses over time.
    before : list of dict
        Earlier runs whose language model this one started from, first to last: ``preset``, ``seconds``, ``tokens``.
    """

    preset: str
    device: str
    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    log: list[dict[str, Any]] = field(default_factory=list)
    before: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def behind(cls, preset: str, device: str, earlier: Path | None) -> Progress:
        """Return the beginning of a run, behind the one whose log lies in the folder ``earlier``, if there is one."""
        if earlier is None or not (earlier / LOG).is_file():
            return cls(preset, device)
        run = cls.load(earlier / LOG)
        this = {"preset": run.preset, "seconds": run.seconds, "tokens": run.tokens}
        return cls(preset, device, before=[*run.before, this])

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Progress:
        """Read what :meth:`save` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def check_preset(folder: Path, preset: str) -> None:
    """Raise ``InputError`` if ``folder`` holds a run of another preset."""
    from safetensors import safe_open

    if (folder / _FILE).is_file():
        with safe_open(folder / _FILE, "pt") as file:
            found = _progress(file.metadata()).preset
        if found != preset:
            raise InputError(f"{folder} holds a run of preset {found}", "choose another --output")


def save_checkpoint(
    folder: Path, compressor: Compressor, optimisers: Sequence[torch.optim.Optimizer], progress: Progress
) -> None:
    """Replace the checkpoint of ``folder`` in one move: one file, with the progress in its header."""
    from safetensors.torch import save_file

    weights = {f"weight.{name}": value.detach() for name, value in compressor.named_parameters()}
    tensors = {**weights, **state_tensors(optimisers)}
    part = folder / f"{_FILE}.part"
    metadata = {"progress": json.dumps(asdict(progress))}
    save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, part, metadata=metadata)
    part.replace(folder / _FILE)


def load_checkpoint(
    folder: Path, compressor: Compressor, optimisers: Sequence[torch.optim.Optimizer]
) -> Progress | None:
    """Put the checkpoint of ``folder`` back; None if there is none."""
    import torch
    from safetensors import safe_open

    if not (folder / _FILE).is_file():
        return None
    with safe_open(folder / _FILE, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        progress = _progress(file.metadata())
    with torch.no_grad():
        for name, parameter in compressor.named_parameters():
            parameter.copy_(tensors[f"weight.{name}"])
    load_state(optimisers, tensors)
    return progress


def _progress(metadata: dict[str, str]) -> Progress:
    return Progress(**json.loads(metadata["progress"]))
