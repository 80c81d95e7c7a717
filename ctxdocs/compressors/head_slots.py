"""Cached slots of which every head holds a number of its own: padded layer by layer, masked head by head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ctxdocs.memory import order_by_head

if TYPE_CHECKING:
    from transformers import Cache

# Place of padding: behind every token.
_NOWHERE = torch.iinfo(torch.int64).max


@dataclass
class HeadSlots:
    """Slots of one prompt, layer by layer and head by head, as a memory with ``lengths`` keeps them.

    Parameters
    ----------
    keys, values : torch.Tensor
        ``[kept, head_dim]``, keys rotated to their places.
    lengths : torch.Tensor
        ``[layers, kv_heads]``, int64, ``kept`` in sum.
    place : torch.Tensor
        ``[kept]``, int64: how many of the prompt's tokens stand in front of each slot, and so do not see it.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor
    place: Tensor

    @classmethod
    def rectangular(cls, keys: Tensor, values: Tensor, place: Tensor) -> HeadSlots:
        """Return slots ``[layers, kv_heads, slots, head_dim]`` of place ``[slots]`` in this form."""
        layers, heads, slots, _ = keys.shape
        return cls(
            keys.flatten(0, 2),
            values.flatten(0, 2),
            torch.full((layers, heads), slots, device=keys.device),
            place.expand(layers, heads, slots).flatten(),
        )

    @classmethod
    def join(cls, parts: Sequence[HeadSlots]) -> HeadSlots:
        """Put slots side by side, in every head."""
        order = order_by_head([part.lengths for part in parts])
        return cls(
            torch.cat([part.keys for part in parts])[order],
            torch.cat([part.values for part in parts])[order],
            torch.stack([part.lengths for part in parts]).sum(0),
            torch.cat([part.place for part in parts])[order],
        )

    def by_layer(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return keys, values and places of every layer."""
        sums = self.lengths.sum(1).tolist()
        return list(zip(*(each.split(sums) for each in (self.keys, self.values, self.place)), strict=True))

    def empty(self) -> HeadSlots:
        """Return no slots, for a model of the same shape."""
        return HeadSlots(self.keys[:0], self.values[:0], torch.zeros_like(self.lengths), self.place[:0])


@dataclass
class HeadMasks:
    """Who sees whom among the cached slots of a batch.

    Parameters
    ----------
    place : list of torch.Tensor
        Of every layer ``[batch, kv_heads, width]``, int64: how many tokens stand in front of each slot.
    groups : int
        Query heads that share a key/value head.
    dtype : torch.dtype
        Of the model's scores.
    """

    place: list[Tensor]
    groups: int
    dtype: torch.dtype

    def behind(self, sees_token: Tensor, order: Tensor | None = None) -> Callable[[int], Tensor]:
        """Return what is added to a layer's scores, by the number of the layer.

        Parameters
        ----------
        sees_token : torch.Tensor
            ``[batch, queries, tokens]``, bool: who sees whom among the tokens behind the slots.
        order : torch.Tensor, optional
            ``[queries]``, int64: how many tokens of the prompt stand in front of each query. None: all of them.

        Returns
        -------
        callable
            From the number of a layer to ``[batch, heads, queries, width + tokens]``.
        """

        def mask(layer: int) -> Tensor:
            place = self.place[layer].repeat_interleave(self.groups, dim=1)[:, :, None]
            sees_slot = place < _NOWHERE if order is None else place <= order[:, None]
            heads, queries = place.shape[1], sees_token.shape[1]
            visible = torch.cat(
                [sees_slot.expand(-1, -1, queries, -1), sees_token[:, None].expand(-1, heads, -1, -1)], dim=3
            )
            zeros = torch.zeros(visible.shape, dtype=self.dtype, device=visible.device)
            return zeros.masked_fill(visible.logical_not(), torch.finfo(self.dtype).min)

        return mask


def padded(rows: Sequence[HeadSlots], query_heads: int) -> tuple[Cache, HeadMasks]:
    """Return a cache that holds the slots of a batch, and its masks; every layer is as wide as its longest head."""
    from transformers import DynamicCache

    template = rows[0]
    lengths = torch.stack([row.lengths for row in rows])
    heads, size = lengths.shape[2], template.keys.shape[1]
    by_layer = [row.by_layer() for row in rows]
    cache, places = DynamicCache(), []
    for layer, width in enumerate(lengths.amax((0, 2)).tolist()):
        keys = template.keys.new_zeros(len(rows), heads, width, size)
        values, place = torch.zeros_like(keys), torch.full(keys.shape[:3], _NOWHERE, device=keys.device)
        live = torch.arange(width, device=keys.device) < lengths[:, layer, :, None]
        for tensor, parts in zip(
            (keys, values, place), zip(*(row[layer] for row in by_layer), strict=True), strict=True
        ):
            tensor[live] = torch.cat(parts)
        cache.update(keys, values, layer)
        places.append(place)
    return cache, HeadMasks(places, query_heads // heads, template.keys.dtype)
