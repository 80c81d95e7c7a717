"""Optimisers and the learning-rate schedule, which is driven by time."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from ctxdocs.compressors.base import Compressor
from ctxdocs.training.bundled.recipe import Recipe

# Matrices of the model's layers, and those that gist tokens have in their place.
_LAYERS = re.compile(r"\.layers\.|^replacements\.")


def build_optimisers(compressor: Compressor, recipe: Recipe, scale: float = 1.0) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the layers, AdamW for everything else; ``scale`` is that of their rates."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in compressor.named_parameters():
        (matrices if _LAYERS.search(name) and parameter.dim() == 2 else others).append(parameter)
    muon = torch.optim.Muon(matrices, lr=recipe.matrix_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=recipe.table_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for optimiser in (muon, adamw):
        for group in optimiser.param_groups:
            group["peak"] = group["lr"] * scale
    return [muon, adamw]


def set_rates(optimisers: Sequence[torch.optim.Optimizer], recipe: Recipe, progress: float) -> None:
    """Set the learning rates for ``progress``, the share of the time that is over."""
    factor = min(1.0, (progress + 1e-3) / recipe.warmup, max(0.0, 1 - progress) / recipe.cooldown)
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * factor


def state_tensors(optimisers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Return the state of the optimisers as named tensors."""
    return {
        f"optimiser.{number}.{index}.{name}": value
        for number, optimiser in enumerate(optimisers)
        for index, values in optimiser.state_dict()["state"].items()
        for name, value in values.items()
        if isinstance(value, Tensor)
    }


def load_state(optimisers: Sequence[torch.optim.Optimizer], tensors: dict[str, Tensor]) -> None:
    """Put back what :func:`state_tensors` returned."""
    for number, optimiser in enumerate(optimisers):
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            kind, owner, *rest = key.split(".")
            if kind == "optimiser" and int(owner) == number:
                state.setdefault(int(rest[0]), {})[rest[1]] = value
        optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
