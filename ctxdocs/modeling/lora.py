"""LoRA adapters (arXiv 2106.09685): read, merged into the weights they were trained on, or kept beside them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from ctxdocs.errors import CheckpointError

_FACTOR = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight$")


@dataclass(frozen=True)
class Adapter:
    """What an adapter folder holds.

    Parameters
    ----------
    name : str
        Name of the folder; some authors keep settings in it.
    config : mapping
        peft's ``adapter_config.json``.
    tensors : mapping of str to torch.Tensor
        Weights under peft's names.
    """

    name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def merge_into(self, model: nn.Module) -> None:
        """Merge its LoRA into a model; see :func:`merge_lora`."""
        merge_lora(model, self.tensors, self.config)


class Lora(nn.Module):
    """A LoRA kept beside its layer: from the layer's inputs and outputs to new outputs, ``y + scale * B @ A @ x``.

    Computed in the dtype of its factors. Before training it changes nothing.

    Parameters
    ----------
    layer : torch.nn.Linear
        The layer it belongs to.
    rank : int
        Rows of A.
    scale : float
        ``alpha / rank``.
    """

    def __init__(self, layer: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        place = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        self.lora_A = nn.Linear(layer.in_features, rank, bias=False, **place)
        self.lora_B = nn.Linear(rank, layer.out_features, bias=False, **place)
        nn.init.zeros_(self.lora_B.weight)
        self.scale = scale
        #: On the inputs, in training mode.
        self.dropout = 0.0

    def forward(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """``[rows, in]`` and ``[rows, out]`` to ``[rows, out]``."""
        inputs = dropout(inputs.to(self.lora_A.weight.dtype), self.dropout, self.training)
        return outputs + self.scale * self.lora_B(self.lora_A(inputs))


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
