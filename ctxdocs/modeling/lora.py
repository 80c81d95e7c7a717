"""Merging a LoRA adapter (arXiv 2106.09685) into the weights it was trained on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ctxdocs.errors import CheckpointError

_FACTOR = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight$")


def merge_lora(model: nn.Module, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Add every adapter product to its weight in place: ``W += alpha / r * B @ A``, computed in float32.

    Parameters
    ----------
    model : torch.nn.Module
        The base model the adapter was trained on.
    tensors : mapping of str to torch.Tensor
        Adapter weights under peft's names; ``lora_A`` is ``[r, in]``, ``lora_B`` is ``[out, r]``. Names that are no
        LoRA factors are ignored.
    config : mapping
        peft's ``adapter_config.json``: ``r``, ``lora_alpha``, ``use_rslora``.

    Raises
    ------
    CheckpointError
        If the adapter does not belong to the model: a module is missing or has another shape.
    """
    factors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if match := _FACTOR.match(name):
            factors.setdefault(match["module"], {})[match["side"]] = tensor
    if not factors:
        raise CheckpointError("the adapter holds no LoRA weights", "expected names like '...q_proj.lora_A.weight'")
    for field in ("use_dora", "rank_pattern", "alpha_pattern"):
        if config.get(field):
            raise CheckpointError(f"the adapter uses {field}, which cannot be merged here")
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    with torch.no_grad():
        for name, sides in factors.items():
            try:
                weight: Any = model.get_submodule(name).weight
            except AttributeError as error:
                raise CheckpointError(
                    f"the adapter changes {name}, which the base model lacks", "is this the adapter's base model?"
                ) from error
            if sides.keys() != {"A", "B"}:
                raise CheckpointError(f"the adapter holds only one of the two LoRA factors of {name}")
            update = scale * sides["B"].float() @ sides["A"].float()
            if update.shape != weight.shape:
                raise CheckpointError(
                    f"the adapter's update of {name} has shape {tuple(update.shape)}, "
                    f"the base model's weight {tuple(weight.shape)}",
                    "is this the adapter's base model?",
                )
            weight.copy_(weight.float() + update.to(weight.device))
