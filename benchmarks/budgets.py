"""The two budgets of KVzip: as many slots for every head, or one threshold for all; what each weighs and loses.

Run ``python benchmarks/budgets.py``; ``benchmarks/README.md`` says what the figures mean.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import inputs
import measure
import torch
from measure import Clock, Spread
from torch import Tensor

from ctxdocs.checkpoints import load_compressor
from ctxdocs.compressors.base import Compressor
from ctxdocs.compressors.selection import SHARES
from ctxdocs.errors import CtxdocsError
from ctxdocs.likelihood import likelihoods
from ctxdocs.memory import KVMemory, Memory

_STEPS = 16


def windows(compressor: Compressor, corpus: Path, document: int, continuation: int, most: int) -> list[Tensor]:
    """Return stretches of the corpus, ``document + continuation`` tokens each."""
    text = torch.cat(list(inputs.chunks_of(corpus, compressor, 256, 0)))
    return list(text.split(document + continuation))[: min(most, len(text) // (document + continuation))]


def measure_budget(
    compressor: Compressor, stretches: Sequence[Tensor], document: int, exact: float, **options: Any
) -> dict[str, Any]:
    """Compress the documents of all stretches; return what a memory weighs, and what the continuations lose."""
    memories = compressor.compress_ids([ids[:document] for ids in stretches], **options)
    return {
        "bytes/token": memories[0].nbytes / document,
        "cached/kept": sum(map(_width, memories)) / sum(memory.slots for memory in memories),
        "loss": (loss := _loss(compressor, memories, stretches, document)),
        "above exact": loss - exact,
    }


def _loss(compressor: Compressor, memories: Sequence[Memory], stretches: Sequence[Tensor], document: int) -> float:
    """Mean over continuations, in nats per token, of all tokens but the first."""
    prompts: list[Any] = [
        [compressor.prefix_ids, memory, ids[document : document + 1]]
        for memory, ids in zip(memories, stretches, strict=True)
    ]
    found = likelihoods(compressor, prompts, [ids[document + 1 :] for ids in stretches])
    return -sum(each.mean for each in found) / len(found)


def _width(memory: Memory) -> float:
    """Return slots per head as they lie in a cache: every layer is as wide as its longest head."""
    lengths = memory.lengths if isinstance(memory, KVMemory) else None
    return memory.slots if lengths is None else float(lengths.amax(1).float().mean())


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what the command line asks for."""
    compressor = load_compressor(options.model, method="kvzip", device=options.device, dtype=options.dtype)
    document = options.document_tokens
    stretches = windows(compressor, options.corpus, document, options.continuation_tokens, options.documents)
    whole = compressor.compress_ids([ids[:document] for ids in stretches], ratio=1)
    exact = _loss(compressor, whole, stretches, document)
    settings = {(share, ratio): {"budget": share, "ratio": ratio} for ratio in options.ratios for share in SHARES}
    rows = {key: measure_budget(compressor, stretches, document, exact, **each) for key, each in settings.items()}
    memories = {key: compressor.compress_ids([stretches[0][:document]], **each) for key, each in settings.items()}
    seconds = Clock(compressor.backbone.device).alternate(
        {
            key: lambda memory=memory: compressor.generate_ids(
                stretches[0][document:], memory, max_new_tokens=_STEPS, eos_token_ids=()
            )
            for key, memory in {"exact": whole[:1], **memories}.items()
        },
        options.rounds,
    )
    return {
        "command": measure.command_line(),
        "environment": measure.environment(compressor.backbone.device),
        "compressor": inputs.describe(compressor, None),
        "documents": len(stretches),
        "exact": {"bytes/token": whole[0].nbytes / document, "loss": exact},
        "budgets": [
            {
                "ratio": ratio,
                "budget": share,
                **row,
                "reading / exact": Spread.of_ratios(seconds[share, ratio], seconds["exact"]),
            }
            for (share, ratio), row in rows.items()
        ],
    }


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    inputs.add_model_arguments(parser)
    default = Path(__file__).parents[1] / "examples" / "corpus"
    parser.add_argument("--corpus", type=Path, default=default, help="a folder of documents (default: the example)")
    parser.add_argument("--documents", type=int, default=16, help="how many stretches of the corpus")
    parser.add_argument("--document-tokens", type=int, default=512)
    parser.add_argument("--continuation-tokens", type=int, default=64)
    parser.add_argument("--ratios", type=float, nargs="+", default=[2, 4, 8])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    try:
        result = run(options)
    except CtxdocsError as error:
        parser.error(str(error))
    exact = result["exact"]
    print(f"exact: {exact['bytes/token']:,.0f} bytes per token, loss {exact['loss']:.3f}")
    measure.table(f"kvzip on {result['documents']} documents of {options.document_tokens} tokens", result["budgets"])
    measure.write_json(options.output, result)


if __name__ == "__main__":
    main()
