"""Documents in rows of a fixed length: joined, each closed by an end token, no token lost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ctxdocs.datasets.tokens import TokenArray, TokenSequences
from ctxdocs.errors import InputError

Ids = NDArray[np.int64]


class Row(NamedTuple):
    """One row of packed documents.

    Parameters
    ----------
    tokens : numpy.ndarray
        int64 ``[length]``; only the last row of a stream ends in padding.
    documents : numpy.ndarray
        int64 ``[length]``: the number of the document each token (and the end token behind it) belongs to, -1 for
        padding. Where it changes, a document begins.
    """

    tokens: Ids
    documents: Ids

    @property
    def starts(self) -> Ids:
        """Indices at which a document, or the rest of one, begins; int64."""
        live = self.documents[self.documents >= 0]
        return np.flatnonzero(np.diff(live, prepend=-1))

    @property
    def positions(self) -> Ids:
        """Place of every token in its document's part of the row, int64 ``[length]``; 0 for padding."""
        index = np.arange(len(self.documents))
        begins = np.diff(self.documents, prepend=-2) != 0
        return np.where(self.documents < 0, 0, index - np.maximum.accumulate(np.where(begins, index, 0)))


class Position(NamedTuple):
    """Where in a stream of documents a row begins: so many whole documents, and so many tokens of the next."""

    document: int = 0
    token: int = 0


def pack_rows(
    documents: Iterable[Sequence[int] | TokenArray],
    length: int,
    *,
    end: int,
    padding: int | None = None,
    start: Position = Position(),  # noqa: B008 - immutable
) -> Iterator[tuple[Row, Position]]:
    """Pack documents as they arrive.

    Parameters
    ----------
    documents : iterable of token ids
        From document number ``start.document`` on.
    length : int
        Tokens per row.
    end : int
        Id that closes every document.
    padding : int, optional
        Fills the last row; ``end`` by default.
    start : Position, optional
        Where to go on: what was yielded with the last row used. The rows are then those of an uninterrupted run.

    Yields
    ------
    row : Row
        One row of ``length`` tokens.
    position : Position
        Where the next row begins.
    """
    _check(length)
    padding = end if padding is None else padding
    tokens, owners = np.full(length, padding, dtype=np.int64), np.full(length, -1, dtype=np.int64)
    filled, skip = 0, start.token
    for number, document in enumerate(documents, start.document):
        ids = np.append(np.asarray(document, dtype=np.int64), end)
        if skip > len(ids):
            raise InputError(f"a row cannot begin at token {skip} of document {number}, which has {len(ids)}")
        used, skip = skip, 0
        while used < len(ids):
            taken = min(len(ids) - used, length - filled)
            tokens[filled : filled + taken] = ids[used : used + taken]
            owners[filled : filled + taken] = number
            filled, used = filled + taken, used + taken
            if filled == length:
                yield Row(tokens.copy(), owners.copy()), Position(number, used)
                filled = 0
    if filled:
        tokens[filled:], owners[filled:] = padding, -1
        yield Row(tokens, owners), Position(number + 1, 0)


class PackedRows(Sequence[Row]):
    """A token file as rows: any row at once, so a run goes on at any row.

    Parameters
    ----------
    sequences : TokenSequences
        Documents.
    length : int
        Tokens per row.
    end : int
        Id that closes every document.
    padding : int, optional
        Fills the last row; ``end`` by default.
    seed : int, optional
        Decides in which order the documents are joined; None leaves them as they are.
    """

    def __init__(
        self, sequences: TokenSequences, length: int, *, end: int, padding: int | None = None, seed: int | None = None
    ) -> None:
        _check(length)
        self.sequences = sequences
        self.length = length
        self.end = end
        self.padding = end if padding is None else padding
        self._order = shuffled(len(sequences), seed)
        self._ends = np.cumsum(sequences.lengths[self._order] + 1)

    def __len__(self) -> int:
        return -(-int(self._ends[-1]) // self.length) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Row:  # type: ignore[override]  # no slices
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        begin = index % len(self) * self.length
        tokens, owners = np.full(self.length, self.padding, dtype=np.int64), np.full(self.length, -1, dtype=np.int64)
        place, filled = int(np.searchsorted(self._ends, begin, side="right")), 0
        while filled < self.length and place < len(self._order):
            document = int(self._order[place])
            ids = self.sequences[document]
            used = len(ids) + 1 - (int(self._ends[place]) - begin - filled)
            taken = min(len(ids) + 1 - used, self.length - filled)
            part = ids[used : used + taken]
            tokens[filled : filled + len(part)] = part
            if len(part) < taken:
                tokens[filled + taken - 1] = self.end
            owners[filled : filled + taken] = document
            filled, place = filled + taken, place + 1
        return Row(tokens, owners)

    def order(self, seed: int, epoch: int = 0) -> Ids:
        """Return the order in which an epoch reads the rows, int64 ``[rows]``."""
        return shuffled(len(self), seed, epoch)


def shuffled(count: int, seed: int | None, epoch: int = 0) -> Ids:
    """Return 0 to ``count - 1`` in an order that seed and epoch decide; in their own order if ``seed`` is None."""
    if seed is None:
        return np.arange(count)
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(count)


def _check(length: int) -> None:
    if length < 1:
        raise InputError(f"rows of {length} tokens", "give a length of at least 1")
