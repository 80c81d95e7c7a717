"""Cutting a text into chunks of a bounded number of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import regex

from ctxdocs.errors import InputError

# Searched backwards, so that the first match is the last one before the limit.
_BREAKS = tuple(
    regex.compile("(?r)" + pattern)
    for pattern in (
        r"\n\s*\n",
        # A sentence or a line; ideographic full stops need no space after them.
        r"""\p{STerm}[\p{Pe}\p{Pf}"']*\s|[\u3002\uff01\uff1f]|\n""",
        r"\s",
    )
)
_SPACE = regex.compile(r"\s+")
_VISIBLE = regex.compile(r"\S")
_GRAPHEME = regex.compile(r"\X")
# Characters before which a grapheme cluster always ends.
_ANCHOR = regex.compile(r"(?r)(?<!\p{Grapheme_Cluster_Break=Prepend})[ -~\p{Unified_Ideograph}]")
_LONG_CLUSTER = 4096  # characters

_BLOCK = 2**16  # characters tokenised at a time by one thread
_WINDOW = 8 * _BLOCK  # characters whose tokens are held at once


@dataclass(frozen=True)
class Chunk:
    """A piece of a document.

    Parameters
    ----------
    ordinal : int
        Place among the document's chunks, from 0.
    start, end : int
        Character offsets: ``text == document.text[start:end]``.
    text : str
        The text, without surrounding whitespace.
    ids : list of int
        Tokens of ``text`` alone, without special tokens.
    """

    ordinal: int
    start: int
    end: int
    text: str
    ids: list[int]


