"""Time to first token when a model reads memories, against the same model reading the text they were made of.

Run ``python benchmarks/ask.py``; ``benchmarks/README.md`` says what the figures mean.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import inputs
import measure
import torch
from measure import Clock, Spread

from ctxdocs import generation
from ctxdocs.compressors.base import Compressor
from ctxdocs.errors import CtxdocsError, InputError
from ctxdocs.library import Library
from ctxdocs.prompts import Prompt

CHUNKS = (1, 2, 4, 8)
CHUNK_TOKENS = (256, 1024, 4096)
QUESTION_TOKENS = 32
QUESTIONS = ("What is this about?", "When was it built?", "How many are there?", "Who is responsible?")
_LONGEST = {"cpu": 4096, "cuda": 2**16}
_FIRST_TOKEN = generation.GenerationOptions(max_new_tokens=1, eos_token_ids=())


def measure_prompts(compressor: Compressor, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Read k sources of equal length, as text and as memories, in front of a short question.

    Cases whose text does not fit the model, or the longest prompt that was asked for, are left out.
    """
    device = compressor.backbone.device
    longest = options.longest or _LONGEST.get(device.type, 4096)
    longest = min(longest, compressor.backbone.max_positions - QUESTION_TOKENS)
    rows: list[dict[str, Any]] = []
    for chunk_tokens in options.chunk_tokens:
        fitting = [k for k in options.chunks if k * chunk_tokens <= longest]
        if left_out := [k for k in options.chunks if k not in fitting]:
            print(f"left out: {left_out} sources of {chunk_tokens} tokens, above {longest} prompt tokens", flush=True)
        if not fitting:
            continue
        question, *sources = inputs.stretches(
            compressor, [QUESTION_TOKENS, *[chunk_tokens] * max(fitting)], options.seed
        )
        memories = compressor.compress_ids(sources)
        for k in fitting:
            text: Prompt = [torch.cat([*sources[:k], question])]
            memory: Prompt = [*memories[:k], question]
            seconds = Clock(device).alternate(
                {"text": partial(first_token, compressor, text), "memory": partial(first_token, compressor, memory)},
                options.rounds,
            )
            rows.append(
                {
                    "sources": k,
                    "tokens of each": chunk_tokens,
                    "prompt tokens, text": k * chunk_tokens + QUESTION_TOKENS,
                    "prompt slots, memory": sum(item.slots for item in memories[:k]) + QUESTION_TOKENS,
                    "text, ms": _milliseconds(seconds["text"]),
                    "memory, ms": _milliseconds(seconds["memory"]),
                    "times faster": Spread.of_ratios(seconds["text"], seconds["memory"]),
                }
            )
    return rows


def measure_library(library: Library, questions: Sequence[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Ask a library, reading memories and reading text; retrieval counts for both."""
    rows = []
    for k in options.chunks:
        answers: dict[str, list[Any]] = {"text": [], "memory": []}
        try:
            for number in range(options.rounds + measure.WARMUP_ROUNDS):
                for mode in ("text", "memory"):
                    asked = [library.ask(question, k, mode, max_new_tokens=1) for question in questions]
                    if number >= measure.WARMUP_ROUNDS:
                        answers[mode] += asked
        except InputError as error:
            print(f"left out: {k} chunks: {error}", flush=True)
            continue
        text, memory = answers["text"], answers["memory"]
        text_seconds, memory_seconds = ([item.time_to_first_token for item in items] for items in (text, memory))
        rows.append(
            {
                "chunks": k,
                "prompt tokens, text": Spread.of([item.prompt_tokens for item in text]),
                "prompt slots, memory": Spread.of([item.prompt_tokens + item.memory_slots for item in memory]),
                "text, ms": _milliseconds(text_seconds),
                "memory, ms": _milliseconds(memory_seconds),
                "times faster": Spread.of_ratios(text_seconds, memory_seconds),
            }
        )
    return rows


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure a library where one is given, else generated prompts."""
    library = Library.open(options.library, device=options.device) if options.library else None
    compressor = library.compressor if library else inputs.compressor_from(options)
    device = compressor.backbone.device
    result: dict[str, Any] = {
        "benchmark": "ask",
        "command": measure.command_line(),
        "environment": measure.environment(device),
        "model": inputs.describe(compressor, options.shape),
    }
    print(f"{result['model']['name']} ({result['model']['parameters']:,} parameters) on {measure.device_name(device)}")
    if library:
        result["library"] = measure_library(library, _questions(options.questions), options)
        measure.table(f"time to first token from {options.library}, retrieval included", result["library"])
    else:
        result["prompts"] = measure_prompts(compressor, options)
        measure.table("time to first token", result["prompts"])
    return result


def first_token(compressor: Compressor, prompt: Prompt) -> None:
    """Read a prompt and choose one token."""
    generation.generate(compressor, [prompt], _FIRST_TOKEN)


def _milliseconds(seconds: Sequence[float]) -> Spread:
    return Spread.of([1000 * value for value in seconds])


def _questions(path: Path | None) -> Sequence[str]:
    if path is None:
        return QUESTIONS
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, nargs="+", default=CHUNKS, help="how many sources (default: 1 2 4 8)")
    parser.add_argument("--chunk-tokens", type=int, nargs="+", default=CHUNK_TOKENS, help="tokens of each source")
    parser.add_argument("--longest", type=int, help="leave out text prompts above this (default: 4096; GPU: 65536)")
    parser.add_argument("--library", type=Path, help="ask this library instead of reading generated sources")
    parser.add_argument("--questions", type=Path, help="a file of questions for the library, one per line")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds of each comparison (default: 7)")
    inputs.add_model_arguments(parser)
    return parser.parse_args(arguments)


def main() -> None:
    """Measure and print."""
    options = parse()
    try:
        result = run(options)
    except CtxdocsError as error:
        raise SystemExit(f"error: {error}") from error
    measure.write_json(options.output, result)


if __name__ == "__main__":
    main()
