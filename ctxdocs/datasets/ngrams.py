"""Which texts share a run of words with others: n-grams as 64-bit hashes, found by the million."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ctxdocs.datasets.words import words_of
from ctxdocs.errors import InputError

Hashes = NDArray[np.uint64]

_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd: multiplying by it loses nothing modulo 2**64
_FILTER_BITS = 24
_MOST_WORDS = 2_000_000  # remembered at once


class NgramHasher:
    """Hashes every run of ``n`` words of a text.

    Words are lower-cased and stripped of punctuation. A word is hashed by BLAKE2, a run by a polynomial of its words
    modulo 2**64: the same on every machine. That two of a billion pairs collide has a chance of one in ten million.

    Parameters
    ----------
    n : int
        Words per run.
    """

    def __init__(self, n: int) -> None:
        if n < 1:
            raise InputError(f"runs of {n} words", "give at least 1")
        self.n = n
        self._words = _WordHashes()

    def hash_words(self, words: Sequence[str]) -> Hashes:
        """Return the hashes of all runs, uint64 ``[max(words - n + 1, 0)]``."""
        count = len(words) - self.n + 1
        if count < 1:
            return np.empty(0, np.uint64)
        if len(self._words) > _MOST_WORDS:
            self._words.clear()
        hashes = np.fromiter(map(self._words.__getitem__, words), dtype=np.uint64, count=len(words))
        runs = hashes[:count].copy()
        for place in range(1, self.n):
            runs *= _FACTOR
            runs += hashes[place : place + count]
        return runs


class NgramIndex:
    """The n-grams of some texts, each with the number of the first text that holds it.

    Parameters
    ----------
    hasher : NgramHasher
        Says what a run is.
    texts : sequence of sequence of str
        Words of every text, as :func:`words_of` gives them.
    """

    def __init__(self, hasher: NgramHasher, texts: Sequence[Sequence[str]]) -> None:
        self.hasher = hasher
        hashes = [hasher.hash_words(words) for words in texts]
        self._texts = np.repeat(np.arange(len(texts)), [len(runs) for runs in hashes])
        together = np.concatenate(hashes) if hashes else np.empty(0, np.uint64)
        self._hashes, first, self._runs = np.unique(together, return_index=True, return_inverse=True)
        self._owners = self._texts[first]
        # Almost every run of another text is none of these: one look at a table that fits the cache says so.
        self._filter = np.zeros(2**_FILTER_BITS, dtype=bool)
        self._filter[self._buckets(self._hashes)] = True

    def __len__(self) -> int:
        return len(self._hashes)

    def owner(self, run: int) -> int:
        """Return the number of the first text that holds a run."""
        return int(self._owners[run])

    def counts(self, runs: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Return how many places of every text some of the runs stand at, int64 ``[texts]``; bool ``[len(self)]``."""
        texts = int(self._texts[-1]) + 1 if len(self._texts) else 0
        return np.bincount(self._texts[runs[self._runs]], minlength=texts)

    def find(self, text: str) -> list[tuple[int, int, str]]:
        """Return where a text shares a run: word number, number of the run, its words."""
        words = words_of(text)
        runs = self.hasher.hash_words(words)
        maybe = np.flatnonzero(self._filter[self._buckets(runs)])
        if not len(maybe):
            return []
        entries = np.minimum(np.searchsorted(self._hashes, runs[maybe]), len(self._hashes) - 1)
        shared = self._hashes[entries] == runs[maybe]
        return [
            (int(word), int(entry), " ".join(words[word : word + self.hasher.n]))
            for word, entry in zip(maybe[shared], entries[shared], strict=True)
        ]

    @staticmethod
    def _buckets(hashes: Hashes) -> Hashes:
        return hashes >> np.uint64(64 - _FILTER_BITS)


class _WordHashes(dict[str, int]):
    """Hashes of words, worked out when first met."""

    def __missing__(self, word: str) -> int:
        value = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        self[word] = value
        return value
