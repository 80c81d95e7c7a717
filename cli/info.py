"""``ctxdocs info``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from ctxdocs.cli.methods import described_method
from ctxdocs.cli.options import json_option, library_option, open_library
from ctxdocs.cli.output import aligned, clean, counted, print_json, shown, size, terminal


@click.command()
@library_option
@click.option("--documents", "with_documents", is_flag=True, help="List the documents too.")
@json_option
def info(library_path: Path, with_documents: bool, as_json: bool) -> None:
    """Show what a library is made of and holds."""
    library = open_library(library_path)
    values = library.info()
    documents = library.store.documents() if with_documents else iter(())
    if as_json:
        listing = {"document_list": [asdict(document) for document in documents]} if with_documents else {}
        print_json({**values, **listing})
        return
    console = terminal(sys.stdout)
    console.print(aligned(_rows(values)))
    if with_documents:
        console.print()
    for document in documents:
        console.print(
            f"{shown(document.uri)}  {counted(document.chunks, 'chunk')}, {counted(document.tokens, 'token')}"
        )


def _rows(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    compressor, embedder = values["compressor"], values["embedder"]
    yield "library", shown(values["library"])
    yield (
        "documents",
        f"{values['documents']:,}, {counted(values['tokens'], 'token')} in {counted(values['chunks'], 'chunk')}",
    )
    memories = f"{counted(values['slots'], 'slot')}, {size(values['memory_bytes'])}, codec {values['codec']}"
    if values["slots"]:
        memories += f", {values['tokens'] / values['slots']:.1f} tokens per slot"
    yield "memories", memories
    yield "on disk", size(values["disk_bytes"])
    name = clean(str(compressor["name_or_path"] or "made in Python"))
    yield "compressor", f"{name} ({compressor['dtype']}, {compressor['fingerprint'][:12]})"
    yield "method", described_method(compressor)
    yield "embedder", f"{clean(embedder['name'])} ({embedder['dimension']} dimensions), index {values['index']}"
    yield "chunks", f"{values['chunk_tokens']} tokens, {values['overlap_tokens']} shared with the neighbour"
