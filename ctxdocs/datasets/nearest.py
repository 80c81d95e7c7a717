"""Texts that share words with a query: BM25 over texts in memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ctxdocs.datasets.words import words_of

_K1, _B = 1.2, 0.75


class WordIndex:
    """Ranks texts by BM25 (Robertson and Zaragoza, 2009), words in lower case.

    Parameters
    ----------
    texts : sequence of str
        What is ranked.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._words: dict[str, int] = {}
        number_of = self._words.setdefault
        found = [[number_of(word, len(self._words)) for word in words_of(text)] for text in texts]
        lengths = np.array([len(words) for words in found], dtype=np.int64)
        words = np.fromiter((word for words in found for word in words), dtype=np.int64, count=int(lengths.sum()))
        owners = np.repeat(np.arange(len(texts)), lengths)
        # One entry per word and text, sorted by word: the texts of word w are texts[first[w] : first[w + 1]].
        entries, counts = np.unique(words * max(len(texts), 1) + owners, return_counts=True)
        self._texts = entries % max(len(texts), 1)
        self._first = np.searchsorted(entries // max(len(texts), 1), np.arange(len(self._words) + 1))
        frequency = np.diff(self._first)
        rarity = np.log1p((len(texts) - frequency + 0.5) / (frequency + 0.5))
        norm = _K1 * (1 - _B + _B * lengths / max(lengths.mean() if len(lengths) else 0.0, 1.0))
        self._weights = np.repeat(rarity, frequency) * counts * (_K1 + 1) / (counts + norm[self._texts])
        self._size = len(texts)

    def nearest(self, query: str, count: int) -> list[int]:
        """Return at most ``count`` texts that share a word with the query, best first, ties in their order."""
        scores: NDArray[np.float64] = np.zeros(self._size)
        for word in dict.fromkeys(words_of(query)):
            number = self._words.get(word)
            if number is not None:
                entries = slice(self._first[number], self._first[number + 1])
                scores[self._texts[entries]] += self._weights[entries]
        best = np.argsort(-scores, kind="stable")[:count]
        return [int(index) for index in best if scores[index] > 0]
