"""What the rows of an evaluation come to: means, differences, costs and times."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ctxdocs.evaluation.rows import Row, RowStore
from ctxdocs.evaluation.statistics import Interval, bootstrap
from ctxdocs.evaluation.task import Metric, Task


@dataclass(frozen=True)
class Score:
    """A metric's mean over the rows of one model, task and reading, or over one group of them.

    Parameters
    ----------
    model, task, reading, metric : str
        Of which rows, and what.
    group : dict
        Labels that the rows share; empty for all of them.
    value : Interval
        The mean.
    """

    model: str
    task: str
    reading: str
    metric: str
    group: Mapping[str, Any]
    value: Interval


@dataclass(frozen=True)
class Difference:
    """What a reading has over another one, example by example.

    Parameters
    ----------
    model, task, reading, metric : str
        Of which rows, and what.
    against_model, against : str
        The other reading, and its model.
    value : Interval
        Mean of the paired differences, over the examples that both could read.
    """

    model: str
    task: str
    reading: str
    metric: str
    against_model: str
    against: str
    value: Interval


@dataclass(frozen=True)
class Cost:
    """What a reading takes, summed over its rows.

    Parameters
    ----------
    model, task, reading : str
        Of which rows.
    rows, skipped : int
        Examples that were tried, and those that could not be.
    context_tokens, slots, nbytes : float
        Per example: tokens of the contexts, slots read in their place, bytes of those.
    """

    model: str
    task: str
    reading: str
    rows: int
    skipped: int
    context_tokens: float
    slots: float
    nbytes: float

    @property
    def tokens_per_slot(self) -> float | None:
        """The ratio that was reached; None where nothing was read."""
        return self.context_tokens / self.slots if self.slots else None

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes kept for every token of text."""
        return self.nbytes / self.context_tokens if self.context_tokens else None


@dataclass(frozen=True)
class Time:
    """How long a reading took beside the text, on the same examples in the same process.

    Parameters
    ----------
    model, task, reading : str
        Of which rows.
    examples : int
        Examples behind it.
    read, compress : float
        Time to read and answer, and to compress, over the time to read and answer with the text.
    """

    model: str
    task: str
    reading: str
    examples: int
    read: float
    compress: float


@dataclass
class Evaluation:
    """Rows and what they come to.

    Parameters
    ----------
    config, models : dict
        What was run.
    tasks : dict of Task
        By name, in the order in which they ran.
    rows : list of Row
        One for every example, reading and model.
    scores, differences, costs, times
        See the classes.
    skipped : dict
        ``"model/task/reading"`` to messages and how often each was met.
    left_out : dict
        ``"model/task"`` to records that made no example, by the reason.
    """

    config: dict[str, Any]
    models: dict[str, dict[str, Any]]
    tasks: dict[str, Task]
    rows: list[Row]
    scores: list[Score] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    times: list[Time] = field(default_factory=list)
    skipped: dict[str, dict[str, int]] = field(default_factory=dict)
    left_out: dict[str, dict[str, int]] = field(default_factory=dict)

    def results(self) -> dict[str, Any]:
        """Return JSON-able values; times are the only ones that differ from one run to the next."""
        return {
            "scores": [_flat(score) for score in self.scores],
            "differences": [_flat(difference) for difference in self.differences],
            "costs": [
                {**asdict(cost), "tokens_per_slot": cost.tokens_per_slot, "bytes_per_token": cost.bytes_per_token}
                for cost in self.costs
            ],
            "skipped": self.skipped,
            "times": [asdict(time) for time in self.times],
        }

    def score(self, model: str, task: str, reading: str, metric: str | None = None) -> Score | None:
        """Return the score over all examples, of the task's own metric unless another is named."""
        metric = metric or self.tasks[task].metrics[0].name
        wanted = (model, task, reading, metric)
        found = (s for s in self.scores if not s.group and (s.model, s.task, s.reading, s.metric) == wanted)
        return next(found, None)

    def readings(self, model: str, task: str) -> list[str]:
        """Return how a model read a task's contexts, in order."""
        return list(dict.fromkeys(cost.reading for cost in self.costs if (cost.model, cost.task) == (model, task)))

    def cost(self, model: str, task: str, reading: str) -> Cost:
        """Return what a reading took."""
        wanted = (model, task, reading)
        return next(cost for cost in self.costs if (cost.model, cost.task, cost.reading) == wanted)


