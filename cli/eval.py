"""``ctxdocs eval``."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ctxdocs.cli.failures import Interrupted
from ctxdocs.cli.options import device_option, json_option
from ctxdocs.cli.output import aligned, clean, counted, print_json, shown, silence, terminal
from ctxdocs.cli.progress import evaluation_bar
from ctxdocs.errors import InputError

if TYPE_CHECKING:
    from ctxdocs.evaluation import Evaluation, Model

_EPILOG = """\b
Tasks that make up their own examples: classification, passkey, needle, topics.
Tasks that need documents: perplexity, streaming, reconstruction.
Tasks that need questions: qa, multidoc, rag, reranking.
Tasks that need a benchmark's files: longbench, ruler, infinitebench.

\b
  ctxdocs eval --tasks needle,passkey --output runs/needle
  ctxdocs eval ./model --tasks qa --data squad.jsonl --ratios 4,8 --output runs/qa
  ctxdocs eval --compare ./a ./b --tasks needle --budget 8 --output runs/compared
"""


@click.command(epilog=_EPILOG, short_help="Measure what memories keep.")
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option("--compare", is_flag=True, help="Measure several models on the same examples: a leaderboard.")
@click.option("--tasks", metavar="NAMES", help="Names with commas between; default: all that need no data.")
@click.option(
    "--data", multiple=True, metavar="[TASK=]FILE", help="JSON lines for all tasks, or for one. May be given again."
)
@click.option("--split", type=click.Choice(["all", "validation", "test"]), default="all", show_default=True,
              help="Records to take, by their titles.")  # fmt: skip
@click.option("--held-out", type=float, default=0.01, show_default=True, help="Share of titles in each held-out split.")
@click.option("--readings", default="memory,text,none", show_default=True,
              help="How contexts are given; other is another example's memory.")  # fmt: skip
@click.option("--ratios", metavar="NUMBERS", help="Tokens per slot to compress at; default: the model's own.")
@click.option("--budget", metavar="SIZE", help="Instead: each model's ratio nearest to tokens per slot (8), or bytes "
              "per token (512B).")  # fmt: skip
@click.option("--limit", type=int, default=100, show_default=True, help="Examples per task.")
@click.option("--seed", type=int, default=0, show_default=True, help="Decides which examples are taken and made up.")
@click.option("--batch-size", type=int, default=16, show_default=True, help="Examples that are tried at once.")
@click.option("--option", "task_options", multiple=True, metavar="TASK.NAME=VALUE", help="An option of a task.")
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
              help="A folder for results, rows and the report; the same command goes on with it.")  # fmt: skip
@click.option("--method", metavar="NAME", help="The models' method, where their files do not say it.")
@device_option
@click.option(
    "--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto", help="Of the models."
)
@json_option
def eval(
    models: tuple[str, ...],
    compare: bool,
    tasks: str | None,
    data: tuple[str, ...],
    readings: str,
    ratios: str | None,
    task_options: tuple[str, ...],
    output: Path | None,
    method: str | None,
    device: str,
    dtype: str,
    as_json: bool,
    **plan: Any,
) -> None:
    """Measure what memories keep, beside the text itself and nothing at all.

    MODEL is a checkpoint's folder or hub name; by default the bundled model. METHOD:MODEL names its method too.
    """
    if len(models) > 1 and not compare:
        raise click.UsageError("several models are compared with --compare")
    if compare and len(models) < 2:
        raise click.UsageError("--compare needs two models or more")
    names = _listed(tasks) if tasks is not None else _tasks_without_data()
    options = _task_options(task_options, names)
    silence()
    from ctxdocs.evaluation import evaluate

    try:
        with evaluation_bar() as on_progress:
            evaluation = evaluate(
                _models(models or ("bundled",), method, device, dtype),
                names,
                data=_data(data),
                readings=_listed(readings),
                ratios=[_integer(ratio, "--ratios") for ratio in _listed(ratios or "")],
                options=options,
                output=output,
                on_progress=on_progress,
                **plan,
            )
    except KeyboardInterrupt:
        kept = "; what was measured so far is kept" if output is not None else ""
        raise Interrupted(
            f"Interrupted{kept}",
            "run the same command again to go on" if kept else "with --output it can be gone on with",
        ) from None
    if as_json:
        folder = {} if output is None else {"output": str(output)}
        values = {"config": evaluation.config, "models": evaluation.models, "left_out": evaluation.left_out}
        print_json({**values, **evaluation.results(), **folder})
    else:
        _show(evaluation, output)


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _tasks_without_data() -> list[str]:
    from ctxdocs.evaluation.tasks import TASKS, task_class

    return [name for name in TASKS if task_class(name).needs == "nothing"]


def _data(given: Sequence[str]) -> dict[str, list[str]]:
    """Sort files by the task in front of them; a name that is a file's as it stands has none."""
    files: dict[str, list[str]] = {}
    for entry in given:
        task, border, path = entry.partition("=")
        named = border and not Path(entry).exists()
        files.setdefault(task if named else "", []).append(path if named else entry)
    return files


