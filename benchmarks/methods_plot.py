"""The figures of ``methods.py`` as a plot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_GOAL = 0.9
_COLOURS = ("#4878a8", "#e08a3c", "#6a9f58", "#b05a6e")
_WIDTH = 0.8  # of all bars of a method


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw throughput, size and time to first token of every method, a bar for each shape and document length.

    Parameters
    ----------
    result : mapping
        What ``methods.py`` writes as JSON.
    path : pathlib.Path
        Where to; the ending says the format.
    """
    with figure(path, result["environment"]) as (speed, size, reading):
        bars(speed, result["compressing"], "of forward over all it runs")
        _dots(speed, result["compressing"], "of forward")
        speed.axhline(_GOAL, color="black", linewidth=0.8, linestyle="--")
        speed.set_title(
            "compressing, as a fraction of a plain forward\nover all tokens it runs (bar), over the text (dot)"
        )
        bars(size, result["memory"], "bytes per token")
        size.set_yscale("log")
        size.set_title("bytes kept per token of text")
        bars(reading, result["reading"], "times faster")
        reading.axhline(1, color="black", linewidth=0.8)
        reading.set_title("time to first token:\ntimes faster from memory than from text")
        handles, labels = speed.get_legend_handles_labels()
        speed.figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)


@contextmanager
def figure(path: Path, environment: Mapping[str, Any]) -> Iterator[Any]:
    """Write a figure of three plots, which the block draws, with the device as its title."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Text stays text, and the same figures give the same file.
    settings = {"svg.fonttype": "none", "svg.hashsalt": "ctxdocs", "axes.spines.top": False, "axes.spines.right": False}
    with pyplot.rc_context(settings):
        drawn, axes = pyplot.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
        yield axes
        drawn.suptitle(_device(environment))
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        pyplot.close(drawn)


def bars(axes: Any, rows: Sequence[Mapping[str, Any]], column: str) -> None:
    """Draw a column as bars, with the range of a spread as a line on them."""
    groups, methods = _groups(rows), _methods(rows)
    for (shape, length), colour, at, values in _series(rows, column):
        middle = [value["median"] for value in values]
        below = [value["median"] - value["low"] for value in values]
        above = [value["high"] - value["median"] for value in values]
        axes.bar(
            at,
            middle,
            _WIDTH / len(groups),
            yerr=[below, above] if any(above) else None,
            label=f"{shape}, documents of {length:,} tokens",
            color=colour,
            ecolor="#333333",
            capsize=2,
        )
    axes.set_xticks(range(len(methods)), methods, rotation=30, ha="right")


def _dots(axes: Any, rows: Sequence[Mapping[str, Any]], column: str) -> None:
    """Draw a column as dots on the bars."""
    for _, _, at, values in _series(rows, column):
        middle = [value["median"] for value in values]
        axes.plot(at, middle, "o", markersize=5, markerfacecolor="white", markeredgecolor="black")


def _series(
    rows: Sequence[Mapping[str, Any]], column: str
) -> Iterator[tuple[tuple[str, int], str, list[float], list[Mapping[str, float]]]]:
    """Yield each group, its colour, and the places and values of its bars."""
    groups, methods = _groups(rows), _methods(rows)
    for number, group in enumerate(groups):
        here = [row for row in rows if (row["shape"], row["document tokens"]) == group]
        shift = _WIDTH * ((number + 0.5) / len(groups) - 0.5)
        at = [methods.index(row["method"]) + shift for row in here]
        yield group, _COLOURS[number % len(_COLOURS)], at, [spread_of(row[column]) for row in here]


def spread_of(value: Any) -> Mapping[str, float]:
    """Return a spread as JSON has it; a single value is one without a range."""
    return value if isinstance(value, dict) else dict.fromkeys(("median", "low", "high"), value)


def _groups(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """Return each shape and document length once, in the order of the rows."""
    return list(dict.fromkeys((row["shape"], row["document tokens"]) for row in rows))


def _methods(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in rows))


def _device(environment: Mapping[str, Any]) -> str:
    cores = f", {environment['cpus']} cores" if environment["device_type"] == "cpu" else ""
    return environment["device"] + cores
