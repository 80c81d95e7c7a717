"""Which documents run together: those of similar length, as many as keep a device busy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch


def default_batch_tokens(device: torch.device) -> int:
    """Return how many tokens a batch should hold to keep a device busy."""
    # On a CPU larger batches were slower, in caches too small for them (benchmarks/compress.py --batch-tokens).
    return 1024 if device.type == "cpu" else 65536


def batches_by_length(lengths: Sequence[int], budget: int, at_once: Callable[[int], int] = int) -> Iterator[list[int]]:
    """Group indices of similar length, longest first, so that what runs at once stays within ``budget``.

    Longest first, because a batch that does not fit in memory then fails at once and not at the end. ``at_once`` says
    how much of a length runs at once; default all of it.
    """
    batch: list[int] = []
    share = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * share > budget:
            yield batch
            batch = []
        if not batch:
            share = at_once(lengths[index])
        batch.append(index)
    if batch:
        yield batch
