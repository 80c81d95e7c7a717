"""The model's own prefill of a text: its logits, what it caches, and how far rounding alone can move both."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ctxdocs.modeling.backbone import Backbone

# How often a text is read with other rounding; and by how much more than what was seen then another way of computing
# the same may differ. Two ways differ by the rounding of both, and a layer rounds more often than it is shaken; the
# models of the tests need no more than half of this room.
_DRAWS, _ROOM = 3, 2.0


@dataclass(frozen=True, eq=False)
class Prefill:
    """What a model makes of a text in one pass, without ctxdocs.

    Parameters
    ----------
    logits : torch.Tensor
        ``[tokens, vocabulary]``, float32: of the last tokens.
    keys, values : torch.Tensor
        ``[layers, kv_heads, all tokens, head_dim]``: as cached, keys rotated.
    """

    logits: Tensor
    keys: Tensor
    values: Tensor


@dataclass(frozen=True, eq=False)
class Rounding:
    """How far what is exact may be from a prefill.

    Parameters
    ----------
    logits : float
        Of a logit.
    keys, values : torch.Tensor
        ``[layers]``, float32: of a cached entry of each layer.
    """

    logits: float
    keys: Tensor
    values: Tensor


def prefill(backbone: Backbone, ids: Tensor, last: int, start: int = 0) -> Prefill:
    """Read 1-D token ids in one pass from position ``start`` on, with logits of the ``last`` of them."""
    from transformers import DynamicCache

    model: Any = backbone.model
    options: dict[str, Any] = {backbone.cache_argument: (cache := DynamicCache()), "use_cache": True}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = last
    positions = torch.arange(start, start + len(ids), device=backbone.device)[None]
    logits = model(input_ids=ids[None].to(backbone.device), position_ids=positions, **options).logits[0, -last:]
    layers: list[Any] = cache.layers
    return Prefill(
        logits.float(), torch.cat([layer.keys for layer in layers]), torch.cat([layer.values for layer in layers])
    )


def rounding(backbone: Backbone, own: Prefill, ids: Tensor, last: int, start: int = 0) -> Rounding:
    """Measure how far rounding moves a prefill: read the text again while every layer's output is rounded anew."""
    random = torch.Generator(backbone.device).manual_seed(0)
    moved: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(_DRAWS):
        with _shaken(backbone, random):
            other = prefill(backbone, ids, last, start)
        moved.append(
            (farthest(other.logits, own.logits), by_layer(other.keys, own.keys), by_layer(other.values, own.values))
        )
    logits, keys, values = (_ROOM * torch.stack(list(part)).amax(0) for part in zip(*moved, strict=True))
    return Rounding(float(logits), keys, values)


def farthest(one: Tensor, other: Tensor) -> Tensor:
    """Return the largest difference, a scalar; infinite where one of the two is no number."""
    return (one.float() - other.float()).abs().amax().nan_to_num(torch.inf)


def by_layer(one: Tensor, other: Tensor) -> Tensor:
    """Return the largest difference in each layer, ``[layers]``."""
    return (one.float() - other.float()).abs().flatten(1).amax(1).nan_to_num(torch.inf)


@contextmanager
def _shaken(backbone: Backbone, random: torch.Generator) -> Iterator[None]:
    """Round what embedding and layers put out in another way while the block runs.

    An entry is moved by up to half a unit in the last place, and by what a sum of ``width`` products, behind it, may
    have gathered in float32, in which kernels add.
    """
    added = torch.finfo(torch.float32).eps * backbone.width**0.5

    def shake(module: Any, inputs: Any, output: Tensor) -> Tensor:
        unit = torch.finfo(output.dtype).eps + added
        noise = torch.rand(output.shape, generator=random, device=output.device) - 0.5
        return (output.float() * (1 + unit * noise)).to(output.dtype)

    hooks = [module.register_forward_hook(shake) for module in (backbone.embedding, *backbone.layers)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
