"""Which part of the data a record belongs to: training, validation or test; by its title, never by its line."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Literal

from ctxdocs.datasets.files import PathsLike, find_files, writing
from ctxdocs.datasets.reading import OnError, Skipped, read_records, record_line
from ctxdocs.datasets.records import Document, Question, Record, record_id
from ctxdocs.errors import InputError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
#: What publishers call what may be trained on.
TRAINABLE = ("train", "all")
_STEPS = 10_000


def split_of(title: str, *, seed: int = 0, validation: float = 0.01, test: float = 0.01) -> Split:
    """Return the split that a title belongs to, by its hash: the same on every machine and in every version.

    Parameters
    ----------
    title : str
        Case and surrounding blanks do not matter.
    seed : int, optional
        Another seed holds out other titles.
    validation, test : float, optional
        Shares that are held out, in steps of 1/10,000.

    Raises
    ------
    InputError
        If a share is negative, or both together leave nothing to train on.
    """
    if not (validation >= 0 and test >= 0 and validation + test < 1):
        raise InputError(f"shares of {validation} and {test} cannot be held out", "give two numbers from 0 to below 1")
    name = title.strip().lower() + (f"\0{seed}" if seed else "")
    value = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % _STEPS
    if value < round(validation * _STEPS):
        return "validation"
    return "test" if value < round(validation * _STEPS) + round(test * _STEPS) else "train"


def split_title(record: Record) -> str:
    """Return what a record is split by: its title, or else the text it is about, so that no text is in two splits."""
    if record.title.strip():
        return record.title
    if isinstance(record, Document):
        return record.text
    if not record.contexts:
        return record.question
    return record.contexts[record.relevant[0] if record.relevant else 0]


@dataclass
class SplitReport:
    """What :func:`split_files` wrote.

    Parameters
    ----------
    seed, validation, test, published
        The arguments.
    records : dict of str to int
        Records per split.
    left_out : int
        Records whose publishers put them in a split that is not in ``published``.
    skipped : int
        Lines that held no record.
    """

    seed: int
    validation: float
    test: float
    published: list[str]
    records: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    left_out: int = 0
    skipped: int = 0


def split_files(
    paths: PathsLike,
    output: str | Path,
    *,
    seed: int = 0,
    validation: float = 0.01,
    test: float = 0.01,
    published: Sequence[str] | None = TRAINABLE,
    on_error: OnError = "raise",
) -> SplitReport:
    """Divide files of records into training, validation and test data, by title.

    ``output`` gets folders ``train``, ``validation`` and ``test``, in which every file keeps its name; the ids of what
    is held out, one a line, in ``validation.ids.txt`` and ``test.ids.txt``; and ``split.json``, the report.

    Parameters
    ----------
    paths : path or iterable of paths
        Files of records, or folders of them.
    output : path
        A folder; it is made if it is not there.
    seed, validation, test
        As for :func:`split_of`; what decides is :func:`split_title`.
    published : sequence of str, optional
        Questions that their publishers put in another split than these are left out altogether, so that published
        test sets are never trained on; a question that names no split stays. None keeps all.
    on_error : {"raise", "skip"}, optional
        As for :func:`ctxdocs.datasets.read_records`.

    Raises
    ------
    InputError
        If two files have the same name, or an argument cannot be used.
    """
    split_of("", seed=seed, validation=validation, test=test)
    files, output, skipped = find_files(paths), Path(output), Skipped()
    names = Counter(file.name for file in files)
    if repeated := [name for name, count in names.items() if count > 1]:
        raise InputError(f"two files have the name {repeated[0]}", "split them into different folders")
    if {file.resolve() for file in files} & {(output / split / name).resolve() for split in SPLITS for name in names}:
        raise InputError(f"{output} holds the files to be split", "write to another folder")
    report = SplitReport(seed, validation, test, [] if published is None else list(published))
    ids: dict[Split, list[str]] = {split: [] for split in SPLITS}
    for file in files:
        with _Divided(output, file.name) as parts:
            for record in read_records(file, on_error=on_error, skipped=skipped):
                own = record.split if isinstance(record, Question) else ""
                if published is not None and own and own not in published:
                    report.left_out += 1
                    continue
                split = split_of(split_title(record), seed=seed, validation=validation, test=test)
                parts.write(split, record)
                report.records[split] += 1
                if split != "train":
                    ids[split].append(record_id(record))
    report.skipped = skipped.count
    for split in SPLITS[1:]:
        _write_text(output / f"{split}.ids.txt", "".join(f"{name}\n" for name in ids[split]))
    _write_text(output / "split.json", json.dumps(asdict(report), indent=1) + "\n")
    return report


class _Divided(ExitStack):
    """One file's records in up to three files; a file is made with its first record."""

    def __init__(self, output: Path, name: str) -> None:
        super().__init__()
        self._paths = {split: output / split / name for split in SPLITS}
        self._open: dict[str, IO[bytes]] = {}

    def __enter__(self) -> _Divided:
        for path in self._paths.values():
            path.unlink(missing_ok=True)
        return self

    def write(self, split: Split, record: Record) -> None:
        if split not in self._open:
            self._open[split] = self.enter_context(writing(self._paths[split]))
        self._open[split].write(record_line(record))


def _write_text(path: Path, text: str) -> None:
    with writing(path) as file:
        file.write(text.encode())
