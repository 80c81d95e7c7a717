"""``ctxdocs models``."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

import click

from ctxdocs.cli.options import json_option
from ctxdocs.cli.output import aligned, print_json, terminal


@click.command()
@json_option
def models(as_json: bool) -> None:
    """List the published checkpoints, and which are here."""
    from ctxdocs.compressors import METHODS
    from ctxdocs.published import PUBLISHED, cached_folder

    bundled = _bundled()
    checkpoints = []
    for checkpoint in PUBLISHED:
        folder = cached_folder(checkpoint.name)
        checkpoints.append({**asdict(checkpoint), "cached": folder and str(folder)})
    if as_json:
        print_json({"methods": list(METHODS), "bundled": bundled, "checkpoints": checkpoints})
        return
    console = terminal(sys.stdout)
    columns = ("name", "method", "base", "slots", "window", "licence", "here")
    rows = [_row(checkpoint) for checkpoint in ([bundled] if bundled else []) + checkpoints]
    console.print(aligned([columns, *rows], right=[3, 4]))
    console.print()
    console.print("slots: per segment of text. window: positions of the model. licence: as the model card declares it;")
    console.print("that of the base model applies as well. Others are downloaded when first used: --model NAME")


def _bundled() -> dict[str, Any] | None:
    """Describe the model that comes with the package like a published one; None where it is missing."""
    import json

    from ctxdocs.compressors.saving import read_card
    from ctxdocs.published import BUNDLED, bundled_path

    folder = bundled_path()
    card = read_card(folder)
    if card is None:
        return None
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {
        "name": BUNDLED,
        "method": card["method"],
        "base": config["model_type"],
        "slots": config.get("summary_length"),
        "window": config["max_position_embeddings"],
        "licence": "apache-2.0",
        "cached": str(folder),
    }


def _row(checkpoint: dict[str, Any]) -> tuple[str, ...]:
    values = [checkpoint[name] for name in ("name", "method", "base", "slots", "window", "licence")]
    return (*("?" if value is None else str(value) for value in values), "yes" if checkpoint["cached"] else "no")
