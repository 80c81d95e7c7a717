"""What is written to the terminal: plain, aligned, and free of whatever documents and file names smuggle in."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

# Control characters but for newline and tab, marks that turn the writing direction, and lone surrogates.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def print_json(value: dict[str, Any]) -> None:
    """Write one JSON object on one line of standard output, in ASCII, which every stream takes."""
    click.echo(json.dumps(value))


def clean(text: str) -> str:
    """Return the text with every character that a terminal could obey replaced."""
    return _UNSAFE.sub("\ufffd", text)


def excerpt(text: str, most: int = 240) -> str:
    """Return the beginning of a text on one line, cleaned, at most ``most`` characters."""
    line = clean(" ".join(text.split()))
    return line if len(line) <= most else line[: most - 1].rstrip() + "…"


def shown(uri: str | Path) -> str:
    """Return a document's uri, cleaned, and relative to the working directory when below it."""
    return clean(str(uri).removeprefix(Path.cwd().resolve().as_posix() + "/"))


def counted(number: int, noun: str) -> str:
    """Return ``"1 chunk"``, ``"1,234 chunks"``."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def size(nbytes: int) -> str:
    """Return ``"1.2 MB"``."""
    from rich.filesize import decimal

    return decimal(nbytes)


def terminal(stream: IO[str]) -> Console:
    """Return a console that takes text as it is: no markup, no emoji codes, no highlighting, no wrapping."""
    from rich.console import Console

    return Console(file=stream, markup=False, emoji=False, highlight=False, soft_wrap=True)


def aligned(rows: Iterable[tuple[str, ...]], *, right: Collection[int] = ()) -> str:
    """Return rows as lines of aligned columns; ``right`` names the columns that align to the right."""
    from rich.cells import cell_len

    columns = list(zip(*rows, strict=True))
    for index, column in enumerate(columns):
        widest = max(map(cell_len, column))
        padding = [" " * (widest - cell_len(cell)) for cell in column]
        pairs = zip(padding, column, strict=True) if index in right else zip(column, padding, strict=True)
        columns[index] = tuple("".join(pair) for pair in pairs)
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def silence() -> None:
    """Keep the log lines and weight-loading bars of the model libraries off the terminal.

    Downloads from the hub keep their progress bars: gigabytes should not arrive in silence.
    """
    import logging
    import warnings

    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging as transformers_logging

    warnings.simplefilter("ignore")
    for name in ("transformers", "sentence_transformers", "huggingface_hub", "pypdf"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    enable_progress_bars()
