"""``ctxdocs train``."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ctxdocs.cli.failures import Interrupted
from ctxdocs.cli.options import json_option
from ctxdocs.cli.output import aligned, clean, print_json, shown, silence, terminal

if TYPE_CHECKING:
    from ctxdocs.training import TrainingConfig, TrainingResult


@click.command()
@click.argument("more", nargs=-1, metavar="[FILE]...")
@click.option("--recipe", metavar="NAME", help="Start from one of the recipes of --list-recipes.")
@click.option("--config", "path", metavar="FILE", type=click.Path(path_type=Path), help="A YAML file of options.")
@click.option("--method", metavar="NAME", help="autocompressor, beacon, ultragist, rcc or ccm.")
@click.option(
    "--init", metavar="NAME", help="A language model or a compressor: folder or hub name; or a model's config.json."
)
@click.option("--data", metavar="FILE", multiple=True, help="JSON lines of documents and questions, or a folder.")
@click.option("--output", metavar="DIR", help="The folder to write; load_compressor loads it.")
@click.option("--set", "changes", metavar="NAME=VALUE", multiple=True, help="Any option, such as optimizer.lr=1e-4.")
@click.option("--print-config", is_flag=True, help="Print every option with its value and meaning, and stop.")
@click.option("--list-recipes", is_flag=True, help="Print the recipes that come with ctxdocs, and stop.")
@json_option
def train(
    more: tuple[str, ...],
    recipe: str | None,
    path: Path | None,
    method: str | None,
    init: str | None,
    data: tuple[str, ...],
    output: str | None,
    changes: tuple[str, ...],
    print_config: bool,
    list_recipes: bool,
    as_json: bool,
) -> None:
    """Train a compressor: any method, on your own data.

    \b
      ctxdocs train --recipe tiny-beacon --data texts.jsonl --output runs/beacon
      ctxdocs train --recipe beacon-finetune --init MODEL --data texts.jsonl --output runs/mine

    What is given counts in this order: the recipe, the configuration file, the options, --set. Files without an option
    in front of them are data too. Run the same command again to go on after an interruption.
    """
    from ctxdocs.training import dump_config, load_config, recipes

    if list_recipes:
        _list(recipes(), as_json)
        return
    given = {"method": method, "init": init, "data_files": [*data, *more], "output": output}
    config = load_config(path, recipe=recipe, changes=changes, **given)
    if print_config:
        if as_json:
            print_json(asdict(config))
        else:
            click.echo(dump_config(config), nl=False)
        return
    _train(config, as_json)


def _train(config: TrainingConfig, as_json: bool) -> None:
    from ctxdocs.training import train as run

    silence()
    progress = terminal(sys.stderr)
    result = run(config, on_log=lambda line: progress.print(clean(_line(line))))
    if result.interrupted:
        raise Interrupted(
            f"Interrupted after {result.steps:,} of {result.of_steps:,} steps; a checkpoint is kept in {result.output}",
            "run the same command again to go on",
        )
    if as_json:
        print_json(asdict(result))
    else:
        terminal(sys.stdout).print(aligned(_rows(result)))


def _list(found: dict[str, str], as_json: bool) -> None:
    if as_json:
        print_json({"recipes": [{"name": name, "about": about} for name, about in found.items()]})
    else:
        terminal(sys.stdout).print(aligned(list(found.items())))


def _line(line: dict[str, Any]) -> str:
    """Return a line of the log: step, losses, learning rate."""
    figures = [f"{name} {value:.4f}" for name, value in line.items() if name.startswith(("loss", "eval_loss"))]
    figures += [f"{name} {line[name]:.2g}" for name in ("learning_rate", "grad_norm") if name in line]
    return "  ".join([f"step {line['step']:,}/{line['of_steps']:,}", *figures])


def _rows(result: TrainingResult) -> list[tuple[str, str]]:
    losses, measured = result.losses(), result.losses("eval_loss")
    rows = [("steps", f"{result.steps:,}" + (f", {result.resumed_from:,} of them before" * bool(result.resumed_from)))]
    rows.append(("parameters", f"{result.trained_parameters:,} of {result.parameters:,} trained"))
    if losses:
        rows.append(("loss", f"{losses[0][1]:.3f} at step {losses[0][0]:,}, {losses[-1][1]:.3f} at {losses[-1][0]:,}"))
    if measured:
        rows.append(("held out", f"{measured[-1][1]:.3f}"))
    rows.append(("model", shown(Path(result.output).resolve())))
    return rows
