"""Methods without training: what compressing costs, what reading saves, what scoring holds at once, what is lost.

Run ``python benchmarks/kv.py``; ``benchmarks/README.md`` says what the figures mean.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import inputs
import measure
import torch
from ask import QUESTION_TOKENS, first_token
from forward import PlainForward
from kv_losses import measure_losses
from measure import Clock, LargestTensor, Spread
from methods import plot_with
from torch import Tensor

from ctxdocs.compressors.base import Compressor
from ctxdocs.errors import CtxdocsError

PARTS = {
    "compressing": "compressing a document: seconds over those of one plain forward of the layers (prefills)",
    "reading": "time to first token behind one document: how many times faster than from its text",
    "scoring": "what compressing one document holds at once, above the loaded model",
    "losses": "loss of a continuation, in nats per token",
}
_RATIO = 4
_METHODS = ("kv", "streaming", "snapkv", "expected_attention", "kvzip")
_SHAPES = {"cpu": ("tiny", "0.1b"), "cuda": ("1b", "8b")}
_TOKENS = {"cpu": (1024, 4096), "cuda": (1024, 4096, 16384, 32768)}


def measure_compressing(
    compressors: dict[str, Compressor], document: Tensor, clock: Clock, rounds: int
) -> Iterator[dict[str, Any]]:
    """Compress one document with every method, beside a plain forward over it."""
    forward = PlainForward(compressors["kv"], [[document]])
    actions = {name: partial(compressor.compress_ids, [document]) for name, compressor in compressors.items()}
    seconds = clock.alternate({"forward": forward.backbone, **actions}, rounds)
    for name in compressors:
        yield {
            "method": name,
            "ms": Spread.of([1000 * value for value in seconds[name]]),
            "prefills": Spread.of_ratios(seconds[name], seconds["forward"]),
        }


def measure_reading(
    compressors: dict[str, Compressor], document: Tensor, question: Tensor, clock: Clock, rounds: int
) -> Iterator[dict[str, Any]]:
    """Answer a question's first token behind the document's text, and behind memories of it."""
    kvzip = compressors["kvzip"]
    made: dict[str, tuple[Compressor, dict[str, Any]]] = {
        "exact": (compressors["kv"], {}),
        f"kvzip {_RATIO}x": (kvzip, {}),
        f"kvzip {_RATIO}x global": (kvzip, {"budget": "global"}),
    }
    memories = {name: (each, each.compress_ids([document], **options)[0]) for name, (each, options) in made.items()}
    actions = {name: partial(first_token, each, [memory, question]) for name, (each, memory) in memories.items()}
    text = partial(first_token, kvzip, [torch.cat([document, question])])
    seconds = clock.alternate({"text": text, **actions}, rounds)
    for name, (_, memory) in memories.items():
        yield {
            "memory": name,
            "text, ms": Spread.of([1000 * value for value in seconds["text"]]),
            "memory, ms": Spread.of([1000 * value for value in seconds[name]]),
            "times faster": Spread.of_ratios(seconds["text"], seconds[name]),
            "bytes per token": memory.nbytes / memory.source_tokens,
        }


def measure_scoring(compressors: dict[str, Compressor], documents: Sequence[Tensor]) -> Iterator[dict[str, Any]]:
    """Compress documents of growing length: the peak, and the largest tensor that is ever made."""
    for document in documents:
        row: dict[str, Any] = {"document tokens": len(document)}
        for name in ("kv", "kvzip"):
            compressor = compressors[name]
            row[f"{name}: peak, MiB"] = measure.peak_mib(
                compressor.backbone.device, partial(compressor.compress_ids, [document])
            )
            with LargestTensor() as largest:
                compressor.compress_ids([document])
            row[f"{name}: largest tensor, MiB"] = largest.nbytes / 2**20
        config = compressors["kv"].model.config
        row["all attention of one layer, MiB"] = config.num_attention_heads * len(document) ** 2 * 4 / 2**20
        yield row


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what the command line asks for; what is done is saved as soon as it is."""
    device = inputs.device_of(options)
    clock = Clock(device, options.clock)
    lengths = options.document_tokens or _TOKENS.get(device.type, (1024,))
    result: dict[str, Any] = {
        "benchmark": "kv",
        "command": measure.command_line(),
        "environment": measure.environment(device),
        "clock": options.clock,
        "ratio": _RATIO,
        **{part: [] for part in options.parts},
    }
    shapes = options.shapes or _SHAPES.get(device.type, ("tiny",))
    for shape in shapes if set(options.parts) - {"losses"} else ():
        compressors = inputs.training_free(_METHODS, shape, options, ratio=_RATIO)
        base = compressors["kv"]
        question, document = inputs.stretches(base, [QUESTION_TOKENS, max(*lengths, 4 * min(lengths))], options.seed)
        for length in lengths:
            print(f"{shape}, {length} tokens", flush=True)
            keys = {"shape": shape, "document tokens": length}
            text = document[:length]
            if "compressing" in options.parts:
                rows = measure_compressing(compressors, text, clock, options.rounds)
                result["compressing"] += [{**keys, **row} for row in rows]
            if "reading" in options.parts:
                rows = measure_reading(compressors, text, question, clock, options.rounds)
                result["reading"] += [{**keys, **row} for row in rows]
            measure.write_json(options.output, result)
        if "scoring" in options.parts:
            documents = [document[: times * min(lengths)] for times in (1, 2, 4)]
            result["scoring"] += [{"shape": shape, **row} for row in measure_scoring(compressors, documents)]
        del compressors, base
    if "losses" in options.parts:
        result["losses"] = measure_losses(options)
    return result