class Chunker:
    """Cuts texts into overlapping chunks of at most ``chunk_tokens`` tokens.

    A chunk ends at a paragraph, a sentence or a word, the first of these that its last quarter offers, else at its
    last whole grapheme cluster. Every visible character lies in a chunk; whitespace alone makes none. ``ids`` are
    what the tokenizer makes of the chunk's text by itself, so a chunk gives the same memory as its text does.

    One grapheme cluster that is longer than a whole chunk is cut between its characters, and a single character
    of more than ``chunk_tokens`` tokens keeps only the first of them.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerFast
        A fast tokenizer: slow ones do not tell where their tokens lie.
    chunk_tokens : int, optional
        Most tokens in a chunk, at least 1.
    overlap_tokens : int, optional
        About how many tokens a chunk shares with the one before, from 0 to ``chunk_tokens - 1``.

    Raises
    ------
    InputError
        If the numbers are out of range or the tokenizer is not a fast one.
    """

    def __init__(self, tokenizer: Any, chunk_tokens: int = 256, overlap_tokens: int = 32) -> None:
        if chunk_tokens < 1:
            raise InputError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
        if not 0 <= overlap_tokens < chunk_tokens:
            raise InputError(
                f"overlap_tokens must lie between 0 and chunk_tokens - 1 = {chunk_tokens - 1}, got {overlap_tokens}"
            )
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(f"{type(tokenizer).__name__} does not report token offsets", "load it with AutoTokenizer")
        self.tokenizer = tokenizer
        self.chunk_tokens = chunk_tokens
        self.overlap_tokens = overlap_tokens
        # A chunk's text by itself often has a token or two more than inside the document, where a space precedes.
        self._planned_tokens = chunk_tokens - chunk_tokens // 32

    def __call__(self, text: str) -> Iterator[Chunk]:
        """Yield the chunks of a text in order, holding the tokens of a bounded window of it at a time."""
        ordinal = 0
        for spans in self._windows(text):
            for start, end, ids in self._fit(text, spans):
                yield Chunk(ordinal, start, end, text[start:end], ids)
                ordinal += 1

    def _windows(self, text: str) -> Iterator[list[tuple[int, int]]]:
        """Yield the spans of planned chunks, one list per window of the text."""
        start = 0
        while _VISIBLE.search(text, start):
            stop = min(len(text), start + max(_WINDOW, 16 * self.chunk_tokens))
            spans, start = self._plan(text, start, stop)
            yield spans

    def _plan(self, text: str, start: int, stop: int) -> tuple[list[tuple[int, int]], int]:
        """Cut ``text[start:stop]``; return the spans and where to go on.

        A chunk that reaches ``stop`` before the text ends is left to the next window, which can complete it.
        """
        tokens = self._token_starts(text, start, stop)
        spans: list[tuple[int, int]] = []
        while visible := _VISIBLE.search(text, start):
            start = _floor(text, start, visible.start())
            if start >= stop:
                break
            first = _token_at(tokens, start)
            if first + self._planned_tokens < len(tokens):
                limit = max(int(tokens[first + self._planned_tokens]), start + 1)
            elif stop == len(text) or not spans:
                limit = stop
            else:
                break
            end = _cut(text, start, limit)
            spans.append((start, end))
            start = self._next_start(text, start, end, tokens) if _VISIBLE.search(text, end) else end
        return spans, start

    def _token_starts(self, text: str, start: int, stop: int) -> np.ndarray:
        """Return the offset of every token of ``text[start:stop]``, ascending, int64."""
        bounds = [start]
        while bounds[-1] < stop:
            limit = bounds[-1] + _BLOCK
            bounds.append(_break(text, bounds[-1], limit) if limit < stop else stop)
        blocks = list(pairwise(bounds))
        offsets = self._encode([text[a:b] for a, b in blocks], return_offsets_mapping=True)["offset_mapping"]
        starts = [
            begin + np.fromiter((offset[0] for offset in block), np.int64, len(block))
            for (begin, _), block in zip(blocks, offsets, strict=True)
        ]
        # A normaliser that reorders characters may step back.
        return np.maximum.accumulate(np.concatenate(starts))

    def _next_start(self, text: str, start: int, end: int, tokens: np.ndarray) -> int:
        """Return where the chunk after ``text[start:end]`` begins: the overlap before ``end``, at a word if near."""
        stride = self.chunk_tokens - self.overlap_tokens
        last = int(np.searchsorted(tokens, end))
        # A chunk cut early must not be repeated nearly whole.
        back = max(last - self.overlap_tokens, _token_at(tokens, start) + max(1, stride // 2))
        if back >= last:
            return end
        begin = int(tokens[back])
        space = _SPACE.search(text, begin - 1, begin + (end - begin) // 2)
        begin = _floor(text, start, space.end() if space else begin)
        return begin if begin > start else end

    def _fit(self, text: str, spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, list[int]]]:
        """Yield start, end and tokens of the trimmed spans; halve those whose own tokens exceed the limit."""
        spans = [span for span in (_trim(text, *span) for span in spans) if span[0] < span[1]]
        if not spans:
            return
        encoded = self._encode([text[start:end] for start, end in spans])["input_ids"]
        for (start, end), ids in zip(spans, encoded, strict=True):
            if len(ids) > self.chunk_tokens and end - start > 1:
                half = (end - start + 1) // 2
                middle = start + _cut(text[start:end], 0, half)
                if middle >= end:  # a single cluster
                    middle = start + half
                yield from self._fit(text, [(start, middle), (middle, end)])
            elif ids:
                yield start, end, ids[: self.chunk_tokens]

    def _encode(self, texts: list[str], **options: Any) -> Any:
        return self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,  # a document's text never becomes special tokens
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
            **options,
        )


def _token_at(tokens: np.ndarray, position: int) -> int:
    """Return the index of the token that holds the character at ``position``."""
    index = int(np.searchsorted(tokens, position))
    # Several tokens may share one character: the first of them counts. Else the character lies inside a token.
    return index if index < len(tokens) and tokens[index] == position else max(index - 1, 0)


def _cut(text: str, start: int, limit: int) -> int:
    """Return the best place to end a piece that begins at ``start``: at most ``limit``, a grapheme boundary.

    Only a first cluster that crosses ``limit`` makes the result larger.
    """
    if limit >= len(text):
        return limit
    end = _floor(text, start, _break(text, start, limit))
    if end > start:
        return end
    return start + _GRAPHEME.match(text[start : limit + _LONG_CLUSTER]).end()


def _break(text: str, start: int, limit: int) -> int:
    """Return the end of the last paragraph, sentence or word in the last quarter before ``limit``, else ``limit``."""
    low = limit - (limit - start) // 4
    for pattern in _BREAKS:
        # One character further, so that the space after a word that ends at the limit is seen.
        if match := pattern.search(text, low, limit + 1):
            return min(match.end(), limit)
    return limit


def _floor(text: str, start: int, position: int) -> int:
    """Return the last grapheme boundary not after ``position``; ``start`` must be a boundary before it."""
    if position >= len(text):
        return position
    anchor = _ANCHOR.search(text, start, position + 1)
    begin = anchor.start() if anchor else start
    # A copy, because regex looks back over a whole run of flags, however long.
    for cluster in _GRAPHEME.finditer(text[begin : position + 1]):
        if begin + cluster.end() > position:
            return begin + cluster.start()
    return position


def _trim(text: str, start: int, end: int) -> tuple[int, int]:
    """Move both ends inwards over whitespace that is no part of a visible grapheme cluster."""
    visible = _VISIBLE.search(text, start, end)
    if not visible:
        return end, end
    start = _floor(text, start, visible.start())
    last = start + len(text[start:end].rstrip())
    return start, last if _floor(text, start, last) == last else end
