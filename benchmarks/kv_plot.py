"""The figures of ``kv.py`` as a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from methods_plot import bars, figure, spread_of

_GOAL = 2.2
_EXACT = "kv"


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw cost, time to first token and loss.

    Parameters
    ----------
    result : mapping
        What ``kv.py`` writes as JSON.
    path : pathlib.Path
        Where to; the ending says the format.
    """
    with figure(path, result["environment"]) as (cost, reading, loss):
        bars(cost, result.get("compressing", []), "prefills")
        cost.axhline(_GOAL, color="black", linewidth=0.8, linestyle="--")
        cost.set_title(f"compressing: plain prefills of the same text\n(line: the goal for kvzip, {_GOAL})")
        if cost.has_data():
            cost.legend(frameon=False, fontsize="small")
        _reading(reading, result.get("reading", []))
        reading.set_title("time to first token:\ntimes faster from memory than from text")
        _losses(loss, result.get("losses", []))
        loss.set_title("loss of a continuation above that\nbehind the exact memory, nats per token")


def _reading(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw a line for each shape and memory over the length of the document."""
    for shape, memory in dict.fromkeys((row["shape"], row["memory"]) for row in rows):
        here = [row for row in rows if (row["shape"], row["memory"]) == (shape, memory)]
        spreads = [spread_of(row["times faster"]) for row in here]
        middle = [spread["median"] for spread in spreads]
        below = [spread["median"] - spread["low"] for spread in spreads]
        above = [spread["high"] - spread["median"] for spread in spreads]
        at = [row["document tokens"] for row in here]
        axes.errorbar(at, middle, yerr=[below, above], marker="o", capsize=2, label=f"{shape}, {memory}")
    if rows:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("tokens of the document")
        axes.legend(frameon=False, fontsize="small")


def _losses(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw a line for each method and budget over the ratio."""
    kept = [row for row in rows if row["budget"]]
    for method, budget in dict.fromkeys((row["context"], row["budget"]) for row in kept):
        here = [row for row in kept if (row["context"], row["budget"]) == (method, budget)]
        label = method if budget == "uniform" else f"{method}, {budget}"
        error = [row["standard error"] for row in here]
        at, middle = [row["ratio"] for row in here], [row["above exact"] for row in here]
        axes.errorbar(at, middle, yerr=error, marker="o", capsize=2, label=label)
    for row in rows:
        if row["context"] == "nothing":
            axes.axhline(row["above exact"], color="black", linewidth=0.8, linestyle=":", label="no context")
    if kept:
        axes.set_xscale("log", base=2)
        axes.set_xlabel("tokens per slot")
        axes.legend(frameon=False, fontsize="small")
