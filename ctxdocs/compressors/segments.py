"""Documents cut into segments that are compressed one after another, slots of each segment behind its text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ctxdocs.checks import whole_number, whole_numbers
from ctxdocs.errors import InputError


@dataclass(frozen=True, eq=False)
class Segment:
    """The next segment of every document that goes on.

    Parameters
    ----------
    ids : torch.Tensor
        ``[batch, tokens]``, int64, padded on the right.
    lengths : torch.Tensor
        ``[batch]``, int64: tokens that are no padding.
    start : int
        Tokens of each document in front of it.
    ends : torch.Tensor
        ``[batch]``, bool: the document ends here, and its row is not in the next segment.
    documents : list of int
        Which documents end here, in the order of their rows.
    """

    ids: Tensor
    lengths: Tensor
    start: int
    ends: Tensor
    documents: list[int]

    @property
    def is_full(self) -> bool:
        """Whether no row is padded."""
        return bool((self.lengths == self.ids.shape[1]).all())


def segments_of(
    documents: Sequence[Tensor], segment_lengths: int | Sequence[int], device: torch.device
) -> Iterator[Segment]:
    """Cut documents (1-D int64 ids) into segments, all in step; rows that have ended leave the batch.

    ``segment_lengths`` is one length or, for documents of equal length, all of them.

    Raises
    ------
    InputError
        If a length is below 1, or given lengths do not add up.
    """
    lengths = torch.tensor([len(document) for document in documents], device=device)
    ids = nn.utils.rnn.pad_sequence(list(documents), batch_first=True).to(device)
    pieces = split_lengths(ids.shape[1], segment_lengths)
    if 0 in pieces:
        raise InputError(f"a segment holds at least one token, got segment_lengths={pieces}")
    rows = torch.arange(len(documents), device=device)
    start = 0
    for tokens in pieces:
        left = lengths[rows] - start
        ends = left <= tokens
        here = ids[rows, start : start + tokens]
        yield Segment(here, left.clamp(max=tokens), start, ends, rows[ends].tolist())
        rows = rows[~ends]
        start += tokens


def slots_behind_text(embeds: Tensor, first: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Pull each row's slots forward onto its padding: padding then lies where causal attention never looks.

    Parameters
    ----------
    embeds : torch.Tensor
        ``[batch, places, width]``; the last ``slots`` places hold the slots.
    first : torch.Tensor
        ``[batch]``, int64: where each row's slots belong.
    slots : int
        Slots per row.

    Returns
    -------
    embeds : torch.Tensor
        ``[batch, places, width]``.
    is_slot : torch.Tensor
        ``[batch, places]``, bool.
    """
    place = torch.arange(embeds.shape[1], device=embeds.device)
    ahead = place - first[:, None]
    is_slot = (ahead >= 0) & (ahead < slots)
    source = torch.where(is_slot, embeds.shape[1] - slots + ahead, place)
    return embeds.gather(1, source[..., None].expand_as(embeds)), is_slot


def longest_piece(tokens: int, segment_lengths: int | Sequence[int]) -> int:
    """Return the length of the longest segment that :func:`segments_of` cuts from ``tokens`` tokens."""
    if isinstance(segment_lengths, Iterable):
        return min(tokens, max(whole_numbers("segment_lengths", segment_lengths), default=0))
    return min(tokens, whole_number("segment_lengths", segment_lengths))


def split_lengths(tokens: int, segment_lengths: int | Sequence[int] | None) -> list[int]:
    """Return the length of every segment of ``tokens`` tokens; None is one segment.

    Raises
    ------
    InputError
        If a length is below 1, or given lengths do not add up.
    """
    if segment_lengths is None:
        return [tokens]
    if not isinstance(segment_lengths, Iterable):
        length = whole_number("segment_lengths", segment_lengths)
        if length < 1:
            raise InputError(f"a segment holds at least one token, got segment_lengths={length}")
        full, rest = divmod(tokens, length)
        return [length] * full + [rest] * bool(rest)
    lengths = whole_numbers("segment_lengths", segment_lengths)
    if sum(lengths) != tokens or any(length < 0 for length in lengths):
        raise InputError(f"segment lengths {lengths} do not add up to {tokens} tokens")
    return lengths
