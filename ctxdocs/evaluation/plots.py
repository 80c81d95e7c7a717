"""Plots of an evaluation as SVG that stands in a page: its text and colours are the page's, in light and in dark."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ctxdocs.evaluation.summary import Evaluation, Score
from ctxdocs.evaluation.task import Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Series colours: CSS variables ``--s0`` and so on, which the page defines.
SERIES = 6
_INK, _GRID = "#010203", "#010204"
_COLOURS = [f"#01030{index}" for index in range(SERIES)]
_RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _GRID,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def available() -> bool:
    """Return whether matplotlib is there to draw with."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def quality_against_ratio(evaluation: Evaluation, task: str) -> str:
    """Return the task's own metric by the ratio that memories reached, with text and nothing as lines beside them."""
    import matplotlib

    metric = evaluation.tasks[task].metrics[0]
    with matplotlib.rc_context({**_RC, "svg.hashsalt": f"ratio/{task}"}):
        figure, axes = _figure(4.6, 3.2)
        for index, model in enumerate(evaluation.models):
            colour = _COLOURS[index % SERIES]
            _memories(axes, evaluation, task, model, metric, colour)
            for reading, style in (("text", "--"), ("none", ":")):
                score = evaluation.score(model, task, reading)
                if score is not None:
                    axes.axhline(_value(metric, score.value.mean), color=colour, linestyle=style, label="_")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.set_xlabel("tokens per slot")
        axes.set_ylabel(_axis(metric))
        if metric.unit == "%":
            axes.set_ylim(0, min(max(axes.get_ylim()[1], 5), 102))
        _legend(axes, [("--", "text"), (":", "nothing")], evaluation.models if len(evaluation.models) > 1 else ())
        return _svg(figure, f"{metric.label} of {task} against tokens per slot")


def bars(title: str, rows: Sequence[tuple[str, float]], label: str) -> str:
    """Return horizontal bars, one for every named value, the first on top."""
    import matplotlib

    with matplotlib.rc_context({**_RC, "svg.hashsalt": f"bars/{title}"}):
        figure, axes = _figure(4.6, 0.7 + 0.32 * len(rows))
        names, values = [name for name, _ in rows], [value for _, value in rows]
        axes.barh(range(len(rows)), values, color=_COLOURS[0], height=0.6)
        axes.set_yticks(range(len(rows)), labels=names)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(label)
        return _svg(figure, title)


def _memories(axes: Axes, evaluation: Evaluation, task: str, model: str, metric: Metric, colour: str) -> None:
    """Draw the points of one model's memories, by their ratios, with their intervals."""
    points: list[tuple[float, Score]] = []
    for reading in evaluation.readings(model, task):
        score, ratio = evaluation.score(model, task, reading), evaluation.cost(model, task, reading).tokens_per_slot
        if reading.startswith("memory") and score is not None and ratio:
            points.append((ratio, score))
    points.sort(key=lambda point: point[0])
    if not points:
        return
    means, lows, highs = (
        [_value(metric, getattr(score.value, name)) for _, score in points] for name in ("mean", "low", "high")
    )
    spread = [
        [mean - low for mean, low in zip(means, lows, strict=True)],
        [high - mean for mean, high in zip(means, highs, strict=True)],
    ]
    ratios = [ratio for ratio, _ in points]
    axes.errorbar(ratios, means, yerr=spread, color=colour, marker="o", capsize=3, label=model)


def _legend(axes: Axes, styles: Sequence[tuple[Any, str]], models: Iterable[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=_COLOURS[i % SERIES], marker="o", label=name) for i, name in enumerate(models)]
    handles += [Line2D([], [], color=_INK, linestyle=style, label=name) for style, name in styles]
    axes.legend(handles=handles, fontsize=9)


def _value(metric: Metric, value: float) -> float:
    return 100 * value if metric.unit == "%" else value


def _axis(metric: Metric) -> str:
    return f"{metric.label}, %" if metric.unit == "%" else f"{metric.label}, nats"


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Figure, title: str) -> str:
    """Return the figure as an ``svg`` element whose colours are the page's variables."""
    from html import escape

    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<svg([^>]*?) width="[^"]*"', r"<svg\1", text, count=1)
    text = re.sub(r'<svg([^>]*?) height="[^"]*"', r"<svg\1", text, count=1)
    named = f'<svg role="img" aria-label="{escape(title)}" '
    text = text.replace("<svg ", named, 1).replace(_INK, "currentColor").replace(_GRID, "var(--grid)")
    for index, colour in enumerate(_COLOURS):
        text = text.replace(colour, f"var(--s{index})")
    return text
