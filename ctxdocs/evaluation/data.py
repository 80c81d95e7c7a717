"""The files an evaluation is given: documents, questions, or lines of a benchmark's own format."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ctxdocs.corpus import file_digest
from ctxdocs.datasets import Document, Question, Record, split_of, split_title, stream_records
from ctxdocs.datasets.files import find_files, parse_line, read_lines
from ctxdocs.errors import DocumentError, InputError

SPLITS = ("all", "validation", "test")


class Line(NamedTuple):
    """One JSON object of a file, and where it stands (``"file:line"``)."""

    path: Path
    place: str
    values: dict[str, Any]


class Data:
    """Files of records.

    Parameters
    ----------
    paths : sequence of path
        Files of JSON lines (plain, ``.gz``, ``.zst``), or folders of them.
    split : {"all", "validation", "test"}
        Records to take, by their titles (:func:`ctxdocs.datasets.split_of`).
    held_out : float
        Share of the titles in each of the two splits that are held out; that of the model's training.

    Raises
    ------
    InputError
        If a path does not exist, or the split is unknown.
    """

    def __init__(self, paths: Sequence[str | Path] = (), *, split: str = "all", held_out: float = 0.01) -> None:
        if split not in SPLITS:
            raise InputError(f"unknown split {split!r}", f"choose among {', '.join(SPLITS)}")
        self.files = find_files(paths) if paths else []
        self.split = split
        self.held_out = held_out

    def documents(self, seed: int) -> Iterator[Document]:
        """Yield documents, shuffled by the seed."""
        return (record for record in self._records(seed) if isinstance(record, Document))

    def questions(self, seed: int) -> Iterator[Question]:
        """Yield questions, shuffled by the seed."""
        return (record for record in self._records(seed) if isinstance(record, Question))

    def lines(self) -> Iterator[Line]:
        """Yield JSON objects in the order of the files.

        Raises
        ------
        DocumentError
            If a line holds none.
        """
        for path in self.files:
            for line in read_lines(path):
                values = parse_line(line)
                if not isinstance(values, dict):
                    raise DocumentError(f"{line.place}: no JSON object", "every line holds one")
                yield Line(path, line.place, values)

    def kinds(self) -> set[str]:
        """Return which of ``"documents"`` and ``"questions"`` the first records of the files are."""
        kinds = set()
        for path in self.files:
            first = next(iter(stream_records(path, seed=0, buffer=1)))
            kinds.add("documents" if isinstance(first, Document) else "questions")
        return kinds

    @functools.cached_property
    def digests(self) -> dict[str, str]:
        """The files' names by their sha256: another file under the same name is another evaluation."""
        return {file_digest(path): path.name for path in self.files}

    def _records(self, seed: int) -> Iterator[Record]:
        if not self.files:
            return
        for record in stream_records(self.files, seed=seed):
            if self.split == "all" or self.split == self._split_of(record):
                yield record

    def _split_of(self, record: Record) -> str:
        return split_of(split_title(record), validation=self.held_out, test=self.held_out)
