"""``ctxdocs doctor``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ctxdocs.cli.failures import USER_ERROR
from ctxdocs.cli.options import device_option, json_option, open_library
from ctxdocs.cli.output import clean, print_json, silence, terminal

if TYPE_CHECKING:
    from ctxdocs.doctor import Check

_STYLES = {"ok": "green", "note": "yellow", "FAIL": "bold red"}


@click.command()
@click.option(
    "--model", metavar="NAME", help="A checkpoint's folder or hub name; default: the library's, or the bundled."
)
@click.option(
    "--library",
    "library_path",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Read its chunks, with its model; default: made-up texts.",
)
@click.option("--documents", "most", type=int, default=8, show_default=True, help="Most documents read together.")
@click.option("--document-tokens", type=int, default=128, show_default=True, help="Most tokens of a document.")
@device_option
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Of the model; auto: as saved, or as the library's.",
)
@json_option
def doctor(
    model: str | None,
    library_path: Path | None,
    most: int,
    document_tokens: int,
    device: str,
    dtype: str,
    as_json: bool,
) -> int:
    """Check that a model reads memories as it reads text, and measure what they cost.

    The exit code is 1 if an exact memory is not read as its text.
    """
    library = None if library_path is None else open_library(library_path)
    silence()
    from ctxdocs.doctor import examine, examined

    compressor, trained = examined(model, library, device=device, dtype=dtype)
    if trained and not as_json:
        _show_trained(trained, compressor.method)
    report = examine(
        compressor, library, most=most, document_tokens=document_tokens, on_check=None if as_json else _show
    )
    if as_json:
        print_json({**report.to_dict(), "base_of": trained})
    elif report.failed:
        names = ", ".join(check.name for check in report.failed)
        terminal(sys.stdout).print(f"FAIL: {names}. Do not rely on memories of this model.", style=_STYLES["FAIL"])
    return USER_ERROR if report.failed else 0


def _show_trained(trained: str, method: str) -> None:
    terminal(sys.stdout).print(
        f"{trained} is trained, and its memories are compared with no prefill: its base model is examined, as {method}."
    )


def _show(check: Check) -> None:
    """Print a line as soon as it is known."""
    console = terminal(sys.stdout)
    console.print(f"{check.verdict:4}", style=_STYLES[check.verdict], end="  ")
    console.print(f"{clean(check.name):16}  {clean(check.message)}")
