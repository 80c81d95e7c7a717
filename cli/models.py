"""``ctxdocs models``."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

import click

from ctxdocs.cli.options import json_option
from ctxdocs.cli.output import aligned, print_json, terminal

_LEGEND = """\
slots: what a segment becomes, or the whole text; or one per so many tokens, chosen to fit the text. window: tokens
compressed at a time. licence: as the model card declares it, ? where that is not known; that of the base applies as
well. What is not here is downloaded when first used: --model NAME
"""
_ADAPTERS = """\
ccm: adapters, published only as folders on their authors' drive. Download one, and beside it llama-7b-no where its
name begins so, and name the folder: --model FOLDER
{drive}
The base comes from the hub. meta-llama is gated: accept the licence there, then run: hf auth login. huggyllama is for
those to whom Meta has granted LLaMA.
"""


@click.command()
@json_option
def models(as_json: bool) -> None:
    """List the published checkpoints, and which are here."""
    from ctxdocs.compressors import METHODS
    from ctxdocs.hub import cached_folder
    from ctxdocs.published import CCM_DRIVE, PUBLISHED

    bundled = _bundled()
    checkpoints = []
    for checkpoint in PUBLISHED:
        # Of an adapter only the base can be here.
        folder = cached_folder(checkpoint.base if checkpoint.drive else checkpoint.name)
        found = "base_cached" if checkpoint.drive else "cached"
        here = {"cached": None, "base_cached": None, found: folder and str(folder)}
        checkpoints.append({**asdict(checkpoint), **here})
    if as_json:
        print_json({"methods": list(METHODS), "bundled": bundled, "checkpoints": checkpoints, "drive": CCM_DRIVE})
        return
    console = terminal(sys.stdout)
    rows = ([bundled] if bundled else []) + checkpoints
    for method in METHODS:
        if own := [row for row in rows if row["method"] == method]:
            console.print(_table(method, own), end="\n\n")
    console.print(_LEGEND)
    console.print(_ADAPTERS.format(drive=CCM_DRIVE), end="")


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
        "keeps": "all" if config.get("accumulate_summary") else "last",
        "ratios": (),
        "window": card["settings"].get("segment_tokens"),
        "positions": config["max_position_embeddings"],
        "licence": "apache-2.0",
        "drive": None,
        "cached": str(folder),
    }


def _table(method: str, rows: list[dict[str, Any]]) -> str:
    """Return the checkpoints of one method; its name heads theirs."""
    adapters = any(row["drive"] for row in rows)
    columns = [
        (method, *(row["name"] for row in rows)),
        ("base", *(row["base"] for row in rows)),
        ("slots", *map(_slots, rows)),
        ("window", *(str(row["window"] or "-") for row in rows)),
        ("licence", *(row["licence"] or "?" for row in rows)),
        ("base here" if adapters else "here", *("yes" if _here(row) else "no" for row in rows)),
    ]
    if adapters:  # segments are turns or examples, of any length
        del columns[3]
    return aligned(zip(*columns, strict=True))


def _slots(row: dict[str, Any]) -> str:
    if ratios := row["ratios"]:
        span = str(ratios[0]) if len(ratios) == 1 else f"{min(ratios)}-{max(ratios)}"
        return f"1 per {span} tokens"
    return f"{row['slots']} per {'segment' if row['keeps'] == 'all' else 'text'}" if row["slots"] else "none"


def _here(row: dict[str, Any]) -> bool:
    return bool(row["base_cached"] if row["drive"] else row["cached"])
