"""A prompt with memories as a model reads it: what runs through the layers, what lies in the cache, who sees whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ctxdocs.errors import ContextTooLong, InputError
from ctxdocs.memory import KVMemory, Memory, SoftPrompt
from ctxdocs.modeling.kv import fill_cache
from ctxdocs.modeling.layers import AddedStates
from ctxdocs.modeling.probe import check_keys
from ctxdocs.modeling.rotary import rotate_keys

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

    from ctxdocs.modeling.backbone import Backbone


@dataclass
class ModelInput:
    """One prompt.

    Parameters
    ----------
    embeds : torch.Tensor
        ``[tokens, width]``: what runs through the layers, text and slots.
    positions : torch.Tensor
        ``[tokens]``, int64; -1 is "no position".
    is_text : torch.Tensor
        ``[tokens]``, bool: False at slots.
    next_position : int
        Position of the token that follows.
    keys, values : torch.Tensor or None
        ``[layers, kv_heads, slots, head_dim]``: cached slots, keys rotated to their places; None where there are none.
    place : torch.Tensor or None
        ``[slots]``, int64: how many of ``tokens`` stand in front of each cached slot, and so do not see it.
    added : AddedStates or None
        Added to the layers' outputs at slots that run through the layers.
    """

    embeds: Tensor
    positions: Tensor
    is_text: Tensor
    next_position: int
    keys: Tensor | None = None
    values: Tensor | None = None
    place: Tensor | None = None
    added: AddedStates | None = None

    @property
    def slots(self) -> int:
        """Cached slots."""
        return 0 if self.keys is None else self.keys.shape[2]


class Layout:
    """Lays the parts of a prompt out one after another; a memory moves what follows on by its span.

    Parameters
    ----------
    backbone : Backbone
        Of the model that will read it.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.offset = 0
        self._tokens = 0
        self._running: list[tuple[Tensor, Tensor, bool, Tensor | None]] = []
        self._cached: list[tuple[Tensor, Tensor, int]] = []

    def add_text(self, ids: Tensor) -> None:
        """Add token ids, ``[tokens]``."""
        self._run(self.backbone.embed(ids), torch.arange(self.offset, self.offset + len(ids)), is_text=True)
        self.offset += len(ids)

    def add_memory(self, memory: Memory) -> None:
        """Add a memory: summary vectors run through the layers, keys and values go into the cache.

        Raises
        ------
        InputError
            If memories of its kind are read in a way of their method's own, or the model's keys cannot be placed.
        """
        if isinstance(memory, SoftPrompt):
            vectors = memory.vectors.to(device=self.backbone.device, dtype=self.backbone.dtype)
            # Slots that span nothing have no position: the model does not count them.
            first = torch.arange(self.offset, self.offset + memory.slots)
            self._run(vectors, first if memory.span else torch.full_like(first, -1), is_text=False)
        elif isinstance(memory, KVMemory):
            check_keys(self.backbone)
            here = memory.to(self.backbone.device, self.backbone.dtype)
            keys = rotate_keys(self.backbone.model, here.keys, self.offset + here.positions)
            self._cached.append((keys, here.values, self._tokens))
        else:
            raise InputError(f"a memory of kind {memory.kind} cannot be read as part of a prompt")
        self.offset += memory.span

    def add_states(self, embeds: Tensor, added: Tensor) -> None:
        """Add slots that run through the layers, and to which every layer's own state is added.

        Parameters
        ----------
        embeds : torch.Tensor
            ``[slots, width]``, the slots' input embeddings.
        added : torch.Tensor
            ``[layers, slots, width]``, added to the layers' outputs.
        """
        self._run(embeds, torch.arange(self.offset, self.offset + len(embeds)), is_text=False, added=added)
        self.offset += len(embeds)

    def finish(self) -> ModelInput:
        """Return the prompt.

        Raises
        ------
        InputError
            If nothing runs through the layers.
        ContextTooLong
            If more positions are needed than the model has.
        """
        if not self._tokens:
            raise InputError("the prompt is empty", "give at least one token")
        limit = self.backbone.max_positions
        if self.offset > limit:
            raise ContextTooLong(
                f"the prompt and its memories take {self.offset} positions, "
                f"{self.offset - limit} more than {self.backbone.limit}",
                "read fewer memories or shorten the prompt",
            )
        device = self.backbone.device
        embeds, positions, is_text, added = zip(*self._running, strict=True)
        lengths = torch.tensor([len(places) for places in positions])
        prompt = ModelInput(
            embeds=torch.cat(embeds),
            positions=torch.cat(positions).to(device),
            is_text=torch.tensor(is_text).repeat_interleave(lengths).to(device),
            next_position=self.offset,
        )
        if self._cached:
            keys, values, places = zip(*self._cached, strict=True)
            slots = torch.tensor([part.shape[2] for part in keys])
            prompt.keys, prompt.values = torch.cat(keys, dim=2), torch.cat(values, dim=2)
            prompt.place = torch.tensor(places).repeat_interleave(slots).to(device)
        if states := [part for part in added if part is not None]:
            marked = torch.tensor([part is not None for part in added]).repeat_interleave(lengths)
            prompt.added = AddedStates(torch.cat(states, dim=1), marked.to(device))
        return prompt

    def _run(self, embeds: Tensor, positions: Tensor, *, is_text: bool, added: Tensor | None = None) -> None:
        self._running.append((embeds, positions, is_text, added))
        self._tokens += len(embeds)


