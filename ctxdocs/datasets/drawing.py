"""Random draws that come out the same on every machine and in every Python version.

Of ``random.Random``, only ``random()`` is promised to stay the same for a seed; these draws use nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def generator(*seeds: int | str) -> random.Random:
    """Return a generator that the seeds decide, all of them together."""
    return random.Random("/".join(map(str, seeds)))


def below(count: int, rng: random.Random) -> int:
    """Return one of 0 to ``count - 1``."""
    return int(rng.random() * count)


def weighted(weights: Sequence[float], rng: random.Random) -> int:
    """Return an index, drawn in proportion to the weights."""
    point = rng.random() * sum(weights)
    for index, weight in enumerate(weights):
        point -= weight
        if point < 0:
            return index
    return len(weights) - 1


def in_random_order(items: Sequence[T], rng: random.Random) -> Iterator[T]:
    """Yield the items in a random order, at a cost that grows with what is taken and not with what is there."""
    moved: dict[int, int] = {}
    for last in range(len(items) - 1, -1, -1):
        chosen = below(last + 1, rng)
        yield items[moved.get(chosen, chosen)]
        moved[chosen] = moved.get(last, last)
