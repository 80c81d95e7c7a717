"""``ctxdocs remove``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ctxdocs.cli.options import json_option, library_option, open_library
from ctxdocs.cli.output import counted, print_json, size, terminal


@click.command()
@click.argument("documents", nargs=-1, required=True, metavar="DOCUMENT...")
@library_option
@click.option("--compact", is_flag=True, help="Give the space of removed memories back at once.")
@json_option
def remove(documents: tuple[str, ...], library_path: Path, compact: bool, as_json: bool) -> None:
    """Remove documents from a library.

    A DOCUMENT is a path or uri; a folder stands for every document in it.
    """
    library = open_library(library_path)
    removed = library.remove(documents)
    freed = library.compact() if compact else 0
    if as_json:
        print_json({"removed": removed, "bytes_freed": freed, "library": str(library.path)})
        return
    console = terminal(sys.stdout)
    console.print(f"Removed {counted(removed, 'document')}" + (f", {size(freed)} given back." if compact else "."))