def _models(names: Sequence[str], method: str | None, device: str, dtype: str) -> list[Model]:
    from ctxdocs.checkpoints import load_compressor
    from ctxdocs.compressors import METHODS
    from ctxdocs.evaluation import Model

    if repeated := [name for index, name in enumerate(names) if name in names[:index]]:
        raise InputError(f"the model {repeated[0]} is given twice", "leave one out")
    found: list[Model] = []
    for name in names:
        prefix, border, rest = name.partition(":")
        own, place = (prefix, rest) if border and prefix in METHODS else (method, name)

        def load(place: str = place, own: str | None = own) -> Any:
            return load_compressor(place, method=own, device=device, dtype=dtype)

        found.append(Model(_label(name, [model.label for model in found]), load))
    return found


def _label(name: str, taken: Sequence[str]) -> str:
    """Return a model's short name: the last part of its path, or all of it where that is taken."""
    short = Path(name).name or name
    return name if short in taken else short


def _task_options(given: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Parse ``task.name=value`` by the type of the option's default."""
    from ctxdocs.evaluation.tasks import task_class

    options: dict[str, dict[str, Any]] = {}
    for entry in given:
        place, border, value = entry.partition("=")
        task, dot, name = place.partition(".")
        if not border or not dot:
            raise InputError(f"--option {entry!r} is not TASK.NAME=VALUE", "as in needle.lengths=256,512")
        fields = task_class(task).Options.__dataclass_fields__
        if name in fields:
            options.setdefault(task, {})[name] = _parsed(value, fields[name].default, f"--option {place}")
        else:
            options.setdefault(task, {})[name] = value  # the task says what it has
    return options


def _parsed(value: str, default: Any, what: str) -> Any:
    if isinstance(default, tuple):
        return tuple(_integer(part, what) for part in _listed(value))
    if isinstance(default, int):
        return _integer(value, what)
    return value


def _integer(text: str, what: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise InputError(f"{what}: {text!r} is no whole number") from error


def _show(evaluation: Evaluation, output: Path | None) -> None:
    console = terminal(sys.stdout)
    for task in evaluation.tasks.values():
        console.print(clean(task.name), style="bold")
        head = ("model", "given as", "examples", "tokens per slot", *(metric.label for metric in task.metrics))
        rows = list(_rows(evaluation, task.name))
        console.print(aligned([head, *rows], right=range(2, len(head))))
        for line in _differences(evaluation, task.name):
            console.print(clean(line), style="dim")
        console.print()
    for place, reasons in evaluation.skipped.items():  # every one names its own numbers
        example = next(iter(reasons))
        console.print(clean(f"skipped {sum(reasons.values())} of {place}, as: {example}"), style="yellow")
    for place, reasons in evaluation.left_out.items():
        for reason, count in reasons.items():
            console.print(clean(f"left out for {place}: {count:,} {reason}"), style="dim")
    asked = evaluation.config["ratios"] or evaluation.config["budget"]
    for model, facts in evaluation.models.items():
        if asked and not facts["ratio_can_be_chosen"]:
            console.print(clean(f"{model} has one ratio, its own"), style="dim")
    console.print("scores in %, losses in nats per token; [95 % bootstrap interval]", style="dim")
    if output is not None:
        console.print(f"{counted(len(evaluation.rows), 'row')}; report: {shown(output / 'report.html')}")


def _rows(evaluation: Evaluation, task: str) -> Iterator[tuple[str, ...]]:
    metrics = evaluation.tasks[task].metrics
    for model in evaluation.models:
        for reading in evaluation.readings(model, task):
            cost = evaluation.cost(model, task, reading)
            ratio = "" if cost.tokens_per_slot is None else f"{cost.tokens_per_slot:.1f}"
            cells = []
            for metric in metrics:
                score = evaluation.score(model, task, reading, metric.name)
                value = score.value if score is not None else None
                texts = [metric.written(getattr(value, name)) for name in ("mean", "low", "high")] if value else []
                cells.append(f"{texts[0]} [{texts[1]}, {texts[2]}]" if texts else "")
            yield (clean(model), reading, f"{cost.rows}", ratio, *cells)


def _differences(evaluation: Evaluation, task: str) -> Iterator[str]:
    """Describe the paired differences of the task's own metric whose sign is clear."""
    metric = evaluation.tasks[task].metrics[0]
    for one in evaluation.differences:
        if one.task == task and one.metric == metric.name and one.value.excludes_zero:
            against = one.against if one.model == one.against_model else f"{one.against} of {one.against_model}"
            mean, low, high = (metric.written(getattr(one.value, name)) for name in ("mean", "low", "high"))
            yield f"  {one.model}, {one.reading} minus {against}: {metric.label} {mean} [{low}, {high}]"
