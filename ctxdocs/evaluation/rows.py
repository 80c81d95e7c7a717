"""One row for every example that was tried, in a file that only grows: an interrupted evaluation goes on from it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ctxdocs.errors import InputError, StorageError

ROWS_FILE, RESULTS_FILE = "rows.jsonl", "results.json"


@dataclass(frozen=True)
class Row:
    """What came of one example, read by one model in one way.

    Parameters
    ----------
    model, task, reading, example : str
        What was tried; together they are unique.
    metrics : dict
        Values by metric; empty where the example was skipped.
    costs : dict
        ``context_tokens``, ``slots``, ``bytes``.
    labels : dict
        What results are broken down by.
    cluster : str
        Rows of one cluster are resampled together.
    seconds : dict
        ``compress`` and ``read``: the batch's time, shared evenly.
    process : int
        Counts the runs into one folder: times are compared within one of them only.
    question, output : str
        What was asked and written.
    answers : list of str
        What would have been right.
    skipped : str
        Why the example could not be tried; empty where it was.
    """

    model: str
    task: str
    reading: str
    example: str
    metrics: dict[str, float] = field(default_factory=dict)
    costs: dict[str, int] = field(default_factory=dict)
    labels: dict[str, Any] = field(default_factory=dict)
    cluster: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    process: int = 0
    question: str = ""
    output: str = ""
    answers: list[str] = field(default_factory=list)
    skipped: str = ""

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Model, task, reading and example."""
        return self.model, self.task, self.reading, self.example


class RowStore:
    """The rows of one evaluation, in memory and, if a folder is given, in its ``rows.jsonl``.

    Parameters
    ----------
    config : dict
        Everything that decides the rows, JSON-able.
    folder : path, optional
        Where to keep them; made if it is not there. Rows of the same evaluation that are in it are taken over.

    Raises
    ------
    InputError
        If the folder holds another evaluation.
    StorageError
        If the folder or its files cannot be read or written.
    """

    def __init__(self, config: Mapping[str, Any], folder: Path | None = None) -> None:
        self.config: dict[str, Any] = json.loads(json.dumps(config))
        self.folder = folder
        self.rows: dict[tuple[str, str, str, str], Row] = {}
        #: What became known of the models while they were loaded.
        self.models: dict[str, dict[str, Any]] = {}
        self.left_out: dict[str, dict[str, int]] = {}
        self.process = 1
        if folder is not None:
            self._open(folder)

    def append(self, rows: Sequence[Row]) -> None:
        """Add the rows of one batch; in the file they are there all at once."""
        self.rows.update((row.key, row) for row in rows)
        if self.folder is not None:
            lines = "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
            path = self.folder / ROWS_FILE
            try:
                with path.open("a", encoding="utf-8") as file:
                    file.write(lines)
            except OSError as error:
                raise StorageError(f"{path}: cannot be written ({error.strerror or error})") from error

    def register(self, label: str, facts: Mapping[str, Any]) -> None:
        """Note what a model is.

        Raises
        ------
        InputError
            If the folder's rows were made by another model under this label.
        """
        known = self.models.get(label)
        if known is not None and known.get("fingerprint") != facts["fingerprint"]:
            raise InputError(
                f"{self.folder} holds rows of another model {label} ({str(known.get('fingerprint'))[:12]}, not "
                f"{str(facts['fingerprint'])[:12]})",
                "its weights or settings have changed: give another --output",
            )
        self.models[label] = dict(facts)
        self.save({})

    def save(self, results: Mapping[str, Any]) -> None:
        """Write ``results.json``: the configuration, the models, and what is given."""
        if self.folder is None:
            return
        values = {"format": 1, "config": self.config, "models": self.models, "left_out": self.left_out, **results}
        write_text(self.folder / RESULTS_FILE, json.dumps(values, indent=1, ensure_ascii=False) + "\n")

    def _open(self, folder: Path) -> None:
        results, rows = folder / RESULTS_FILE, folder / ROWS_FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stored = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else None
            if stored is None and any(folder.iterdir()):
                raise InputError(f"{folder} is not empty and holds no evaluation", "give another --output")
            if stored is not None:
                self._check(stored.get("config", {}), folder)
                self.models, self.left_out = stored.get("models", {}), stored.get("left_out", {})
            if rows.is_file():
                self.rows = {row.key: row for row in _read(rows)}
        except (OSError, json.JSONDecodeError) as error:
            raise StorageError(f"{folder}: cannot be read or written ({error})", "give another --output") from error
        self.process = 1 + max((row.process for row in self.rows.values()), default=0)
        self.save({})

    def _check(self, stored: Mapping[str, Any], folder: Path) -> None:
        differing = [name for name in {**stored, **self.config} if stored.get(name) != self.config.get(name)]
        if differing:
            name = sorted(differing)[0]
            raise InputError(
                f"{folder} holds another evaluation: there {name} is {_short(stored.get(name))}, and here it is "
                f"{_short(self.config.get(name))}",
                "give another --output, or the same options to go on with that one",
            )


def write_text(path: Path, text: str) -> None:
    """Write a file at once or not at all.

    Raises
    ------
    StorageError
        If it cannot be written.
    """
    partial = path.with_name(f"{path.name}.part")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        partial.unlink(missing_ok=True)


def _read(path: Path) -> Iterator[Row]:
    """Yield the rows of a file; a last line that an interruption cut off is taken away from it."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)
    for number, line in enumerate(data[:whole].splitlines(), 1):
        try:
            yield Row(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise InputError(f"{path}:{number}: no row of an evaluation", "give another --output") from error


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:79] + "…"
