"""``report.html``: one file that needs nothing else, for a phone as for a desk, in light and in dark."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape

from ctxdocs.evaluation import plots
from ctxdocs.evaluation.page_style import STYLE
from ctxdocs.evaluation.rows import Row
from ctxdocs.evaluation.summary import Evaluation, Score
from ctxdocs.evaluation.task import Metric, Task

#: Answers that are shown of every task and reading.
_SHOWN = 4
_LONGEST = 400


def page(evaluation: Evaluation) -> str:
    """Return the report; without matplotlib it has tables only, and says so."""
    names = ", ".join(evaluation.models)
    body = [
        f"<h1>What the memories of {escape(names)} keep</h1>",
        *_introduction(evaluation),
        _overview(evaluation),
        *(_task(evaluation, task) for task in evaluation.tasks.values()),
        _costs(evaluation),
        _left_out(evaluation),
        _how_it_was_run(evaluation),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>ctxdocs eval: {escape(names)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _introduction(evaluation: Evaluation) -> Iterator[str]:
    config = evaluation.config
    yield (
        "<p>The same model reads the same examples with their contexts as compressed <b>memory</b>, as <b>text</b>, or "
        "with <b>none</b>. What a memory is worth lies between the last two. Brackets are 95&nbsp;% bootstrap "
        f"intervals; seed {config['seed']}, at most {config['limit']} examples per task.</p>"
    )
    if not plots.available():
        yield "<p class=note>matplotlib is not installed, so there are no plots: pip install ctxdocs[eval]</p>"


def _overview(evaluation: Evaluation) -> str:
    """Return the leaderboard: a line for every model and reading, a column for every task's own metric."""
    tasks = list(evaluation.tasks.values())
    head = ["model", "given as", "tokens per slot", "bytes per token", *(task.name for task in tasks)]
    rows = []
    for model in evaluation.models:
        readings = dict.fromkeys(reading for task in tasks for reading in evaluation.readings(model, task.name))
        for reading in readings:
            own = [c for c in evaluation.costs if (c.model, c.reading) == (model, reading) and c.rows]
            tokens, slots, nbytes = (
                sum(getattr(c, name) * c.rows for c in own) for name in ("context_tokens", "slots", "nbytes")
            )
            if reading == "none":  # where a stream goes on behind its latest text, that is no memory
                slots = 0
            cells = [model, reading, _ratio(tokens, slots), _ratio(nbytes, tokens) if slots else ""]
            rows.append([*map(escape, cells), *(_cell(evaluation, task, model, reading) for task in tasks)])
    units = "; ".join(f"{escape(task.name)}: {_described(task.metrics[0])}" for task in tasks)
    return f"<h2>Overview</h2>{_by_model(evaluation, head, rows, text=2)}<p class=note>{units}.</p>"


def _task(evaluation: Evaluation, task: Task) -> str:
    parts = [f"<h2 id={task.name}>{escape(task.name)}</h2>", f"<p>{escape(_first_paragraph(task))}</p>"]
    has_memory = any(cost.task == task.name and cost.reading.startswith("memory") for cost in evaluation.costs)
    if plots.available() and has_memory:
        parts.append(f"<figure>{plots.quality_against_ratio(evaluation, task.name)}</figure>")
    parts += [_scores(evaluation, task), _differences(evaluation, task)]
    parts += [_groups(evaluation, task), _answers(evaluation, task)]
    return "\n".join(part for part in parts if part)


def _scores(evaluation: Evaluation, task: Task) -> str:
    head = ["model", "given as", "examples", *(metric.label for metric in task.metrics)]
    rows = []
    for model in evaluation.models:
        for reading in evaluation.readings(model, task.name):
            cost = evaluation.cost(model, task.name, reading)
            values = [_cell(evaluation, task, model, reading, metric, bounds=True) for metric in task.metrics]
            rows.append([escape(model), escape(reading), f"{cost.rows}", *values])
    return _by_model(evaluation, head, rows, text=2)


def _differences(evaluation: Evaluation, task: Task) -> str:
    rows = []
    metrics = {metric.name: metric for metric in task.metrics}
    for one in evaluation.differences:
        if one.task != task.name or one.metric != task.metrics[0].name:
            continue
        metric = metrics[one.metric]
        against = one.against if one.model == one.against_model else f"{one.against_model}, {one.against}"
        mean, low, high = (_signed(metric, getattr(one.value, name)) for name in ("mean", "low", "high"))
        clear = "yes" if one.value.excludes_zero else "no"
        cells = [one.model, f"{one.reading} minus {against}", mean, f"{low} to {high}", clear]
        rows.append([*map(escape, cells), f"{one.value.count}"])
    if not rows:
        return ""
    head = ["model", "difference", task.metrics[0].label, "95 % interval", "clear", "examples"]
    return f"<h3>Paired differences</h3>{_by_model(evaluation, head, rows, text=2)}"


