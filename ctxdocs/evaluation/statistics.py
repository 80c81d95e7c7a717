"""Means with bootstrap intervals. The same values always give the same interval."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 2000
_AT_ONCE = 100


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % bootstrap interval.

    Parameters
    ----------
    mean, low, high : float
        The interval is that of percentiles.
    count : int
        Values behind it.
    """

    mean: float
    low: float
    high: float
    count: int

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside: for a difference, whether its sign is clear."""
        return self.low > 0 or self.high < 0


def bootstrap(values: ArrayLike, clusters: Sequence[Hashable] | NDArray[np.int64] | None = None) -> Interval:
    """Return the mean of values, with an interval from resampled clusters.

    Parameters
    ----------
    values : array_like
        ``[values]``, at least one.
    clusters : sequence, optional
        Which values belong together (questions about one document, say) and are resampled together; by default each
        stands alone. The mean counts values alike, however many of them a cluster has.

    Returns
    -------
    Interval
        From 2000 resamples drawn with a fixed seed.
    """
    numbers = np.asarray(values, dtype=np.float64)
    # Clusters in the order in which they first appear, so that their names do not matter.
    order: dict[Hashable, int] = {}
    owner = [
        order.setdefault(cluster, len(order)) for cluster in (range(len(numbers)) if clusters is None else clusters)
    ]
    sums, counts = np.bincount(owner, weights=numbers), np.bincount(owner)
    rng = np.random.default_rng(0)
    means = []
    for _ in range(RESAMPLES // _AT_ONCE):
        drawn = rng.integers(len(sums), size=(_AT_ONCE, len(sums)))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Interval(float(numbers.mean()), float(low), float(high), len(numbers))
