"""Records from files, and what becomes of lines that hold none."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ctxdocs.datasets.files import Line, PathsLike, find_files, parse_line, read_lines, writing
from ctxdocs.datasets.records import Record, RecordProblem, parse_record, to_json
from ctxdocs.errors import DocumentError, InputError

logger = logging.getLogger(__name__)

#: What to do with a line that holds no record.
OnError = Literal["raise", "skip"]
_EXAMPLES = 5


@dataclass
class Skipped:
    """Lines that were left out.

    Parameters
    ----------
    count : int
        How many.
    examples : list of str
        Messages of the first few.
    """

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, error: DocumentError) -> None:
        """Count one more; the first ones are logged as warnings."""
        self.count += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(str(error))
            logger.warning("skipped: %s", error)


def read_records(path: PathsLike, *, on_error: OnError = "raise", skipped: Skipped | None = None) -> Iterator[Record]:
    """Yield documents and questions in the order of their lines.

    Parameters
    ----------
    path : path or iterable of paths
        ``.jsonl``, ``.jsonl.zst`` or ``.jsonl.gz``; a folder stands for all such files in it, sorted.
    on_error : {"raise", "skip"}, optional
        What a line that holds no record leads to. Files that are missing, cut off or damaged always raise.
    skipped : Skipped, optional
        Counts what ``on_error="skip"`` leaves out.

    Raises
    ------
    InputError
        If there is no such file.
    DocumentError
        ``"file:line: what (what to do)"``: broken JSON, an empty line, not UTF-8, missing keys, wrong types, blank
        text; or a file without any record.
    """
    skipped = skipped if skipped is not None else Skipped()
    for file in find_files(path):
        found = False
        for line in lines_of(file, on_error, skipped):
            record = record_of(line, on_error, skipped)
            if record is not None:
                found = True
                yield record
        if not found:
            raise no_record(file)


def write_records(path: str | Path, records: Iterable[Record]) -> int:
    """Write records as JSON lines, compressed as the suffix says; return how many. See :func:`read_records`."""
    count = 0
    with writing(path) as file:
        for record in records:
            file.write(record_line(record))
            count += 1
    return count


def record_line(record: Record) -> bytes:
    """Return a record as a line of a file."""
    return json.dumps(to_json(record), ensure_ascii=False).encode() + b"\n"


def lines_of(file: Path, on_error: OnError, skipped: Skipped) -> Iterator[Line]:
    """Yield a file's lines, skipping empty ones if told to."""
    yield from read_lines(file, on_empty=None if checked(on_error) == "raise" else skipped.add)


def record_of(line: Line, on_error: OnError, skipped: Skipped) -> Record | None:
    """Parse one line; None if it holds no record and is to be skipped."""
    try:
        try:
            return parse_record(parse_line(line), line.place)
        except RecordProblem as problem:
            raise DocumentError(f"{line.place}: {problem.what}", problem.remedy) from problem
    except DocumentError as error:
        if checked(on_error) == "raise":
            raise
        skipped.add(error)
        return None


def no_record(file: Path) -> DocumentError:
    """Return the error of a file that holds nothing."""
    return DocumentError(f"{file}: no record in it", "remove the file, or write one JSON object per line")


def checked(on_error: OnError) -> OnError:
    """Return ``on_error`` if it is one of the two words."""
    if on_error not in ("raise", "skip"):
        raise InputError(f"on_error is {on_error!r}", "it is 'raise' or 'skip'")
    return on_error
