"""Published data sets become files of records."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ctxdocs.datasets.files import find_files
from ctxdocs.datasets.formats import FORMATS, detect
from ctxdocs.datasets.reading import OnError, Skipped, checked, write_records
from ctxdocs.datasets.records import Document, Question, Record, RecordProblem, parse_record
from ctxdocs.errors import DocumentError, InputError


@dataclass
class RecordCounts:
    """What files of records hold.

    Parameters
    ----------
    documents, questions : int
        Records of either kind.
    characters : int
        Of documents and contexts.
    unanswerable, without_contexts, several_contexts : int
        Of the questions: those that their contexts do not answer, those that have none, those that have several.
    skipped : int
        Records left out because something is wrong with them.
    """

    documents: int = 0
    questions: int = 0
    characters: int = 0
    unanswerable: int = 0
    without_contexts: int = 0
    several_contexts: int = 0
    skipped: int = 0

    def add(self, record: Record) -> None:
        """Count one more."""
        if isinstance(record, Document):
            self.documents += 1
            self.characters += len(record.text)
            return
        self.questions += 1
        self.characters += sum(map(len, record.contexts))
        self.unanswerable += bool(record.contexts) and not record.relevant
        self.without_contexts += not record.contexts
        self.several_contexts += len(record.contexts) > 1

    def to_dict(self) -> dict[str, int]:
        """Return JSON-able values."""
        return asdict(self)


def count_records(records: Iterable[Record]) -> RecordCounts:
    """Count what there is."""
    counts = RecordCounts()
    for record in records:
        counts.add(record)
    return counts


def convert(
    format: str,
    paths: Iterable[str | Path],
    output: str | Path,
    *,
    source: str | None = None,
    split: str | None = None,
    on_error: OnError = "raise",
) -> RecordCounts:
    """Write the records of files in a published format as JSON lines.

    Parameters
    ----------
    format : str
        One of :data:`ctxdocs.datasets.formats.FORMATS`, or ``"auto"``: every file is looked at.
    paths : iterable of paths
        Files, or folders of them.
    output : path
        ``.jsonl``, ``.jsonl.zst`` or ``.jsonl.gz``.
    source, split : str, optional
        What records are to say of themselves where their files do not: the data set's name (by default the file's),
        and the publishers' split, such as ``"dev"``.
    on_error : {"raise", "skip"}, optional
        What a record that cannot be used leads to.

    Raises
    ------
    InputError
        If there is no such format or file.
    DocumentError
        If a file is not in the format, or nothing can be made of a record; with its place.
    StorageError
        If writing fails.
    """
    if format not in (*FORMATS, "auto"):
        raise InputError(f"there is no format {format!r}", f"known are auto, {', '.join(FORMATS)}")
    counts, skipped = RecordCounts(), Skipped()

    def records() -> Iterator[Record]:
        for path in _files(format, paths):
            name = detect(path) if format == "auto" else format
            found = False
            for record in _read(name, path, on_error, skipped):
                found = True
                record = _named(record, source or Path(path.name.removesuffix(".zst").removesuffix(".gz")).stem, split)
                counts.add(record)
                yield record
            if not found:
                raise DocumentError(f"{path}: no record in it", f"it was read as {name}")

    write_records(output, records())
    counts.skipped = skipped.count
    return counts


def _files(format: str, paths: Iterable[str | Path]) -> Iterator[Path]:
    """List files; a folder of texts stays whole, so that titles are relative to it."""
    for path in map(Path, paths):
        if path.is_dir() and (format == "text" or (format == "auto" and detect(path) == "text")):
            yield path
        else:
            yield from find_files(path)


def _read(name: str, path: Path, on_error: OnError, skipped: Skipped) -> Iterator[Record]:
    for place, values in FORMATS[name].read(path):
        try:
            if isinstance(values, DocumentError):
                raise values
            try:
                record = parse_record(values, place)
            except RecordProblem as problem:
                raise DocumentError(f"{place}: {problem.what}", problem.remedy) from problem
        except DocumentError as error:
            if checked(on_error) == "raise":
                raise
            skipped.add(error)
            continue
        yield record


def _named(record: Record, source: str, split: str | None) -> Record:
    changes: dict[str, Any] = {} if record.source else {"source": source}
    if isinstance(record, Question) and split and not record.split:
        changes["split"] = split
    return replace(record, **changes) if changes else record
