"""Prompts read as a batch: padded to one length, in a first pass and in the passes behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from ctxdocs.compressors.head_slots import HeadMasks, HeadSlots, padded
from ctxdocs.compressors.reading import ModelInput
from ctxdocs.modeling.attention_layers import masked_heads
from ctxdocs.modeling.kv import fill_cache
from ctxdocs.modeling.layers import AddedStates

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

    from ctxdocs.modeling.backbone import Backbone


@dataclass
class ReadState:
    """A batch of prompts that has been read, ready for the next tokens.

    Parameters
    ----------
    cache : transformers.Cache
        Keys and values read so far.
    live : torch.Tensor or None
        ``[batch, cached]``, bool: False at padding; None when there is none, which keeps attention maskless. With
        ``masks`` it is there, and leaves out the slots that they tell of.
    next_position : torch.Tensor
        ``[batch]``, int64.
    masks : HeadMasks or None
        Which cached slots are live, where heads hold different numbers of them.
    """

    cache: Cache
    live: Tensor | None
    next_position: Tensor
    masks: HeadMasks | None = None

    def keep(self, rows: Tensor) -> None:
        """Go on with some rows of the batch alone, by their indices ``[kept]``, int64."""
        self.cache.batch_select_indices(rows)
        self.next_position = self.next_position[rows]
        if self.live is not None:
            self.live = self.live[rows]
        if self.masks is not None:
            self.masks.place = [place[rows] for place in self.masks.place]


@dataclass
class BatchInput:
    """A batch of prompts, as the backbone takes them.

    Shorter prompts are padded on the right: what is live never attends to padding there, so plain causal attention
    stays maskless, and only the steps that follow need to know which cached slots are live. Cached slots are padded
    too; that needs a mask at once, unless all prompts have the same number.

    Parameters
    ----------
    embeds : torch.Tensor
        ``[batch, tokens, width]``.
    positions : torch.Tensor
        ``[batch, tokens]``, int64.
    lengths : torch.Tensor
        ``[batch]``, int64: tokens that are no padding.
    cache : transformers.Cache or None
        Holds the cached slots, and will hold what is read; None if nothing needs it.
    mask : torch.Tensor or None
        For the first pass: None, ``[batch, slots + tokens]`` (bool), or ``[batch, 1, tokens, slots + tokens]``
        (additive) where tokens stand in front of cached slots.
    live : torch.Tensor or None
        ``[batch, slots + tokens]``, bool, for the steps that follow; None when nothing is padding.
    masks : HeadMasks or None
        Where heads hold different numbers of slots, who sees them; ``mask`` is None then, and ``live`` is
        ``[batch, tokens]``.
    added : AddedStates or None
        For the first pass.
    """

    embeds: Tensor
    positions: Tensor
    lengths: Tensor
    cache: Cache | None
    mask: Tensor | None
    live: Tensor | None
    masks: HeadMasks | None
    added: AddedStates | None

    def state(self, next_position: Tensor) -> ReadState:
        """Return what later passes need, once the first one is over; ``next_position`` is ``[batch]``, int64."""
        return ReadState(cast("Cache", self.cache), self.live, next_position, self.masks)


def batch_input(model: PreTrainedModel, rows: Sequence[ModelInput]) -> BatchInput:
    """Pad prompts to a batch."""
    device = rows[0].embeds.device
    embeds = _stacked([row.embeds for row in rows])
    tokens, slots = embeds.shape[1], max(row.slots for row in rows)
    # Padding takes the positions of the longest row: any value would do, but a run of one would look like several
    # sequences packed into one.
    longest = max((row.positions for row in rows), key=len)
    positions = torch.stack([torch.cat([row.positions, longest[len(row.positions) :]]) for row in rows])
    lengths = torch.tensor([len(row.positions) for row in rows], device=device)
    live_tokens = torch.arange(tokens, device=device) < lengths[:, None]
    added = _added(rows)
    if any(row.by_head is not None for row in rows):
        cache, masks = padded(_all_by_head(rows), model.config.num_attention_heads)
        return BatchInput(embeds, positions, lengths, cache, mask=None, live=live_tokens, masks=masks, added=added)
    slot_counts = torch.tensor([row.slots for row in rows], device=device)
    live_slots = torch.arange(slots, device=device) < slot_counts[:, None]
    uneven_slots = not bool(live_slots.all())
    mask = None
    if any(row.place is not None and bool((row.place > 0).any()) for row in rows):
        mask = _mask_by_place(rows, live_slots, tokens, embeds.dtype)
    elif uneven_slots:
        mask = torch.cat([live_slots, torch.ones_like(live_tokens)], dim=1)
    live = torch.cat([live_slots, live_tokens], dim=1)
    cache, padding = _cache(model, rows, slots), not bool(live.all())
    return BatchInput(
        embeds, positions, lengths, cache, mask=mask, live=live if padding else None, masks=None, added=added
    )


def _all_by_head(rows: Sequence[ModelInput]) -> list[HeadSlots]:
    empty = next(row.by_head for row in rows if row.by_head is not None).empty()
    slots = []
    for row in rows:
        if row.keys is None or row.values is None or row.place is None:
            slots.append(row.by_head or empty)
        else:
            slots.append(HeadSlots.rectangular(row.keys, row.values, row.place))
    return slots


def only_pass(backbone: Backbone, rows: Sequence[ModelInput]) -> Tensor:
    """Read prompts that nothing follows; return states ``[batch, tokens, width]``, padded on the right."""
    batch = batch_input(backbone.model, rows)
    if not any(row.slots or row.by_head for row in rows):
        batch.cache = None
    return first_pass(backbone, batch)


def first_pass(backbone: Backbone, batch: BatchInput) -> Tensor:
    """Read a batch of prompts, filling its cache; return states ``[batch, tokens, width]``."""
    options: dict[str, Any] = {"cache": batch.cache, "added": batch.added}
    if batch.masks is None:
        return backbone.run(batch.embeds, batch.positions, mask=batch.mask, **options)
    order = torch.arange(batch.embeds.shape[1], device=batch.embeds.device)
    sees_token = (order <= order[:, None]).expand(len(batch.embeds), -1, -1)
    # What the model is given as its mask is replaced in every layer; that it is one keeps it from making its own.
    mask = additive_mask(sees_token, batch.embeds.dtype)
    with masked_heads(backbone.model, batch.masks.behind(sees_token, order)):
        return backbone.run(batch.embeds, batch.positions, mask=mask, **options)


def next_pass(backbone: Backbone, embeds: Tensor, positions: Tensor, state: ReadState) -> Tensor:
    """Read more tokens of every row behind what has been read.

    Parameters
    ----------
    backbone : Backbone
        The model that reads.
    embeds : torch.Tensor
        ``[batch, tokens, width]``; rows may be padded on the right, if nothing is read behind the padding.
    positions : torch.Tensor
        ``[batch or 1, tokens]``, int64.
    state : ReadState
        What has been read. Its cache and ``live`` are kept up, ``next_position`` is the caller's.

    Returns
    -------
    torch.Tensor
        States, ``[batch, tokens, width]``.
    """
    rows, tokens = embeds.shape[:2]
    if state.live is not None:
        state.live = torch.cat([state.live, state.live.new_ones(rows, tokens)], dim=1)
    if state.masks is None or state.live is None:
        return backbone.run(embeds, positions, mask=state.live, cache=state.cache)
    order = torch.arange(state.live.shape[1], device=embeds.device)
    sees_token = state.live[:, None] & (order <= order[-tokens:, None])
    with masked_heads(backbone.model, state.masks.behind(sees_token)):
        return backbone.run(embeds, positions, mask=additive_mask(sees_token, embeds.dtype), cache=state.cache)


def _added(rows: Sequence[ModelInput]) -> AddedStates | None:
    states = [row.added.states for row in rows if row.added is not None]
    if not states:
        return None
    marked = [torch.zeros_like(row.is_text) if row.added is None else row.added.marked for row in rows]
    return AddedStates(torch.cat(states, dim=1), _stacked(marked))


def _mask_by_place(rows: Sequence[ModelInput], live_slots: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    """Let every token see the cached slots in front of it, and the tokens up to itself."""
    device, slots = live_slots.device, live_slots.shape[1]
    order = torch.arange(tokens, device=device)
    place = torch.zeros(len(rows), slots, dtype=torch.long, device=device)
    for index, row in enumerate(rows):
        if row.place is not None:
            place[index, : row.slots] = row.place
    sees_slot = live_slots[:, None] & (place[:, None] <= order[:, None])
    sees_token = (order <= order[:, None]).expand(len(rows), -1, -1)
    return additive_mask(torch.cat([sees_slot, sees_token], dim=2), dtype)


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn who sees whom, ``[batch, queries, keys]`` (bool), into what a model adds to its scores, one head for all."""
    zeros = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return zeros.masked_fill(visible.logical_not(), torch.finfo(dtype).min)[:, None]


def _cache(model: PreTrainedModel, rows: Sequence[ModelInput], slots: int) -> Cache:
    from transformers import DynamicCache

    if not slots:
        return DynamicCache(config=model.config)
    nothing = next(row.keys for row in rows if row.keys is not None)[:, :, :0]
    keys = _stacked([nothing if row.keys is None else row.keys for row in rows], at=2)
    values = _stacked([nothing if row.values is None else row.values for row in rows], at=2)
    return fill_cache(keys.transpose(0, 1), values.transpose(0, 1))


def _stacked(tensors: Sequence[Tensor], at: int = 0) -> Tensor:
    """Pad tensors with zeros behind dimension ``at``, to the longest, and stack them.

    Unlike ``pad_sequence`` it fills no tensor in place, which costs a copy of the whole gradient for every row.
    """
    longest = max(tensor.shape[at] for tensor in tensors)
    rest = tensors[0].dim() - 1 - at
    return torch.stack([pad(tensor, (0, 0) * rest + (0, longest - tensor.shape[at])) for tensor in tensors])
