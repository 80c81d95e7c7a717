"""Keys with and without rotary position embedding, by the model's own rotary module (RoPE, arXiv 2104.09864).

Asking the model's module for angles brings linear, Llama-3 and YaRN scaling, and partial rotary dimensions, along.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ctxdocs.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def rotate_keys(model: PreTrainedModel, keys: Tensor, positions: Tensor) -> Tensor:
    """Rotate keys to positions.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A model with one rotary module for all layers.
    keys : torch.Tensor
        ``[..., slots, head_dim]``, before the rotary embedding.
    positions : torch.Tensor
        ``[slots]``, int64; or ``[batch, slots]`` for keys ``[..., batch, heads, slots, head_dim]``; or one for every
        key, ``[..., slots]``, in more dimensions than two.

    Returns
    -------
    torch.Tensor
        Like ``keys``, bit for bit what the model itself would have put there: angles are computed in float32, products
        in the dtype in which the model computes them.

    Raises
    ------
    InputError
        If the model has no rotary embedding.
    """
    rotary = getattr(model.base_model, "rotary_emb", None)
    if rotary is None:
        raise InputError(f"{type(model).__name__} has no rotary embedding to place keys with")
    if not keys.numel() or not positions.numel():
        return keys
    cos, sin = _angles(rotary, keys, positions)
    if positions.dim() == 2:  # the same for all heads
        cos, sin = cos[:, None], sin[:, None]
    return _turned(keys, cos, sin)


def _angles(rotary: nn.Module, keys: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and sines ``[*positions, turning]``, as the module gives them to keys of this dtype."""
    probe = torch.empty(1, dtype=keys.dtype, device=keys.device)
    angles = rotary(probe, positions.to(keys.device).reshape(1, -1))
    cos, sin = (each[0].unflatten(0, positions.shape) for each in angles)
    return cos, sin


def mean_rotation(model: PreTrainedModel, size: int, positions: Tensor) -> Tensor:
    """Return the mean of the matrices that turn keys and queries to ``positions``, ``[size, size]``, float32.

    It is linear as each of them is, but turns nothing: ``mean_rotation(...) @ vector`` is the mean of the vector at all
    of the positions.
    """
    rows = torch.eye(size, device=model.device)  # each row a basis vector
    rotary: Any = model.base_model.rotary_emb
    cos, sin = (angles.mean(0) for angles in _angles(rotary, rows, positions))
    return _turned(rows, cos, sin).T


def _turned(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turning, fixed = keys[..., : cos.shape[-1]], keys[..., cos.shape[-1] :]
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned.to(keys.dtype), fixed], dim=-1)