def _groups(evaluation: Evaluation, task: Task) -> str:
    """Return results by label: a heat map for every reading where there are two labels, and else one table."""
    metric = task.metrics[0]
    if len(task.groups) == 2:
        return _heat_maps(evaluation, task, metric)
    if len(task.groups) == 1:
        name = task.groups[0]
        found = [s for s in evaluation.scores if s.task == task.name and s.metric == metric.name and s.group]
        columns = list(dict.fromkeys(score.group[name] for score in found))
        rows = []
        for model in evaluation.models:
            for reading in evaluation.readings(model, task.name):
                own = {s.group[name]: s.value.mean for s in found if (s.model, s.reading) == (model, reading)}
                cells = [_heat(metric, own.get(column)) for column in columns]
                rows.append([escape(model), escape(reading), *cells])
        head = ["model", "given as", *map(str, columns)]
        return f"<h3>By {escape(name)}</h3>{_by_model(evaluation, head, rows, text=2)}"
    return ""


def _heat_maps(evaluation: Evaluation, task: Task, metric: Metric) -> str:
    across, down = task.groups
    parts = [f"<h3>By {escape(across)} and {escape(down)}</h3><div class=maps>"]
    for model in evaluation.models:
        for reading in evaluation.readings(model, task.name):
            cells: dict[tuple[object, object], Score] = {
                (score.group[across], score.group[down]): score
                for score in evaluation.scores
                if (score.task, score.model, score.reading, score.metric) == (task.name, model, reading, metric.name)
                and len(score.group) == 2
            }
            if not cells:
                continue
            columns, lines = (sorted({key[axis] for key in cells}, key=_sortable) for axis in (0, 1))
            rows = [
                [
                    f"<th scope=row>{escape(str(line))}</th>",
                    *(_heat(metric, cells[c, line].value.mean if (c, line) in cells else None) for c in columns),
                ]
                for line in lines
            ]
            name = reading if len(evaluation.models) == 1 else f"{model}, {reading}"
            head = [f"{down} ↓ {across} →", *map(str, columns)]
            parts.append(f"<div><h4>{escape(name)}</h4>{_table(head, rows, text=1)}</div>")
    return "".join([*parts, "</div>"])


def _answers(evaluation: Evaluation, task: Task) -> str:
    """Return some answers of every reading, the best and the worst by the task's own metric."""
    metric = task.metrics[0].name
    parts = []
    for model in evaluation.models:
        for reading in evaluation.readings(model, task.name):
            own = [
                r for r in evaluation.rows if (r.model, r.task, r.reading) == (model, task.name, reading) and r.output
            ]
            ranked = sorted(own, key=lambda row: -row.metrics.get(metric, 0.0))
            half = _SHOWN // 2
            chosen = ranked if len(ranked) <= _SHOWN else [*ranked[:half], *ranked[-half:]]
            if chosen:
                name = reading if len(evaluation.models) == 1 else f"{model}, {reading}"
                parts.append(f"<h4>{escape(name)}</h4>{''.join(map(_answer, chosen))}")
    return f"<details><summary>Answers, good and bad</summary>{''.join(parts)}</details>" if parts else ""


def _answer(row: Row) -> str:
    question = f"<p><b>{escape(_cut(row.question))}</b></p>" if row.question else ""
    wanted = f"<p class=note>wanted: {escape(_cut(' | '.join(filter(None, row.answers))))}</p>" if row.answers else ""
    return f"<blockquote>{question}<p>{escape(_cut(row.output))}</p>{wanted}</blockquote>"


def _costs(evaluation: Evaluation) -> str:
    head = ["task", "model", "given as", "tokens", "slots", "tokens per slot", "bytes per token", "time to read",
            "time to compress"]  # fmt: skip
    times = {(time.task, time.model, time.reading): time for time in evaluation.times}
    rows = []
    for cost in evaluation.costs:
        time = times.get((cost.task, cost.model, cost.reading))
        spent = [f"{time.read:.2f}", f"{time.compress:.2f}"] if time else ["", ""]
        cells = [cost.task, cost.model, cost.reading, f"{cost.context_tokens:,.0f}", f"{cost.slots:,.0f}"]
        kept = _number(cost.bytes_per_token) if cost.slots else ""
        rows.append([*map(escape, cells), _number(cost.tokens_per_slot), kept, *spent])
    drawn = "".join(f"<figure>{svg}</figure>" for svg in _bars(evaluation))
    return (
        f"<h2>Bytes and time</h2>{drawn}{_by_model(evaluation, head, rows, text=3)}"
        "<p class=note>Per example. Bytes of a memory are those it is stored in; bytes of text are its keys and "
        "values. Times are multiples of what reading and answering with the text takes, on the same examples in the "
        "same process.</p>"
    )


