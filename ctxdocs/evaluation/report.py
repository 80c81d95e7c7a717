"""What an evaluation leaves behind for people: ``results.csv`` and ``report.html``."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from ctxdocs.evaluation.page import page
from ctxdocs.evaluation.rows import write_text
from ctxdocs.evaluation.summary import Evaluation

CSV_FILE, PAGE_FILE = "results.csv", "report.html"


def write_reports(evaluation: Evaluation, folder: Path) -> None:
    """Write both files.

    Raises
    ------
    StorageError
        If one cannot be written.
    """
    write_text(folder / CSV_FILE, table(evaluation))
    write_text(folder / PAGE_FILE, page(evaluation))


def table(evaluation: Evaluation) -> str:
    """Return the scores as CSV, a line for each; every label that some task breaks results down by is a column."""
    labels = list(dict.fromkeys(name for task in evaluation.tasks.values() for name in task.groups))
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["task", "model", "reading", *labels, "metric", "mean", "low", "high", "examples"])
    for score in evaluation.scores:
        group = [score.group.get(name, "") for name in labels]
        value = score.value
        numbers = [f"{number:.6g}" for number in (value.mean, value.low, value.high)]
        writer.writerow([score.task, score.model, score.reading, *group, score.metric, *numbers, value.count])
    return stream.getvalue()