def summarised(store: RowStore, tasks: Sequence[Task]) -> Evaluation:
    """Return what the rows of an evaluation come to."""
    by_name = {task.name: task for task in tasks}
    rows = [row for row in store.rows.values() if row.task in by_name]
    evaluation = Evaluation(store.config, store.models, by_name, rows, left_out=store.left_out)
    grouped: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        grouped[row.model, row.task, row.reading].append(row)
    for (model, name, reading), own in sorted(grouped.items(), key=lambda item: _order(store, by_name, item[0])):
        tried = [row for row in own if not row.skipped]
        evaluation.scores += _scores(by_name[name], model, reading, tried)
        evaluation.costs.append(_cost(model, name, reading, own))
        if reasons := Counter(row.skipped for row in own if row.skipped):
            evaluation.skipped[f"{model}/{name}/{reading}"] = dict(reasons)
        if time := _time(model, name, reading, tried, grouped.get((model, name, "text"), [])):
            evaluation.times.append(time)
    evaluation.differences = list(_differences(evaluation, grouped))
    return evaluation


def _order(store: RowStore, tasks: Mapping[str, Task], key: tuple[str, str, str]) -> tuple[Any, ...]:
    model, task, reading = key
    models, readings = store.config["models"], store.models[model]["readings"]
    return list(tasks).index(task), models.index(model), readings.index(reading)


def _scores(task: Task, model: str, reading: str, rows: Sequence[Row]) -> Iterator[Score]:
    groups: list[tuple[str, ...]] = [(), *((name,) for name in task.groups)]
    if len(task.groups) > 1:
        groups.append(task.groups)
    for metric, names in itertools.product(task.metrics, groups):
        by_labels: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
        for row in rows:
            if metric.name in row.metrics:
                by_labels[tuple(row.labels[name] for name in names)].append(row)
        for labels, own in sorted(by_labels.items()):
            value = bootstrap([row.metrics[metric.name] for row in own], [row.cluster for row in own])
            yield Score(model, task.name, reading, metric.name, dict(zip(names, labels, strict=True)), value)


def _differences(evaluation: Evaluation, grouped: Mapping[tuple[str, str, str], list[Row]]) -> Iterator[Difference]:
    """Compare every memory with text, nothing and others' memories; and with the first model's memory."""
    models = list(evaluation.models)
    for model, name, reading in [(cost.model, cost.task, cost.reading) for cost in evaluation.costs]:
        if not reading.startswith("memory"):
            continue
        pairs = [(model, other) for other in evaluation.readings(model, name) if not other.startswith("memory")]
        ratio = reading.removeprefix("memory")
        pairs = [pair for pair in pairs if not pair[1].startswith("other") or pair[1] == f"other{ratio}"]
        if model != models[0]:
            pairs += [(models[0], other) for other in _counterparts(evaluation, name, model, models[0], reading)]
        for metric, (other_model, other) in itertools.product(evaluation.tasks[name].metrics, pairs):
            value = _paired(metric, grouped[model, name, reading], grouped[other_model, name, other])
            if value is not None:
                yield Difference(model, name, reading, metric.name, other_model, other, value)


def _counterparts(evaluation: Evaluation, task: str, model: str, other_model: str, reading: str) -> list[str]:
    """Return the other model's memory of the same ratio; or, where each has but one, that one."""
    own, others = (
        [name for name in evaluation.readings(one, task) if name.startswith("memory")] for one in (model, other_model)
    )
    return [reading] if reading in others else others if len(own) == len(others) == 1 else []


def _paired(metric: Metric, rows: Iterable[Row], others: Iterable[Row]) -> Interval | None:
    theirs = {row.example: row.metrics[metric.name] for row in others if metric.name in row.metrics}
    both = [row for row in rows if metric.name in row.metrics and row.example in theirs]
    if not both:
        return None
    return bootstrap([row.metrics[metric.name] - theirs[row.example] for row in both], [row.cluster for row in both])


def _cost(model: str, task: str, reading: str, rows: Sequence[Row]) -> Cost:
    tried = [row for row in rows if not row.skipped]

    def mean(name: str) -> float:
        return sum(row.costs.get(name, 0) for row in tried) / max(len(tried), 1)

    return Cost(
        model, task, reading, len(tried), len(rows) - len(tried), mean("context_tokens"), mean("slots"), mean("bytes")
    )


def _time(model: str, task: str, reading: str, rows: Sequence[Row], texts: Sequence[Row]) -> Time | None:
    """Compare times with those of the text; rows of other processes, or of examples without a text, do not count."""
    by_example = {(row.example, row.process): row.seconds["read"] for row in texts if row.seconds}
    both = [row for row in rows if (row.example, row.process) in by_example]
    total = sum(by_example[row.example, row.process] for row in both)
    if not both or not total:
        return None
    read, compress = (sum(row.seconds[name] for row in both) / total for name in ("read", "compress"))
    return Time(model, task, reading, len(both), read, compress)


def _flat(value: Score | Difference) -> dict[str, Any]:
    values = asdict(value)
    interval = values.pop("value")
    return {**values, **interval}