def _bars(evaluation: Evaluation) -> Iterator[str]:
    if not plots.available():
        return
    several = len(evaluation.models) > 1
    nbytes: dict[str, list[float]] = {}
    times: dict[str, list[float]] = {}
    for cost in evaluation.costs:
        if cost.slots and cost.nbytes and cost.bytes_per_token is not None:
            name = f"{cost.model}, {cost.reading}" if several else cost.reading
            nbytes.setdefault(name, []).append(cost.bytes_per_token)
    for time in evaluation.times:
        name = f"{time.model}, {time.reading}" if several else time.reading
        times.setdefault(name, []).append(time.read)
    for title, found, label in (
        ("Bytes per token of text", nbytes, "bytes per token of text, mean over tasks"),
        ("Time to read and answer", times, "time to read and answer, text = 1, mean over tasks"),
    ):
        if found:
            yield plots.bars(title, [(name, sum(v) / len(v)) for name, v in found.items()], label)


def _left_out(evaluation: Evaluation) -> str:
    rows = []
    for place, reasons in evaluation.skipped.items():  # every one names its own numbers
        rows.append([escape(place), f"{sum(reasons.values())}", f"skipped; for example: {escape(next(iter(reasons)))}"])
    for place, reasons in evaluation.left_out.items():
        rows += [[escape(place), f"{count}", escape(reason)] for reason, count in reasons.items()]
    return f"<h2>Skipped and left out</h2>{_table(['where', 'how many', 'why'], rows, text=3)}" if rows else ""


def _how_it_was_run(evaluation: Evaluation) -> str:
    values = json.dumps({"config": evaluation.config, "models": evaluation.models}, indent=1, ensure_ascii=False)
    return f"<details><summary>How it was run</summary><pre>{escape(values)}</pre></details>"


def _by_model(evaluation: Evaluation, head: Sequence[str], rows: Sequence[Sequence[str]], *, text: int) -> str:
    """Return a table whose column ``model`` is left out where there is one model only."""
    if len(evaluation.models) > 1:
        return _table(head, rows, text=text)
    place = head.index("model")
    head, *rows = ([*row[:place], *row[place + 1 :]] for row in (head, *rows))
    return _table(head, rows, text=text - 1)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, text: int) -> str:
    """Return a table; heads are escaped here, cells where they are made. The first ``text`` columns are no numbers."""
    cells = "".join(f"<th scope=col>{escape(name)}</th>" for name in head)
    lines = "".join("<tr>" + "".join(map(_as_cell, row)) + "</tr>" for row in rows)
    return f'<div class="table text{text}"><table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table></div>'


def _as_cell(content: str) -> str:
    return content if content.startswith(("<td", "<th")) else f"<td>{content}</td>"


def _cell(
    evaluation: Evaluation, task: Task, model: str, reading: str, metric: Metric | None = None, *, bounds: bool = False
) -> str:
    metric = metric or task.metrics[0]
    score = evaluation.score(model, task.name, reading, metric.name)
    if score is None:
        return ""
    value = score.value
    text = f"<b>{metric.written(value.mean)}</b>"
    if metric.unit == "nats":
        text += f" <span class=note>({math.exp(min(value.mean, 700)):.4g})</span>"
    if bounds:
        text += f" <span class=note>[{metric.written(value.low)} to {metric.written(value.high)}]</span>"
    return text


def _heat(metric: Metric, value: float | None) -> str:
    if value is None:
        return "<td></td>"
    if metric.unit != "%":
        return f"<td>{metric.written(value)}</td>"
    return f'<td style="background:rgb(var(--heat)/{0.6 * value:.3f})">{metric.written(value)}</td>'


def _described(metric: Metric) -> str:
    if metric.unit == "nats":
        return f"{metric.label}, nats (perplexity); lower is better"
    return f"{metric.label}, %" + ("; lower is better" if metric.better == "lower" else "")


def _signed(metric: Metric, value: float) -> str:
    text = metric.written(value)
    return text if text.startswith("-") else f"+{text}"


def _first_paragraph(task: Task) -> str:
    return " ".join((type(task).__doc__ or "").split("\n\n")[0].split())


def _ratio(one: float, other: float) -> str:
    return _number(one / other if other else None)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f}"


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _sortable(value: object) -> tuple[int, float, str]:
    return (0, float(value), "") if isinstance(value, (int, float)) else (1, 0.0, str(value))
