"""Every method beside one plain forward of its base: speed, peak memory, what a memory weighs, time to first token.

Run ``python benchmarks/methods.py``; ``benchmarks/README.md`` says what the figures mean.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import inputs
import measure
import torch
from ask import QUESTION_TOKENS, first_token
from forward import PlainForward, counted_tokens
from measure import Clock, Spread
from torch import Tensor

from ctxdocs.compressors.base import Compressor
from ctxdocs.errors import CtxdocsError

_SHAPES = {"cpu": ("tiny", "0.1b"), "cuda": ("0.1b", "7b")}
_DOCUMENTS = {"cpu": 2, "cuda": 16}
_TABLES = {
    "compressing": "compressing: throughput as a fraction of one plain forward of the layers",
    "memory": "memory: peak above the loaded model, and what is kept of a document",
    "reading": "time to first token behind one document",
}


def measure_compressing(
    compressor: Compressor, documents: Sequence[Tensor], clock: Clock, rounds: int
) -> dict[str, Any]:
    """Compress documents of equal length, beside a forward over their tokens and one over all that the method runs.

    The second forward takes as many documents, longer by the method's own tokens: summary slots, gist or special
    tokens, text that is repeated to fill a window.
    """
    tokens = sum(map(len, documents))
    with counted_tokens() as passes:
        compressor.compress_ids(documents)
    each = sum(passes) // len(documents)
    longer = [document.repeat(-(-each // len(document)))[:each] for document in documents]
    seconds = clock.alternate(
        {
            "forward": PlainForward.over(compressor, documents).backbone,
            "longer": PlainForward.over(compressor, longer).backbone,
            "compress": partial(compressor.compress_ids, documents),
        },
        rounds,
    )
    return {
        "text share": tokens / sum(passes),
        "tokens/s": Spread.of([tokens / value for value in seconds["compress"]]),
        "of forward": Spread.of_ratios(seconds["forward"], seconds["compress"]),
        "of forward over all it runs": Spread.of_ratios(seconds["longer"], seconds["compress"]),
    }


def measure_memory(compressor: Compressor, documents: Sequence[Tensor]) -> dict[str, Any]:
    """Peak memory of compressing and of the forward over the same tokens, and the size of what is kept."""
    forward = PlainForward.over(compressor, documents)
    device = compressor.backbone.device
    compressing = measure.peak_mib(device, partial(compressor.compress_ids, documents))
    memory = compressor.compress_ids(documents[:1])[0]
    return {
        "compressing, MiB": compressing,
        "forward, MiB": measure.peak_mib(device, forward.backbone),
        "slots": memory.slots,
        "slots per token": memory.slots / memory.source_tokens,
        "bytes per token": memory.nbytes / memory.source_tokens,
    }


def measure_reading(
    compressor: Compressor, document: Tensor, question: Tensor, clock: Clock, rounds: int
) -> dict[str, Any]:
    """Time to first token behind a document's memory, and behind its text."""
    memory = compressor.compress_ids([document])[0]
    actions = {
        "text": partial(first_token, compressor, [torch.cat([document, question])]),
        "memory": partial(first_token, compressor, [memory, question]),
    }
    seconds = clock.alternate(actions, rounds)
    return {
        **{f"{name}, ms": Spread.of([1000 * value for value in seconds[name]]) for name in actions},
        "times faster": Spread.of_ratios(seconds["text"], seconds["memory"]),
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure every method on every shape and document length; what is done is saved as soon as it is."""
    device = inputs.device_of(options)
    clock = Clock(device, options.clock)
    count = options.documents or _DOCUMENTS.get(device.type, 2)
    result: dict[str, Any] = {
        "benchmark": "methods",
        "command": measure.command_line(),
        "environment": measure.environment(device),
        "clock": options.clock,
        "documents": count,
        "models": [],
        **{name: [] for name in _TABLES},
    }
    for shape in options.shapes or _SHAPES.get(device.type, ("tiny",)):
        for method in options.methods:
            print(f"{shape}, {method}, documents: {count}", flush=True)
            compressor = inputs.random_compressor(method, shape, options)
            result["models"].append({"label": method, **inputs.describe(compressor, shape)})
            for length in options.document_tokens:
                question, *documents = inputs.stretches(compressor, [QUESTION_TOKENS, *[length] * count], options.seed)
                keys = {"shape": shape, "method": method, "document tokens": length}
                for name, row in {
                    "compressing": measure_compressing(compressor, documents, clock, options.rounds),
                    "memory": measure_memory(compressor, documents),
                    "reading": measure_reading(compressor, documents[0], question, clock, options.rounds),
                }.items():
                    result[name].append({**keys, **row})
                measure.write_json(options.output, result)
            del compressor
    return result


def plot_with(module: str, figures: str, path: Path) -> None:
    """Draw figures, given as JSON, by a module's ``draw``, where matplotlib is installed."""
    if find_spec("matplotlib") is None:
        print("\nskipped: the plot, because matplotlib is not installed")
        return
    importlib.import_module(module).draw(json.loads(figures), path)
    print(f"\nwritten: {path}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shapes", nargs="+", choices=inputs.SHAPES, help="model sizes (default: tiny 0.1b; with a GPU 0.1b 7b)"
    )
    every = list(inputs.METHODS)
    parser.add_argument("--methods", nargs="+", choices=every, default=every, help="what to measure (default: all)")
    parser.add_argument("--document-tokens", type=int, nargs="+", default=[2048], help="lengths (default: 2048)")
    parser.add_argument("--documents", type=int, help="documents of each length (default: 2; with a GPU 16)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each comparison (default: 5)")
    parser.add_argument(
        "--clock", choices=measure.CLOCKS, default="wall", help="processor: for one thread beside other processes"
    )
    parser.add_argument("--plot", type=Path, help="draw the figures into this file, .svg or .png")
    parser.add_argument("--figures", type=Path, help="measure nothing, and draw the figures of this JSON file")
    inputs.add_run_arguments(parser)
    return parser.parse_args(arguments)


def main() -> None:
    """Measure, print and draw."""
    options = parse()
    if options.figures:
        figures = options.figures.read_text(encoding="utf-8")
    else:
        try:
            result = run(options)
        except CtxdocsError as error:
            raise SystemExit(f"error: {error}") from error
        for name, title in _TABLES.items():
            measure.table(title, result[name])
        figures = measure.as_json(result)
    if options.plot:
        plot_with("methods_plot", figures, options.plot)


if __name__ == "__main__":
    main()
