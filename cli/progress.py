"""The bars that run while documents are compressed, and while models are evaluated."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ctxdocs.cli.output import clean, terminal

if TYPE_CHECKING:
    from rich.progress import Progress

    from ctxdocs.evaluation import Progress as EvaluationProgress
    from ctxdocs.ingestion import AddProgress


@contextmanager
def progress_bar() -> Iterator[Callable[[AddProgress], None] | None]:
    """Give a callback for ``Library.add`` that draws a bar on standard error; None where that is no terminal.

    The bar appears with the first call, so that the progress of a model's download comes before it and not into it,
    and is gone at the end of the block.
    """
    if not sys.stderr.isatty():
        yield None
        return
    bar = _bar("Compressing", "documents, {task.fields[tokens]:,} tokens")
    task = bar.add_task("", start=False, total=None, tokens=0)

    def show(progress: AddProgress) -> None:
        report = progress.report
        done = report.documents + report.unchanged + len(report.failed)
        if not bar.live.is_started:
            bar.start_task(task)
            bar.start()
        bar.update(task, total=progress.total, completed=done, tokens=report.source_tokens)

    try:
        yield show
    finally:
        bar.stop()


@contextmanager
def evaluation_bar() -> Iterator[Callable[[EvaluationProgress], None] | None]:
    """Give a callback for ``evaluate`` that draws a bar on standard error; None where that is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    bar = _bar("Evaluating", "{task.fields[where]}")
    task = bar.add_task("", start=False, total=None, where="")

    def show(progress: EvaluationProgress) -> None:
        if not bar.live.is_started:
            bar.start_task(task)
            bar.start()
        where = clean(f"{progress.model}, {progress.task}")
        bar.update(task, total=progress.total, completed=progress.done, where=where)

    try:
        yield show
    finally:
        bar.stop()


def _bar(verb: str, what: str) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Column

    def rigid() -> Column:  # where the terminal is narrow the bar gives way, not the figures
        return Column(no_wrap=True)

    return Progress(
        TextColumn(verb),
        BarColumn(),
        MofNCompleteColumn(table_column=rigid()),
        TextColumn(what, markup=False),
        TimeElapsedColumn(table_column=rigid()),
        console=terminal(sys.stderr),
        transient=True,
    )
