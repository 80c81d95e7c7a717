"""Which examples each batch holds: a pure function of the seed and the batch's number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from ctxdocs.errors import InputError
from ctxdocs.training.examples import Examples

#: Number of an example, and of the draw that made it, which decides what is random about it.
Key = tuple[int, int]


class Drawn(Dataset[dict[str, Any]]):
    """Examples by their keys, the same wherever and whenever they are built.

    Parameters
    ----------
    examples : Examples
        What there is.
    seed : int
        With a key's draw it decides what is random about an example.
    """

    def __init__(self, examples: Examples, seed: int) -> None:
        self.examples, self.seed = examples, seed

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        index, draw = key
        return self.examples.example(index, np.random.default_rng([self.seed, draw]))


class Batches:
    """Batches of a run from its first to its last, in one go: it is resumed by leaving the first ones out.

    Every pass over the data has its own order. What stands in one batch, and in the batches of all devices at the
    same time, is of one group; what is left over in a group is left out of that pass, or makes smaller batches.

    Parameters
    ----------
    groups : sequence of int
        Of each example.
    batch_size : int
        Examples per batch.
    devices : int
        Batches that run at the same time.
    seed : int
        Decides the order.
    leftovers : {"dropped", "kept"}
        What becomes of examples that do not fill a batch; with several devices they are always dropped.

    Raises
    ------
    InputError
        If no group fills a batch.
    """

    drop_last = True  # asked for by accelerate, as batch_size is

    def __init__(
        self,
        groups: Sequence[int] | NDArray[np.int64],
        batch_size: int,
        devices: int,
        seed: int,
        leftovers: str = "dropped",
    ) -> None:
        self.batch_size, self.devices, self.seed = batch_size, devices, seed
        self._keeps = leftovers == "kept" and devices == 1
        self._order = np.argsort(np.asarray(groups), kind="stable")
        _, counts = np.unique(np.asarray(groups), return_counts=True)
        self._ends = np.cumsum(counts)
        #: Batches of one pass.
        self.per_pass = int(((counts + self._keeps * (batch_size - 1)) // (batch_size * devices)).sum()) * devices
        self.total = self.per_pass
        if not self.per_pass:
            raise InputError(
                f"{len(self._order)} sequences do not fill a batch of {batch_size * devices} that belong together",
                "give more data, or a smaller batch_size",
            )

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[list[Key]]:
        number = 0
        while True:
            for batch in self._pass(number // self.per_pass):
                if number == self.total:
                    return
                first = number * self.batch_size
                yield [(int(index), first + place) for place, index in enumerate(batch)]
                number += 1

    def _pass(self, number: int) -> Iterator[NDArray[np.int64]]:
        rng = np.random.default_rng([self.seed, number])
        together = self.batch_size * self.devices
        rounds = []
        start = 0
        for end in self._ends:
            group = rng.permutation(self._order[start:end])
            whole = len(group) // together * together
            rounds += list(group[:whole].reshape(-1, self.devices, self.batch_size))
            if self._keeps and whole < len(group):
                rounds.append(group[None, whole:])
            start = int(end)
        for place in rng.permutation(len(rounds)):
            yield from rounds[place]
