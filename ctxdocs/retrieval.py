"""Joining rankings of the same chunks by several retrievers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence


def reciprocal_rank_fusion(
    rankings: Sequence[Sequence[tuple[int, float]]], constant: int = 60
) -> list[tuple[int, float]]:
    """Fuse rankings by the sum of ``1 / (constant + rank)`` (Cormack et al., SIGIR 2009).

    Parameters
    ----------
    rankings : sequence of sequence of (int, float)
        Ids with scores, best first; only the order counts.
    constant : int
        Larger values flatten the difference between ranks.

    Returns
    -------
    list of (int, float)
        Ids with fused scores, best first; ties keep the order of first appearance.

    Examples
    --------
    >>> [chunk for chunk, _ in reciprocal_rank_fusion([[(1, 0.9), (2, 0.8)], [(2, 7.0), (3, 5.0)]])]
    [2, 1, 3]
    """
    scores: defaultdict[int, float] = defaultdict(float)
    for ranking in rankings:
        for rank, (item, _) in enumerate(ranking, start=1):
            scores[item] += 1 / (constant + rank)
    return sorted(scores.items(), key=lambda pair: -pair[1])
