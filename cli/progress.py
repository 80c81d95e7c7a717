"""The bar that runs while documents are compressed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ctxdocs.cli.output import terminal

if TYPE_CHECKING:
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
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Column

    def rigid() -> Column:  # where the terminal is narrow the bar gives way, not the figures
        return Column(no_wrap=True)

    bar = Progress(
        TextColumn("Compressing"),
        BarColumn(),
        MofNCompleteColumn(table_column=rigid()),
        TextColumn("documents, {task.fields[tokens]:,} tokens"),
        TimeElapsedColumn(table_column=rigid()),
        console=terminal(sys.stderr),
        transient=True,
    )
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
