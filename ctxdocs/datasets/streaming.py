"""Records in a shuffled order that a seed decides, without holding a whole file in memory."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from ctxdocs.datasets.drawing import below, generator, weighted
from ctxdocs.datasets.files import Line, PathsLike, find_files
from ctxdocs.datasets.reading import OnError, Skipped, checked, lines_of, no_record, record_of
from ctxdocs.datasets.records import Record
from ctxdocs.errors import InputError

#: Records held in memory unless told otherwise.
BUFFER = 4096


def stream_records(
    paths: PathsLike,
    *,
    seed: int,
    epoch: int = 0,
    start: int = 0,
    buffer: int = BUFFER,
    weights: Sequence[float] | None = None,
    on_error: OnError = "raise",
    skipped: Skipped | None = None,
) -> Iterator[Record]:
    """Yield the records of one epoch, shuffled.

    Seed, epoch, paths, buffer and weights decide the order, on every machine. The files are read side by side, and
    every record waits in a buffer until it is drawn: records of one place in a file come apart by about ``buffer``
    records, and nothing but the buffer is in memory.

    Parameters
    ----------
    paths : path or iterable of paths
        Files of JSON lines, or folders of them.
    seed, epoch : int
        The same two give the same order; every epoch has its own.
    start : int, optional
        Records to leave out at the beginning: as many as were drawn before an interruption. The stream then goes on
        as if it had never stopped. They are read again, but not parsed.
    buffer : int, optional
        Records in memory, at most.
    weights : sequence of float, optional
        One positive number per path. Records are drawn from the paths in these proportions; a path that is through
        starts over, and the epoch ends when every one has been read to its end at least once. By default every
        record comes exactly once an epoch, and files are drawn from in proportion to their size on disk.
    on_error, skipped
        As for :func:`read_records`.

    Raises
    ------
    InputError
        If an argument cannot be used.
    DocumentError
        As for :func:`read_records`.
    """
    names = [paths] if isinstance(paths, str | Path) else list(paths)
    if buffer < 1 or start < 0:
        raise InputError(f"buffer is {buffer} and start is {start}", "at least 1 and 0")
    if weights is not None and (len(weights) != len(names) or not all(weight > 0 for weight in weights)):
        raise InputError(
            f"the weights {list(weights)} do not fit {len(names)} paths", "give one positive number per path"
        )
    groups = [find_files(names)] if weights is None else [find_files(name) for name in names]
    skipped = skipped if skipped is not None else Skipped()
    checked(on_error)
    return _stream(groups, weights, generator(seed, epoch), start, buffer, on_error, skipped)


def _stream(
    groups: Sequence[Sequence[Path]],
    weights: Sequence[float] | None,
    rng: random.Random,
    start: int,
    buffer: int,
    on_error: OnError,
    skipped: Skipped,
) -> Iterator[Record]:
    if weights is None:
        lines = _once(groups[0], rng, on_error, skipped)
    else:
        lines = _repeated(groups, weights, rng, on_error, skipped)
    drawn = 0
    for line in _shuffled(lines, buffer, rng):
        # Lines that hold no record do not count, so where some may be skipped every line has to be parsed.
        if drawn < start and on_error == "raise":
            drawn += 1
            continue
        record = record_of(line, on_error, skipped)
        if record is not None:
            drawn += 1
            if drawn > start:
                yield record


def _shuffled(lines: Iterator[Line], buffer: int, rng: random.Random) -> Iterator[Line]:
    held: list[Line] = []
    for line in lines:
        held.append(line)
        if len(held) == buffer:
            yield _drawn(held, rng)
    while held:
        yield _drawn(held, rng)


def _once(files: Sequence[Path], rng: random.Random, on_error: OnError, skipped: Skipped) -> Iterator[Line]:
    """Read all files side by side, each once; large ones are drawn from more often, so that all end together."""
    live = [(file.stat().st_size, _lines(file, on_error, skipped)) for file in files]
    while live:
        chosen = weighted([size for size, _ in live], rng)
        line = next(live[chosen][1], None)
        if line is None:
            del live[chosen]
        else:
            yield line


def _repeated(
    groups: Sequence[Sequence[Path]], weights: Sequence[float], rng: random.Random, on_error: OnError, skipped: Skipped
) -> Iterator[Line]:
    """Read groups of files in proportion to weights, over and over, until each has been read once."""
    live = [_once(group, rng, on_error, skipped) for group in groups]
    through = [False] * len(groups)
    while True:
        chosen = weighted(weights, rng)
        line = next(live[chosen], None)
        if line is None:
            through[chosen] = True
            if all(through):
                return
            live[chosen] = _once(groups[chosen], rng, on_error, skipped)
            line = next(live[chosen])
        yield line


def _lines(file: Path, on_error: OnError, skipped: Skipped) -> Iterator[Line]:
    empty = True
    for line in lines_of(file, on_error, skipped):
        empty = False
        yield line
    if empty:
        raise no_record(file)


def _drawn(held: list[Line], rng: random.Random) -> Line:
    chosen = below(len(held), rng)
    held[chosen], held[-1] = held[-1], held[chosen]
    return held.pop()
