"""``ctxdocs search``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ctxdocs.cli.hits import described
from ctxdocs.cli.options import (
    device_option,
    json_option,
    k_option,
    library_option,
    open_library,
    rerank_option,
    retrieval_option,
)
from ctxdocs.cli.output import excerpt, print_json, silence, terminal


@click.command()
@click.argument("query")
@library_option
@k_option
@retrieval_option
@rerank_option
@device_option
@json_option
def search(query: str, library_path: Path, k: int, retrieval: str, rerank: str, device: str, as_json: bool) -> None:
    """Find the chunks that fit a query best."""
    library = open_library(library_path, device=device)
    silence()
    hits = library.search(query, k, retrieval=retrieval, rerank=rerank)  # type: ignore[arg-type]
    if as_json:
        print_json({"query": query, "hits": [hit.to_dict() for hit in hits]})
        return
    console = terminal(sys.stdout)
    if not hits:
        console.print("Nothing found.")
    for number, hit in enumerate(hits, 1):
        console.print("  ".join(described(number, hit)), style="bold")
        console.print(f"   {excerpt(hit.text)}")
