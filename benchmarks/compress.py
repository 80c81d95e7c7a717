"""Throughput of compression as a fraction of one plain batched forward of the same model over the same tokens.

Run ``python benchmarks/compress.py``; ``benchmarks/README.md`` says what the figures mean.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import inputs
import measure
import pipeline
from forward import SameBatches
from measure import Clock, Spread
from torch import Tensor

from ctxdocs.compressors.base import Compressor
from ctxdocs.errors import CtxdocsError
from ctxdocs.library import DEFAULT_CHUNK_TOKENS, DEFAULT_OVERLAP_TOKENS

PARTS = ("compress_ids", "library", "memory")
_TOKENS = {"cpu": 2**14, "cuda": 2**18}


def measure_compress_ids(
    compressor: Compressor, documents: Sequence[Tensor], budgets: Sequence[int | None], rounds: int
) -> list[dict[str, Any]]:
    """Compare ``compress_ids`` with the plain forward, one row per upper bound of tokens in a batch."""
    actions: dict[tuple[str, int | None], Callable[[], object]] = {}
    slots = 0
    for budget in budgets:
        plain = SameBatches(compressor, documents, budget)
        slots = plain.slots
        actions |= {
            ("forward", budget): plain.backbone,
            ("with head", budget): plain.with_head,
            ("compress", budget): partial(compressor.compress_ids, documents, batch_tokens=budget),
        }
    seconds = Clock(compressor.backbone.device).alternate(actions, rounds)
    tokens = sum(len(document) for document in documents)
    return [
        {
            "batch tokens": budget or "default",
            "chunks": len(documents),
            "tokens": tokens,
            "text share": tokens / (tokens + slots),
            "tokens/s": Spread.of([tokens / value for value in seconds["compress", budget]]),
            "of forward": Spread.of_ratios(seconds["forward", budget], seconds["compress", budget]),
            "of forward with head": Spread.of_ratios(seconds["with head", budget], seconds["compress", budget]),
        }
        for budget in budgets
    ]


def run(options: argparse.Namespace, corpus: Path) -> dict[str, Any]:
    """Measure the chosen parts over the documents in ``corpus``."""
    compressor = inputs.compressor_from(options)
    device = compressor.backbone.device
    result: dict[str, Any] = {
        "benchmark": "compress",
        "command": measure.command_line(),
        "environment": measure.environment(device),
        "model": inputs.describe(compressor, options.shape),
    }
    print(f"{result['model']['name']} ({result['model']['parameters']:,} parameters) on {measure.device_name(device)}")
    if "compress_ids" in options.parts:
        result["compress_ids"] = []
        for chunk_tokens in options.chunk_tokens:
            documents = _sample(compressor, corpus, chunk_tokens, options.tokens or _TOKENS.get(device.type, 2**16))
            rows = measure_compress_ids(compressor, documents, options.batch_tokens or [None], options.rounds)
            measure.table(f"compress_ids, chunks of up to {chunk_tokens} tokens", rows)
            result["compress_ids"] += [{"chunk tokens": chunk_tokens, **row} for row in rows]
    if "library" in options.parts:
        result["library"] = pipeline.measure_library(compressor, corpus, options)
    if "memory" in options.parts:
        del compressor  # the measuring processes load their own
        result["memory"] = pipeline.measure_memory(options, corpus)
    return result


def _sample(compressor: Compressor, corpus: Path, chunk_tokens: int, tokens: int) -> list[Tensor]:
    """Return the corpus' first chunks, about ``tokens`` tokens in all."""
    overlap = min(DEFAULT_OVERLAP_TOKENS, chunk_tokens - 1)
    chunks: list[Tensor] = []
    for chunk in inputs.chunks_of(corpus, compressor, chunk_tokens, overlap):
        if tokens <= 0:
            break
        chunks.append(chunk)
        tokens -= len(chunk)
    return chunks


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    parser.add_argument("--documents", type=int, default=100, help="generated pages (default: 100)")
    parser.add_argument("--corpus", type=Path, help="a folder of documents instead of generated pages")
    parser.add_argument(
        "--chunk-tokens", type=int, nargs="+", default=[DEFAULT_CHUNK_TOKENS], help="chunk lengths for compress_ids"
    )
    parser.add_argument("--batch-tokens", type=int, nargs="+", help="batch sizes for compress_ids (default: its own)")
    parser.add_argument("--tokens", type=int, help="tokens per compress_ids measurement")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of each comparison (default: 3)")
    parser.add_argument("--embedder", help="embedder of the library part (default: the library's)")
    inputs.add_model_arguments(parser)
    return parser.parse_args(arguments)


def main() -> None:
    """Measure and print."""
    options = parse()
    with tempfile.TemporaryDirectory() as scratch:
        corpus = options.corpus or inputs.write_pages(Path(scratch, "pages"), options.documents, options.seed)
        try:
            result = run(options, corpus)
        except CtxdocsError as error:
            raise SystemExit(f"error: {error}") from error
    measure.write_json(options.output, result)


if __name__ == "__main__":
    main()
