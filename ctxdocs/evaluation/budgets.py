"""One budget for every method: the ratio of each that is nearest to it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ctxdocs.errors import InputError

if TYPE_CHECKING:
    from ctxdocs.compressors.base import Compressor

_BUDGET = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(k?B)?\s*")
_PROBE_TOKENS = 256


def ratio_near(compressor: Compressor, budget: str) -> int | None:
    """Return the compressor's ratio that is nearest to a budget, or None where its ratio cannot be chosen.

    Parameters
    ----------
    compressor : Compressor
        Whose slots are counted, or weighed.
    budget : str
        Tokens per slot (``"8"``), or bytes per token of text (``"512B"``, ``"2kB"``).

    Raises
    ------
    InputError
        If the budget is neither.
    """
    match = _BUDGET.fullmatch(budget)
    value = float(match[1]) if match else 0.0
    if match is None or value <= 0:
        raise InputError(f"the budget {budget!r} is neither tokens per slot nor bytes per token", "as 8, 512B or 2kB")
    if not compressor.ratios:
        return None
    if match[2]:
        value = bytes_per_slot(compressor) / (value * (1000 if match[2] == "kB" else 1))
    return min(max(round(value), compressor.ratios.start), compressor.ratios.stop - 1)


def bytes_per_slot(compressor: Compressor) -> float:
    """Return what a slot of a memory weighs, in bytes."""
    import torch

    with torch.no_grad():
        memory = compressor.compress_ids([torch.zeros(_PROBE_TOKENS, dtype=torch.long)])[0]
    return memory.nbytes / memory.slots