def joined(files: Sequence[Path]) -> dict[str, Any]:
    """Return the figures of several runs, of other shapes or parts, as those of one; the first says where it ran."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    rows = {part: [_with_spreads(row) for result in results for row in result.get(part, [])] for part in PARTS}
    commands = [command for result in results for command in result.get("commands", [result["command"]])]
    return {**results[0], "commands": commands, **rows}


def _with_spreads(row: dict[str, Any]) -> dict[str, Any]:
    return {name: Spread(**value) if isinstance(value, dict) else value for name, value in row.items()}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure (default: all)")
    parser.add_argument(
        "--shapes", nargs="+", choices=inputs.SHAPES, help="random models (default: tiny 0.1b; with a GPU 1b 8b)"
    )
    parser.add_argument(
        "--document-tokens", type=int, nargs="+", help="lengths (default: 1024 4096; with a GPU also 16384 32768)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each comparison (default: 5)")
    parser.add_argument(
        "--clock", choices=measure.CLOCKS, default="wall", help="processor: for one thread beside other processes"
    )
    losses = parser.add_argument_group("losses")
    losses.add_argument("--model", help="whose base reads and is read (default: the bundled model)")
    default = Path(__file__).parents[1] / "examples" / "corpus"
    losses.add_argument("--corpus", type=Path, default=default, help="a folder of documents (default: the example)")
    losses.add_argument("--stretches", type=int, default=64, help="how many of the corpus, at most (default: 64)")
    losses.add_argument("--stretch-tokens", type=int, nargs=2, default=(512, 64), help="document and continuation")
    losses.add_argument("--ratios", type=float, nargs="+", default=[2, 4, 8])
    parser.add_argument("--plot", type=Path, help="draw the figures into this file, .svg or .png")
    parser.add_argument("--figures", type=Path, nargs="+", help="measure nothing, and join and draw these JSON files")
    inputs.add_run_arguments(parser)
    return parser.parse_args(arguments)


def main() -> None:
    """Measure, print and draw."""
    options = parse()
    try:
        result = joined(options.figures) if options.figures else run(options)
    except CtxdocsError as error:
        raise SystemExit(f"error: {error}") from error
    measure.write_json(options.output, result)
    for part in PARTS:
        if part in result:
            measure.table(PARTS[part], result[part])
    if options.plot:
        plot_with("kv_plot", measure.as_json(result), options.plot)


if __name__ == "__main__":
    main()