@dataclass
class ReadState:
    """A batch of prompts that has been read, ready for the next tokens.

    Parameters
    ----------
    cache : transformers.Cache
        Keys and values read so far.
    live : torch.Tensor or None
        ``[batch, cached]``, bool: False at padding; None when there is none, which keeps attention maskless.
    next_position : torch.Tensor
        ``[batch]``, int64.
    """

    cache: Cache
    live: Tensor | None
    next_position: Tensor


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
    cache : transformers.Cache
        Holds the cached slots.
    mask : torch.Tensor or None
        For the first pass: None, ``[batch, slots + tokens]`` (bool), or ``[batch, 1, tokens, slots + tokens]``
        (additive) where tokens stand in front of cached slots.
    live : torch.Tensor or None
        ``[batch, slots + tokens]``, bool, for the steps that follow; None when nothing is padding.
    added : AddedStates or None
        For the first pass.
    """

    embeds: Tensor
    positions: Tensor
    lengths: Tensor
    cache: Cache
    mask: Tensor | None
    live: Tensor | None
    added: AddedStates | None


def batch_input(model: PreTrainedModel, rows: Sequence[ModelInput]) -> BatchInput:
    """Pad prompts to a batch."""
    device = rows[0].embeds.device
    embeds = nn.utils.rnn.pad_sequence([row.embeds for row in rows], batch_first=True)
    tokens, slots = embeds.shape[1], max(row.slots for row in rows)
    # Padding takes the positions of the longest row: any value would do, but a run of one would look like several
    # sequences packed into one.
    longest = max((row.positions for row in rows), key=len)
    positions = torch.stack([torch.cat([row.positions, longest[len(row.positions) :]]) for row in rows])
    lengths = torch.tensor([len(row.positions) for row in rows], device=device)
    live_tokens = torch.arange(tokens, device=device) < lengths[:, None]
    slot_counts = torch.tensor([row.slots for row in rows], device=device)
    live_slots = torch.arange(slots, device=device) < slot_counts[:, None]
    uneven_slots = not bool(live_slots.all())
    mask = None
    if any(row.place is not None and bool((row.place > 0).any()) for row in rows):
        mask = _mask_by_place(rows, live_slots, tokens, embeds.dtype)
    elif uneven_slots:
        mask = torch.cat([live_slots, torch.ones_like(live_tokens)], dim=1)
    live = torch.cat([live_slots, live_tokens], dim=1)
    return BatchInput(
        embeds=embeds,
        positions=positions,
        lengths=lengths,
        cache=_cache(model, rows, slots),
        mask=mask,
        live=None if bool(live.all()) else live,
        added=_added(rows),
    )


def _added(rows: Sequence[ModelInput]) -> AddedStates | None:
    states = [row.added.states for row in rows if row.added is not None]
    if not states:
        return None
    marked = [torch.zeros_like(row.is_text) if row.added is None else row.added.marked for row in rows]
    return AddedStates(torch.cat(states, dim=1), nn.utils.rnn.pad_sequence(marked, batch_first=True))


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
    template = next(row.keys for row in rows if row.keys is not None)
    layers, heads, _, size = template.shape
    keys = template.new_zeros(layers, len(rows), heads, slots, size)
    values = torch.zeros_like(keys)
    for index, row in enumerate(rows):
        if row.keys is not None and row.values is not None:
            keys[:, index, :, : row.slots] = row.keys
            values[:, index, :, : row.slots] = row.values
    return fill_cache(keys, values)
