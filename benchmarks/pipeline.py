"""The whole of ``Library.add``: where its time goes, what a second run costs, and whether memory use grows."""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import inputs
import measure
import numpy as np
from forward import SameBatches
from measure import Clock, PeakMemory, Spread

from ctxdocs.compressors.base import Compressor
from ctxdocs.embedding import Embedder, load_embedder
from ctxdocs.errors import CtxdocsError
from ctxdocs.library import DEFAULT_CHUNK_TOKENS, DEFAULT_OVERLAP_TOKENS, Library


class FreeEmbedder:
    """Costs nothing: what is left of ``Library.add`` is ctxdocs' own work."""

    name = "free"
    dimension = 384
    reloadable = False

    def embed_documents(self, texts: Sequence[str]) -> np.ndarray:
        """Return the same vector for every text."""
        return np.ones((len(texts), self.dimension), np.float32)

    embed_queries = embed_documents


class Timed:
    """An embedder whose calls are timed."""

    reloadable = False

    def __init__(self, embedder: Embedder, clock: Clock) -> None:
        self.name = embedder.name
        self.dimension = embedder.dimension
        self.embed_queries = embedder.embed_queries
        self._embedder = embedder
        self._clock = clock

    def embed_documents(self, texts: Sequence[str]) -> np.ndarray:
        """Embed and time."""
        with self._clock.time("embedding it"):
            return self._embedder.embed_documents(texts)


def measure_library(compressor: Compressor, corpus: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Alternate the plain forward over a corpus' chunks and ``Library.add`` of the corpus, with and without embedding.

    Returns
    -------
    dict
        ``ratios`` and ``stages``, rows as printed, and ``skipped``, the reason where nothing could be measured.
    """
    if find_spec("faiss") is None:
        return _skipped("Library.add: faiss is not installed")
    embedders: dict[str, Embedder] = {"not counted": FreeEmbedder()}
    result: dict[str, Any] = {}
    try:
        embedders["counted"] = load_embedder(options.embedder, options.device if options.device != "auto" else None)
    except CtxdocsError as error:
        result |= _skipped(f"Library.add with embedding: {error}")
    chunks = list(inputs.chunks_of(corpus, compressor, DEFAULT_CHUNK_TOKENS, DEFAULT_OVERLAP_TOKENS))
    forward = SameBatches(compressor, chunks)
    clock = Clock(compressor.backbone.device)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in embedders}
    for embedder in embedders.values():
        embedder.embed_documents(["a first call, which loads what is loaded once"])
    for _ in range(options.rounds):
        with clock.time("forward"):
            forward.backbone()
        with clock.time("with head"):
            forward.with_head()
        for name, embedder in embedders.items():
            runs[name].append(_add_twice(compressor, corpus, embedder))
    with clock.time("reading"):
        for _ in inputs.chunks_of(corpus, compressor, DEFAULT_CHUNK_TOKENS, DEFAULT_OVERLAP_TOKENS):
            pass

    tokens = sum(len(chunk) for chunk in chunks)
    ratios, stages = [], []
    for name, rounds in runs.items():
        values = {key: [one[key] for one in rounds] for key in rounds[0]}
        ratios.append(
            {
                "embedding": name,
                "chunks": len(chunks),
                "tokens/s": Spread.of([tokens / seconds for seconds in values["add"]]),
                "of forward": Spread.of_ratios(clock.seconds["forward"], values["add"]),
                "of forward with head": Spread.of_ratios(clock.seconds["with head"], values["add"]),
                "second run": Spread.of_ratios(values["again"], values["add"]),
            }
        )
        stages.append(
            {
                "embedding": name,
                **{stage: Spread.of(values[stage]) for stage in ("add", "compressing", "embedding it", "rest")},
                "writing (overlaps)": Spread.of(values["writing"]),
                "reading alone": clock.seconds["reading"][0],
            }
        )
    measure.table("Library.add against the plain forward over the same chunks", ratios)
    measure.table("where its seconds go", stages)
    return result | {"ratios": ratios, "stages": stages}


def measure_memory(options: argparse.Namespace, corpus: Path) -> dict[str, Any]:
    """Add a quarter of a corpus and all of it, each in a process of its own: peak memory must not grow."""
    if find_spec("faiss") is None:
        return _skipped("peak memory of Library.add: faiss is not installed")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for folder in (inputs.copy_quarter(corpus, Path(scratch, "quarter")), corpus):
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                rows.append(process.submit(_peak_of_adding, options, folder).result())
    measure.table("peak memory of Library.add, above the loaded model", rows)
    return {"rows": rows}


def _add_twice(compressor: Compressor, corpus: Path, embedder: Embedder) -> dict[str, float]:
    """Add a folder to a new library, then the unchanged folder again; return seconds."""
    clock = Clock(compressor.backbone.device)
    with tempfile.TemporaryDirectory() as scratch, _timed_stages(compressor, clock):
        library = Library.create(Path(scratch, "library"), compressor, Timed(embedder, clock))
        report = library.add(corpus)
        again = library.add(corpus)
    if report.failed or again.documents:
        raise CtxdocsError(
            f"the benchmark's corpus was not added cleanly: {report.failed[:3]}, {again.documents} twice"
        )
    stages = {name: sum(clock.seconds[name]) for name in ("compressing", "embedding it", "writing")}
    rest = report.seconds - stages["compressing"] - stages["embedding it"]
    return {"add": report.seconds, "again": again.seconds, "rest": rest, **stages}


@contextmanager
def _timed_stages(compressor: Compressor, clock: Clock) -> Iterator[None]:
    from ctxdocs.cache import Writer

    compress_ids, write = compressor.compress_ids, Writer.write

    def timed_compress_ids(*args: Any, **options: Any) -> Any:
        with clock.time("compressing"):
            return compress_ids(*args, **options)

    def timed_write(*args: Any, **options: Any) -> Any:
        # In a thread of its own: waiting for the device here would hold up the other stages.
        started = time.perf_counter()
        try:
            return write(*args, **options)
        finally:
            clock.seconds.setdefault("writing", []).append(time.perf_counter() - started)

    with (
        mock.patch.object(compressor, "compress_ids", timed_compress_ids),
        mock.patch.object(Writer, "write", timed_write),
    ):
        yield


def _peak_of_adding(options: argparse.Namespace, corpus: Path) -> dict[str, Any]:
    compressor = inputs.compressor_from(options)
    compressor.compress(["a first call, which loads what is loaded once"])
    with tempfile.TemporaryDirectory() as scratch:
        library = Library.create(Path(scratch, "library"), compressor, FreeEmbedder())
        peak = PeakMemory(compressor.backbone.device)
        report = library.add(corpus)
        grown = {f"{kind}, MiB": value // 2**20 for kind, value in peak.grown().items()}
        return {"documents": report.documents, "chunks": report.chunks, **grown}


def _skipped(reason: str) -> dict[str, str]:
    print(f"\nskipped: {reason}", flush=True)
    return {"skipped": reason}
