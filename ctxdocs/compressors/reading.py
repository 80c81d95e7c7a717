"""A prompt with memories as a model reads it: what runs through the layers, what lies in the cache, and where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ctxdocs.compressors.head_slots import HeadSlots
from ctxdocs.errors import ContextTooLong, InputError
from ctxdocs.memory import KVMemory, Memory, SoftPrompt
from ctxdocs.modeling.layers import AddedStates
from ctxdocs.modeling.probe import check_keys
from ctxdocs.modeling.rotary import rotate_keys

if TYPE_CHECKING:
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
    by_head : HeadSlots or None
        All cached slots, in place of the three above, where heads hold different numbers of them.
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
    by_head: HeadSlots | None = None
    added: AddedStates | None = None

    @property
    def slots(self) -> int:
        """Cached slots of every head; those that are kept by head are not counted."""
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
        self._cached: list[tuple[Tensor, Tensor, Tensor | None, int]] = []

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
            self._cached.append((keys, here.values, here.lengths, self._tokens))
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
            raise InputError("the prompt is empty", "give at least one token, behind the memories if there are any")
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
        if any(lengths is not None for _, _, lengths, _ in self._cached):
            prompt.by_head = HeadSlots.join([_by_head(*part) for part in self._cached])
        elif self._cached:
            keys, values, _, places = zip(*self._cached, strict=True)
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


def _by_head(keys: Tensor, values: Tensor, lengths: Tensor | None, tokens: int) -> HeadSlots:
    place = torch.full(keys.shape[-2:-1], tokens, device=keys.device)
    if lengths is None:
        return HeadSlots.rectangular(keys, values, place)
    return HeadSlots(keys, values, lengths, place)
