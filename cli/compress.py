"""``ctxdocs compress``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ctxdocs.cli.failures import SOME_FAILED, Interrupted
from ctxdocs.cli.methods import check_settings, described_method
from ctxdocs.cli.options import Number, device_option, json_option, library_option, open_library
from ctxdocs.cli.output import aligned, clean, counted, print_json, shown, silence, size, terminal
from ctxdocs.cli.progress import progress_bar
from ctxdocs.errors import InputError, LibraryError

if TYPE_CHECKING:
    from ctxdocs.ingestion import AddReport
    from ctxdocs.library import Library

#: Options that say how the model is loaded, and how it compresses.
_OF_THE_MODEL = ("dtype", "ratio", "slots", "budget", "positions", "prefix", "segment_tokens")


@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="PATH...")
@library_option
@click.option("--model", metavar="NAME", help="A checkpoint's folder or hub name; default: the bundled model.")
@click.option("--method", metavar="NAME", help="How to compress; default: the checkpoint's method, else kvzip.")
@click.option("--ratio", type=Number(), help="Tokens per slot.")
@click.option("--slots", type=int, help="Slots per chunk, in place of a ratio.")
@click.option("--budget", metavar="KIND", help="uniform: every head keeps as much; global: as much as it needs.")
@click.option("--positions", metavar="KIND", help="Slots stay at their tokens' places (source) or close up (compact).")
@click.option("--prefix", metavar="KIND", help="What documents are read behind: auto, chat, bos, none.")
@click.option("--chunk-tokens", type=int, help="Length of the chunks documents are cut into.")
@click.option("--overlap-tokens", type=int, help="What neighbouring chunks share.")
@click.option("--segment-tokens", type=int, help="Length of the segments the model compresses in.")
@click.option("--codec", metavar="NAME", help="How memories are stored: exact, bfloat16, float16, int8.")
@click.option("--index", metavar="FACTORY", help="A FAISS index_factory string; default: Flat.")
@click.option("--embedder", metavar="NAME", help="A sentence-transformers folder or name; default: all-MiniLM-L6-v2.")
@device_option
@click.option(
    "--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), help="Of the model; default: as saved."
)
@click.option("--prune", is_flag=True, help="Drop documents whose files are gone from the folders.")
@json_option
def compress(
    paths: tuple[Path, ...],
    library_path: Path,
    model: str | None,
    device: str,
    prune: bool,
    as_json: bool,
    **settings: Any,
) -> int:
    """Compress files and folders into a library.

    The library is made when it is not there. What it holds already is left alone: run the command again after a
    change, or to go on after an interruption.
    """
    from ctxdocs.corpus import SUFFIXES, find_files

    exists = (library_path / "manifest.json").exists()
    if not find_files(paths) and not (prune and exists):
        places = ", ".join(map(str, paths))
        raise InputError(f"nothing to compress in {places}", f"formats read: {', '.join(sorted(SUFFIXES))}")
    silence()
    given = {name: value for name, value in settings.items() if value not in (None, "auto")}
    library = (_open if exists else _create)(library_path, model, device, given)
    try:
        with progress_bar() as on_progress:
            report = library.add(paths, missing="drop" if prune else "keep", on_progress=on_progress)
    except KeyboardInterrupt:
        raise Interrupted(
            "Interrupted; what was compressed so far is stored", "run the same command again to go on"
        ) from None
    if as_json:
        print_json({**report.to_dict(), "library": str(library.path), "compressor": library.info()["compressor"]})
    else:
        _show(report, library)
    return SOME_FAILED if report.failed else 0


def _create(path: Path, model: str | None, device: str, given: dict[str, Any]) -> Library:
    """Create a library; nothing is written before the models are loaded and every setting is checked."""
    from ctxdocs.checkpoints import load_compressor
    from ctxdocs.embedding import load_embedder
    from ctxdocs.library import Library

    method = given.pop("method", None)
    model_settings = {name: given.pop(name) for name in _OF_THE_MODEL if name in given}
    check_settings(model, method, model_settings.keys() - {"dtype"})
    compressor = load_compressor(model, method, device=device, **model_settings)
    embedder = load_embedder(given.pop("embedder", None), None if device == "auto" else device)
    return Library.create(path, compressor, embedder, **given)


def _open(path: Path, model: str | None, device: str, given: dict[str, Any]) -> Library:
    """Open a library, and refuse settings that are not those it was made with."""
    library = open_library(path, model, device)
    info = library.info()
    made_with = {
        **{name: info[name] for name in ("chunk_tokens", "overlap_tokens", "codec", "index")},
        **info["compressor"]["settings"],
        "method": info["compressor"]["method"],
        "dtype": info["compressor"]["dtype"],
        "embedder": info["embedder"]["name"],
    }
    for name, value in given.items():
        same = [value, str(Path(value).expanduser().resolve())] if name == "embedder" else [value, [value]]
        if (used := made_with.get(name)) not in same:
            option = "--" + name.replace("_", "-")
            made = f"without {option}, not with" if used is None else f"with {option} {used}, not"
            raise LibraryError(
                f"the library {path} was made {made} {value}",
                f"leave {option} out, or compress into another library (--library)",
            )
    if model is not None:
        _ = library.compressor  # loads it now, and raises unless it is the one that made the library
    return library


def _show(report: AddReport, library: Library) -> None:
    console = terminal(sys.stdout)
    if report.documents or report.removed or report.failed:
        console.print(aligned([*_rows(report), ("method", described_method(library.info()["compressor"]))]))
    else:
        console.print(f"Nothing changed: {counted(report.unchanged, 'document')} up to date.")
    console.print(f"Library: {shown(library.path)}")
    if report.failed:
        errors = terminal(sys.stderr)
        errors.print(f"{counted(len(report.failed), 'document')} could not be read:", style="bold red")
        for failure in report.failed:
            reason = failure["reason"].removeprefix(failure["path"] + ": ")
            errors.print(f"  {shown(failure['path'])}: {clean(reason)}")


def _rows(report: AddReport) -> Iterator[tuple[str, str]]:
    counts = {
        "compressed": report.documents,
        "of them replaced": report.replaced,
        "unchanged": report.unchanged,
        "removed": report.removed,
        "failed": len(report.failed),
    }
    yield "documents", ", ".join(f"{number:,} {what}" for what, number in counts.items() if number)
    if report.documents:
        yield "text", f"{counted(report.source_tokens, 'token')} in {counted(report.chunks, 'chunk')}"
        memories = f"{counted(report.memory_slots, 'slot')}, {size(report.bytes)}"
        if report.compression_ratio:
            memories += f", {report.compression_ratio:.1f} tokens per slot"
        yield "memories", memories
        yield "time", f"{report.seconds:.1f} s, {report.tokens_per_second:,.0f} tokens per second"
