"""Which slots of a document stay: a budget, and the choice of the best-scored slots within it.

Scores are float32, and equal ones are told apart by layer, head and position, so that the choice is the same
everywhere. What is not chosen is deleted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ctxdocs.checks import number, one_of, whole_number
from ctxdocs.errors import InputError

SHARES = ("uniform", "global")
PLACES = ("source", "compact")


@dataclass(frozen=True)
class Budget:
    """How many slots of a document stay.

    Parameters
    ----------
    ratio : float
        Tokens per slot, at least 1; not used where ``slots`` is given.
    slots : int, optional
        Slots per head, at least 1; a shorter document keeps all of its own.
    share : str
        ``"uniform"``: every head of every layer keeps the same number, at least one. ``"global"``: as many in all,
        shared out among the heads by one threshold, so that a head may keep all of its slots or none.
    """

    ratio: float = 2.0
    slots: int | None = None
    share: str = "uniform"

    def __post_init__(self) -> None:
        if self.slots is not None and whole_number("slots", self.slots) < 1:
            raise InputError(f"slots is {self.slots}", "give the number of slots per document, at least 1")
        if number("ratio", self.ratio) < 1:
            raise InputError(f"ratio is {self.ratio}", "give the number of tokens per slot, at least 1")
        one_of("budget", self.share, SHARES)

    def per_head(self, tokens: int) -> int:
        """Return how many of ``tokens`` slots every head keeps; with a global threshold the mean of what it leaves."""
        return max(int(tokens / self.ratio), 1) if self.slots is None else min(self.slots, tokens)

    def in_all(self, tokens: int, heads: int) -> int:
        """Return the rank of the best-scored slot that is not kept, counted from 1 over ``heads`` heads of all layers.

        One slot less than the budget is kept, as in the authors' code of KVzip.
        """
        everything = tokens * heads
        return max(int(everything / self.ratio), 1) if self.slots is None else min(self.slots * heads, everything)


def best_per_head(scores: Tensor, count: int) -> Tensor:
    """Return the positions of every head's best slots.

    Parameters
    ----------
    scores : torch.Tensor
        ``[layers, kv_heads, tokens]``.
    count : int
        How many of them.

    Returns
    -------
    torch.Tensor
        ``[layers, kv_heads, count]``, int64, ascending.
    """
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :count].sort(dim=-1).values


def best_of_all(scores: Tensor, rank: int) -> Tensor:
    """Mark the slots that score better than the one of ``rank``, counted from 1 over all layers and heads.

    Parameters
    ----------
    scores : torch.Tensor
        ``[layers, kv_heads, tokens]``.
    rank : int
        Of the best slot that is not marked.

    Returns
    -------
    torch.Tensor
        ``[layers, kv_heads, tokens]``, bool, True at ``rank - 1`` slots.
    """
    marked = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    marked[scores.flatten().argsort(descending=True, stable=True)[: rank - 1]] = True
    return marked.view_as(scores)


@dataclass(frozen=True)
class Slots:
    """Keys, values and positions as :class:`~ctxdocs.memory.KVMemory` holds them, and what they span."""

    keys: Tensor
    values: Tensor
    positions: Tensor
    lengths: Tensor | None
    span: int


def at_positions(keys: Tensor, values: Tensor, kept: Tensor, places: str) -> Slots:
    """Take the slots at ``kept``, ``[layers, kv_heads, slots]``, ascending; see :func:`marked`."""
    count = kept.shape[-1]
    keys_kept, values_kept = (
        tensor.gather(2, kept[..., None].expand(-1, -1, -1, tensor.shape[-1])) for tensor in (keys, values)
    )
    same = bool((kept == kept[:1, :1]).all())
    positions, span = (kept[0, 0] if same else kept), keys.shape[2]
    if places == "compact":
        positions, span = torch.arange(count, device=kept.device), count
    return Slots(keys_kept, values_kept, positions, None, span)


def marked(keys: Tensor, values: Tensor, kept: Tensor, places: str) -> Slots:
    """Take the slots that are marked in ``kept``, ``[layers, kv_heads, tokens]``, bool.

    Parameters
    ----------
    keys, values : torch.Tensor
        ``[layers, kv_heads, tokens, head_dim]``.
    kept : torch.Tensor
        Which of them stay.
    places : str
        ``"source"`` leaves every slot at its token's position, and spans the tokens. ``"compact"`` closes the slots of
        every head up, from 0 on, and spans as many as the longest head has.
    """
    lengths = kept.sum(-1)
    positions, span = kept.nonzero()[:, 2], keys.shape[2]
    if places == "compact":
        positions, span = (kept.cumsum(-1) - 1)[kept], int(lengths.max())
    return Slots(keys[kept], values[kept], positions, lengths, span)
