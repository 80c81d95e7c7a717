"""Keys with and without rotary position embedding, by the model's own rotary module (RoPE, arXiv 2104.09864).

Asking the model's module for angles brings linear, Llama-3 and YaRN scaling, and partial rotary dimensions, along.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

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
        ``[slots]``, int64; or ``[batch, slots]`` for keys ``[..., batch, heads, slots, head_dim]``.

    Returns
    -------
    torch.Tensor
        Like ``keys``; angles and products are computed in float32.

    Raises
    ------
    InputError
        If the model has no rotary embedding.
    """
    rotary = getattr(model.base_model, "rotary_emb", None)
    if rotary is None:
        raise InputError(f"{type(model).__name__} has no rotary embedding to place keys with")
    if not positions.numel():  # of no positions, a module that looks for the largest one makes nothing
        return keys
    probe = torch.empty(1, dtype=torch.float32, device=keys.device)
    by_row = positions.dim() == 2
    cos, sin = rotary(probe, (positions if by_row else positions[None]).to(keys.device))
    # Angles are the same for all heads.
    cos, sin = (angles[:, None] if by_row else angles[0] for angles in (cos, sin))
    turning, fixed = keys[..., : cos.shape[-1]].float(), keys[..., cos.shape[-1] :]
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned.to(keys.dtype), fixed], dim=-1)
