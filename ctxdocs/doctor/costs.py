"""What memories weigh, and what reading them in place of text saves."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Literal

import torch

from ctxdocs.doctor.material import Material
from ctxdocs.doctor.quality import BLENDED
from ctxdocs.doctor.report import Check

if TYPE_CHECKING:
    from ctxdocs.compressors.kv import KVCompressor
    from ctxdocs.memory import Memory
    from ctxdocs.prompts import Prompt

_ROUNDS = 3


def check_size(exact: Sequence[Memory], by_ratio: Mapping[int, float]) -> Check:
    """Return the line on bytes: of exact memories, and those found ``by_ratio``, per token of the source."""
    each = sum(memory.nbytes for memory in exact) / sum(memory.source_tokens for memory in exact)
    message = f"{each:,.0f} bytes per token" + "".join(f", {n:,.0f} at ratio {ratio}" for ratio, n in by_ratio.items())
    return Check("size", "note", message, {"bytes_per_token": each})


def check_time(
    compressor: KVCompressor, material: Material, memories: Sequence[Memory], blending: Literal["measured", "left out"]
) -> Check:
    """Return the line on the time to a first token behind text, memories, and blended memories.

    They take turns, round after round, so that what else the machine does falls on all of them.
    """
    count = len(memories)
    documents, probe = material.documents(count), material.probe(count)
    prefix = compressor.prefix_memory()
    ways: dict[str, Callable[[], Prompt]] = {
        "text": lambda: [torch.cat([compressor.prefix_ids, *documents, probe])],
        "memories": lambda: [prefix, *memories, probe],
    }
    if blending == "measured":
        ways["blended"] = lambda: [prefix, *compressor.blend(memories, documents, BLENDED), probe]
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(_ROUNDS):
        for name, prompt in ways.items():
            start = time.perf_counter()
            int(compressor.prefill([prompt()])[0].argmax())  # waits for the device
            seconds[name].append(time.perf_counter() - start)
    gains = [text / memory for text, memory in zip(seconds["text"], seconds["memories"], strict=True)]
    typical = {name: median(times) for name, times in seconds.items()}
    message = (
        f"first token behind {_counted(count)}: text {_shown(typical['text'])}, "
        f"memories {_shown(typical['memories'])}, {median(gains):.1f} times as fast "
        f"({min(gains):.1f} to {max(gains):.1f} in {_ROUNDS} rounds)"
    )
    if "blended" in typical:
        message += f"; {BLENDED:.0%} blended {_shown(typical['blended'])}"
    values = {"documents": count, "seconds": typical, "gain": {"median": median(gains), "rounds": gains}}
    return Check("time", "note", message, values)


def _counted(documents: int) -> str:
    return "1 document" if documents == 1 else f"{documents} documents"


def _shown(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"
