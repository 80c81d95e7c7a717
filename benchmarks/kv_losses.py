"""What methods without training lose: a continuation predicted behind a document's text, and behind what is kept."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import inputs
import torch
from torch import Tensor

from ctxdocs.checkpoints import load_compressor
from ctxdocs.compressors import compressor_class
from ctxdocs.compressors.base import Compressor
from ctxdocs.compressors.selection import SHARES
from ctxdocs.likelihood import likelihoods
from ctxdocs.memory import KVMemory, Memory

#: Methods with a budget, and the shares of it that are measured.
_METHODS = {"kvzip": SHARES, "expected_attention": ("uniform",), "snapkv": ("uniform",), "streaming": ("uniform",)}


def measure_losses(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for nothing, the text, the exact memory, and every method at every ratio.

    All read with the same model. ``above exact`` is the mean of the differences on the same stretches, with its
    standard error.
    """
    base = load_compressor(options.model, method="kv", device=options.device, dtype=options.dtype)
    size, rest = options.stretch_tokens
    stretches = _stretches(base, options.corpus, size + rest, options.stretches)
    documents, endings = [ids[:size] for ids in stretches], [ids[size:] for ids in stretches]
    exact = base.compress_ids(documents)
    found: list[tuple[dict[str, Any], list[float], Sequence[Memory]]] = [
        ({"context": "nothing", "ratio": "", "budget": ""}, _losses(base, [[]] * len(documents), endings), ()),
        ({"context": "text", "ratio": 1, "budget": ""}, _losses(base, [[ids] for ids in documents], endings), ()),
        ({"context": "kv", "ratio": 1, "budget": ""}, (behind := _losses(base, _each(exact), endings)), exact),
    ]
    for method, shares in _METHODS.items():
        compressor: Any = compressor_class(method)(base.model, base.tokenizer, prompt_format=base.prompt_format)
        for ratio in options.ratios:
            for share in shares:
                memories = compressor.compress_ids(documents, ratio=ratio, budget=share)
                row = {"context": method, "ratio": ratio, "budget": share}
                found.append((row, _losses(compressor, _each(memories), endings), memories))
    return [{**row, **_figures(losses, behind, memories)} for row, losses, memories in found]


def _stretches(compressor: Compressor, corpus: Path, tokens: int, most: int) -> list[Tensor]:
    """Return stretches of the corpus of so many tokens each."""
    text = torch.cat(list(inputs.chunks_of(corpus, compressor, 256, 0)))
    return list(text.split(tokens))[: min(most, len(text) // tokens)]


def _each(memories: Sequence[Memory]) -> list[list[Any]]:
    return [[memory] for memory in memories]


def _losses(compressor: Compressor, contexts: Sequence[list[Any]], endings: Sequence[Tensor]) -> list[float]:
    """Return the loss of every ending behind the prefix and its context: of all its tokens but the first."""
    front = [] if compressor.prefix_ids is None else [compressor.prefix_ids]
    prompts = [[*front, *context, ending[:1]] for context, ending in zip(contexts, endings, strict=True)]
    prompts = [list(_joined(prompt)) for prompt in prompts]
    return [-found.mean for found in likelihoods(compressor, prompts, [ending[1:] for ending in endings])]


def _joined(prompt: Sequence[Any]) -> Iterator[Any]:
    """Join a prompt that is text alone, as it is read."""
    if any(isinstance(part, Memory) for part in prompt):
        yield from prompt
    else:
        yield torch.cat(list(prompt))


def _figures(losses: Sequence[float], exact: Sequence[float], memories: Sequence[Memory]) -> dict[str, Any]:
    above = [loss - other for loss, other in zip(losses, exact, strict=True)]
    error = statistics.stdev(above) / len(above) ** 0.5 if len(above) > 1 else 0.0
    figures: dict[str, Any] = {
        "stretches": len(losses),
        "loss": statistics.fmean(losses),
        "above exact": statistics.fmean(above),
        "standard error": error,
        "bytes per token": "",
        "cached/kept": "",
    }
    if memories:
        figures["bytes per token"] = sum(memory.nbytes for memory in memories) / sum(
            memory.source_tokens for memory in memories
        )
        figures["cached/kept"] = sum(map(_width, memories)) / sum(memory.slots for memory in memories)
    return figures


def _width(memory: Memory) -> float:
    """Return slots per head as they lie in a cache: every layer is as wide as its longest head."""
    lengths = memory.lengths if isinstance(memory, KVMemory) else None
    return memory.slots if lengths is None else float(lengths.amax(1).float().mean())
