"""Options that several commands share, and what they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ctxdocs.errors import LibraryError

if TYPE_CHECKING:
    from ctxdocs.library import Library

library_option = click.option(
    "--library",
    "library_path",
    metavar="DIR",
    type=click.Path(path_type=Path),
    default="ctxdocs-library",
    envvar="CTXDOCS_LIBRARY",
    show_default=True,
    show_envvar=True,
    help="The library's folder.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
device_option = click.option(
    "--device", default="auto", show_default=True, help="Where the models run: auto, cpu, cuda, cuda:1, mps."
)
k_option = click.option("-k", "k", type=int, default=4, show_default=True, help="How many chunks.")
retrieval_option = click.option(
    "--retrieval",
    type=click.Choice(["hybrid", "dense", "lexical"]),
    default="hybrid",
    show_default=True,
    help="Embeddings and BM25 together, or one of them.",
)
rerank_option = click.option(
    "--rerank",
    type=click.Choice(["none", "likelihood"]),
    default="none",
    show_default=True,
    help="Rank what was found anew: by how likely the model finds the question behind each memory.",
)


class Number(click.ParamType):
    """A number: whole where it is written as one, so that settings which must be whole can tell."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return an int or a float."""
        try:
            return int(value)
        except ValueError:
            pass
        try:
            return float(value)
        except ValueError:
            raise click.BadParameter(f"{value!r} is no number", ctx, param) from None


def open_library(path: Path, model: str | None = None, device: str = "auto") -> Library:
    """Open a library.

    Raises
    ------
    LibraryError
        If there is none, and how to make one; or if it is damaged.
    """
    if not path.exists():
        raise LibraryError(f"there is no library at {path}", f"make one: ctxdocs compress PATH --library {path}")
    from ctxdocs.library import Library

    return Library.open(path, model, device=device)
