"""Runs tasks: every model, every example, every way of reading; what is done already is not done again."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxdocs.errors import ContextTooLong, InputError
from ctxdocs.evaluation.budgets import ratio_near
from ctxdocs.evaluation.data import Data
from ctxdocs.evaluation.models import Model, facts
from ctxdocs.evaluation.reading import ContextReader, Reading
from ctxdocs.evaluation.report import write_reports
from ctxdocs.evaluation.rows import Row, RowStore
from ctxdocs.evaluation.summary import Evaluation, summarised
from ctxdocs.evaluation.task import Example, Result, Task
from ctxdocs.evaluation.tasks import task_class

if TYPE_CHECKING:
    from ctxdocs.compressors.base import Compressor


@dataclass(frozen=True)
class Progress:
    """How far an evaluation is: ``done`` of ``total`` rows of a model's task."""

    model: str
    task: str
    done: int
    total: int


def evaluate(
    models: Compressor | Sequence[Model],
    tasks: Sequence[str],
    *,
    data: Sequence[str | Path] | Mapping[str, Sequence[str | Path]] = (),
    split: str = "all",
    held_out: float = 0.01,
    readings: Sequence[str] = ("memory", "text", "none"),
    ratios: Sequence[int] = (),
    budget: str | None = None,
    limit: int = 100,
    seed: int = 0,
    batch_size: int = 16,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    output: str | Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Evaluation:
    """Measure what memories keep, beside the text itself and nothing at all: one model, the same examples.

    Parameters
    ----------
    models : Compressor or sequence of Model
        What to measure.
    tasks : sequence of str
        Names in :data:`ctxdocs.evaluation.tasks.TASKS`.
    data : sequence of paths, or dict of them by task
        Files of JSON lines; under the key ``""`` those of all other tasks.
    split, held_out
        See :class:`ctxdocs.evaluation.data.Data`.
    readings : sequence of str
        Names in :data:`ctxdocs.evaluation.reading.READINGS`; a task leaves out those that mean nothing to it.
    ratios : sequence of int
        Tokens per slot to compress at, for methods where that can be chosen; by default the compressor's own.
    budget : str, optional
        In place of ratios: tokens per slot (``"8"``), or bytes per token of text (``"512B"``); every model takes the
        ratio nearest to it, and one whose ratio cannot be chosen its own.
    limit : int
        Examples per task; of benchmarks, per data set.
    seed : int
        Decides which examples are taken, and everything in them that is made up.
    batch_size : int
        Examples that are tried at once.
    options : dict of dict, optional
        Options of tasks, by the task's name.
    output : path, optional
        A folder for ``results.json``, ``results.csv``, ``rows.jsonl`` and ``report.html``. Of an evaluation with the
        same arguments that was interrupted, what is done is kept.
    on_progress : callable, optional
        Called with a :class:`Progress` after every batch.

    Returns
    -------
    Evaluation
        Rows, and what they come to.

    Raises
    ------
    InputError
        If a task, a reading or an option is unknown, a task lacks its data, or the folder holds another evaluation.
    """
    if limit < 1 or batch_size < 1:
        raise InputError(f"limit is {limit} and batch_size is {batch_size}", "both are at least 1")
    if budget is not None and ratios:
        raise InputError("a budget chooses the ratio, and ratios were given too", "give one of them")
    chosen = _tasks(tasks, data, split, held_out, options or {})
    if not isinstance(models, Sequence):
        compressor = models
        models = [Model(compressor.method, lambda: compressor)]
    if len({model.label for model in models}) < len(models):
        raise InputError("two models have the same name", "give each a label of its own")
    plan = _Plan(tuple(dict.fromkeys(readings)), tuple(dict.fromkeys(ratios)), budget, limit, seed, batch_size)
    config = {
        "models": [model.label for model in models],
        "tasks": {task.name: _described(task) for task in chosen},
        "split": split if split == "all" else {"name": split, "held_out": held_out},
        **asdict(plan),
    }
    store = RowStore(config, None if output is None else Path(output))
    for model in models:
        _run_model(model, chosen, plan, store, on_progress)
    evaluation = summarised(store, chosen)
    if store.folder is not None:
        write_reports(evaluation, store.folder)
        store.save(evaluation.results())
    return evaluation


@dataclass(frozen=True)
class _Plan:
    """What decides the rows, besides models and tasks."""

    readings: tuple[str, ...]
    ratios: tuple[int, ...]
    budget: str | None
    limit: int
    seed: int
    batch_size: int

    def readers(self, compressor: Compressor) -> list[ContextReader]:
        """Return a reader for every way of reading that the compressor has."""
        ratios: Sequence[int | None] = self.ratios if compressor.ratios else ()
        if self.budget is not None:
            ratios = [ratio_near(compressor, self.budget)]
        found = []
        for how in self.readings:
            own = (ratios or (None,)) if Reading(how).is_memory else (None,)
            found += [ContextReader(compressor, Reading(how, ratio)) for ratio in own]
        return found


def _tasks(
    names: Sequence[str],
    data: Sequence[str | Path] | Mapping[str, Sequence[str | Path]],
    split: str,
    held_out: float,
    options: Mapping[str, Mapping[str, Any]],
) -> list[Task]:
    if not names:
        raise InputError("no tasks were given", "name at least one")
    classes = {name: task_class(name) for name in names}
    by_task = dict(data) if isinstance(data, Mapping) else {"": data}
    for name in [*options, *by_task]:
        if name and name not in classes:
            task_class(name)  # says which names are near
            raise InputError(f"the task {name} is not among those that run", f"they are: {', '.join(classes)}")
    files: dict[tuple[str, ...], Data] = {}
    tasks = []
    for name, cls in classes.items():
        paths = by_task.get(name, by_task.get("", ()))
        own = files.setdefault(tuple(map(str, paths)), Data(paths, split=split, held_out=held_out))
        if cls.needs != "nothing" and not own.files:
            raise InputError(f"the task {name} needs {_NEEDS[cls.needs]}", "name a file of them with --data")
        tasks.append(cls(own, **options.get(name, {})))
    return tasks


_NEEDS = {"documents": "documents", "questions": "questions about contexts", "lines": "the benchmark's own files"}


def _described(task: Task) -> dict[str, Any]:
    values = {name: getattr(task.options, name) for name in sorted(task.options.__dataclass_fields__)}
    plain = {
        name: value if isinstance(value, (str, int, float, tuple)) else _name(value) for name, value in values.items()
    }
    return {"options": plain, "data": task.data.digests}


def _name(value: Any) -> str | None:
    return None if value is None else getattr(value, "name", type(value).__name__)


def _run_model(
    model: Model, tasks: Sequence[Task], plan: _Plan, store: RowStore, on_progress: Callable[[Progress], None] | None
) -> None:
    compressor = model.load()
    readers = plan.readers(compressor)
    store.register(model.label, facts(compressor, [reader.reading for reader in readers]))
    warm: set[str] = set()
    for task in tasks:
        own = [reader for reader in readers if reader.reading.how in task.readings]
        if not own:
            raise InputError(
                f"the task {task.name} has none of the readings {', '.join(plan.readings)}",
                f"it has: {', '.join(task.readings)}",
            )
        try:
            for done, total in _run_task(model.label, task, own, plan, store, warm):
                if on_progress is not None:
                    on_progress(Progress(model.label, task.name, done, total))
        finally:
            task.close()


def _run_task(
    label: str, task: Task, readers: Sequence[ContextReader], plan: _Plan, store: RowStore, warm: set[str]
) -> Iterator[tuple[int, int]]:
    """Run what is not done yet, a batch in every reading before the next one; yield how far it is."""
    task.left_out.clear()
    examples = task.examples(readers[0], plan.seed, plan.limit)
    if not examples:
        raise _no_examples(task)
    store.left_out[f"{label}/{task.name}"] = dict(task.left_out)
    done, total = 0, len(examples) * len(readers)
    for batch, reader in itertools.product(_batches(examples, plan.batch_size), readers):
        keys = [(label, task.name, reader.reading.name, example.id) for example in batch]
        if not all(key in store.rows for key in keys):
            if reader.reading.name not in warm:
                reader.warm_up()
                warm.add(reader.reading.name)
            given = _with_others(batch, examples) if reader.reading.how == "other" else batch
            store.append(list(_rows(label, task, reader, given, store.process)))
        done += len(batch)
        yield done, total


def _batches(examples: Sequence[Example], size: int) -> list[Sequence[Example]]:
    """Cut the examples into batches, the same ones in every run: with other neighbours, sums round differently."""
    return [examples[start : start + size] for start in range(0, len(examples), size)]


def _no_examples(task: Task) -> InputError:
    reasons = "; ".join(f"{count} {reason}" for reason, count in task.left_out.items())
    kinds = task.needs if task.needs in ("documents", "questions") else "lines"
    names = ", ".join(path.name for path in task.data.files)
    wanted = f" of the split {task.data.split!r}" if task.data.split != "all" else ""
    return InputError(
        f"the task {task.name} finds no {kinds}{wanted} it could use in {names}" + (f" ({reasons})" if reasons else ""),
        "give another file with --data" if not reasons else "give another file, or other options of the task",
    )


def _with_others(batch: Sequence[Example], examples: Sequence[Example]) -> list[Example]:
    """Return the batch with the contexts of other examples: one half the list away, or the next of another cluster."""
    places = {example.id: place for place, example in enumerate(examples)}
    swapped = []
    for example in batch:
        start = places[example.id] + max(len(examples) // 2, 1)
        others = (examples[(start + step) % len(examples)] for step in range(len(examples)))
        other = next((one for one in others if (one.cluster or one.id) != (example.cluster or example.id)), None)
        if other is None:
            raise InputError("all examples are about one document, so no other's memory can be read", "raise --limit")
        swapped.append(replace(example, contexts=other.contexts))
    return swapped


def _rows(label: str, task: Task, reader: ContextReader, batch: Sequence[Example], process: int) -> Iterator[Row]:
    before = dict(reader.seconds)
    try:
        results: list[Result | ContextTooLong] = list(task.run(reader, batch))
    except ContextTooLong:
        before = dict(reader.seconds)
        results = [_alone(task, reader, example) for example in batch]
    tried = sum(isinstance(result, Result) for result in results)
    seconds = {name: (spent - before[name]) / max(tried, 1) for name, spent in reader.seconds.items()}
    for example, result in zip(batch, results, strict=True):
        common: dict[str, Any] = {
            "model": label,
            "task": task.name,
            "reading": reader.reading.name,
            "example": example.id,
            "labels": dict(example.labels),
            "cluster": example.cluster or example.id,
            "process": process,
            "question": example.question,
            "answers": list(example.answers),
        }
        if isinstance(result, ContextTooLong):
            yield Row(**common, skipped=result.message)
        else:
            yield Row(
                **common, metrics=dict(result.metrics), costs=dict(result.costs), seconds=seconds, output=result.output
            )


def _alone(task: Task, reader: ContextReader, example: Example) -> Result | ContextTooLong:
    """Try an example of a batch in which one was too long."""
    try:
        return task.run(reader, [example])[0]
    except ContextTooLong as error:
        return error
