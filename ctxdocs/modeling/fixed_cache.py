"""A cache that is read and left as it is: what runs behind it sees its slots, and is not kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicLayer


class FixedLayer(DynamicLayer):
    """One layer's cached keys and values, ``[batch, kv_heads, slots, head_dim]`` each."""

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = self._slots = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the slots and what runs behind them; keep only the slots."""
        keys, values = self._slots
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


def fixed_cache(keys: Tensor, values: Tensor) -> Cache | None:
    """Return a cache of rotated keys and values, ``[layers, batch, kv_heads, slots, head_dim]`` each.

    None where there are no slots: nothing is then cached, and nothing copied.
    """
    if not keys.shape[-2]:
        return None
    return Cache(layers=[FixedLayer(*layer) for layer in zip(keys, values, strict=True)])
