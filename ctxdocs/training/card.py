"""The model card of a trained compressor: data, steps, losses with their curve, hyper-parameters, versions."""

from __future__ import annotations

import platform
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxdocs.training.config import TrainingConfig
from ctxdocs.training.config_files import dump_config

if TYPE_CHECKING:
    from ctxdocs.compressors.base import Compressor
    from ctxdocs.training.data import TrainingData
    from ctxdocs.training.run import TrainingResult

CURVE = "loss.svg"
_ROWS = 12
_WIDTH, _HEIGHT, _MARGIN = 640, 260, 48


def write_card(
    folder: Path, config: TrainingConfig, compressor: Compressor, result: TrainingResult, data: TrainingData
) -> None:
    """Write ``README.md`` and the curve it shows."""
    losses = result.losses()
    if len(losses) > 1:
        (folder / CURVE).write_text(curve(losses, result.losses("eval_loss")), encoding="utf-8")
    (folder / "README.md").write_text(_card(config, compressor, result, data, len(losses) > 1), encoding="utf-8")


def _card(
    config: TrainingConfig, compressor: Compressor, result: TrainingResult, data: TrainingData, has_curve: bool
) -> str:
    config = _without_paths(config)
    base = config.init if isinstance(config.init, str) else f"a new {config.init.get('model_type', '')} model"
    plain = compressor.model.config.model_type
    settings = {**compressor.format_settings, **compressor.run_settings}
    said = ", ".join(f"`{name}` {value}" for name, value in settings.items())
    parts = [
        f"# {config.output}\n",
        f"A compressor of the method `{config.method}` for ctxdocs, trained with `ctxdocs train` from {base} ({plain}, "
        f"{result.parameters:,} parameters in all, {result.trained_parameters:,} of them trained).\n",
        '```python\nimport ctxdocs\n\ncompressor = ctxdocs.load_compressor("PATH")\n```\n',
        f"Settings: {said}.\n",
        "## Data\n",
        _table(
            ("file", "documents", "tokens", "questions"),
            [
                (name, f"{counts.documents:,}", f"{counts.tokens:,}", f"{counts.questions:,}")
                for name, counts in data.files.items()
            ],
        ),
        f"{data.skipped:,} lines held no record and were skipped.\n" if data.skipped else "",
        "Files are named as they were read; their licences are for whoever trained this to state.\n",
        "## Losses\n",
        f"{result.steps:,} steps of {config.batch_size} x {config.accumulation} sequences per device, "
        f"objective `{config.objective}`. Losses are in nats per token, means since the line before.\n",
        _table(*_losses(result.log)),
        f"![loss against steps]({CURVE})\n" if has_curve else "",
        "## Hyper-parameters\n",
        f"```yaml\n{dump_config(config)}```\n",
        "## Versions\n",
        ", ".join([f"Python {platform.python_version()}", *map(_version, ("ctxdocs", "torch", "transformers"))])
        + ".\n",
    ]
    return "\n".join(part for part in parts if part)


def _without_paths(config: TrainingConfig) -> TrainingConfig:
    """Return the configuration with files and folders named without where they lay."""
    data = replace(
        config.data,
        files=[Path(name).name for name in config.data.files],
        validation_files=[Path(name).name for name in config.data.validation_files],
    )
    init = Path(config.init).name if isinstance(config.init, str) and Path(config.init).exists() else config.init
    return replace(config, output=Path(config.output).name, init=init, data=data)


def _losses(log: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the header and some rows of the log, the first and the last among them."""
    names = sorted({name for line in log for name in line if name.startswith(("loss", "eval_loss"))})
    rows: dict[int, dict[str, float]] = {}
    for line in log:
        found = {name: line[name] for name in names if name in line}
        if found:
            rows.setdefault(line["step"], {}).update(found)
    steps = sorted(rows)
    every = max(1, -(-len(steps) // _ROWS))
    kept = sorted({*steps[::every], *steps[-1:]})
    shown = [(f"{step:,}", *(f"{rows[step][n]:.3f}" if n in rows[step] else "" for n in names)) for step in kept]
    return ("step", *names), shown


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _version(package: str) -> str:
    import ctxdocs

    return f"{package} {ctxdocs.__version__ if package == 'ctxdocs' else version(package)}"


def curve(losses: list[tuple[int, float]], measured: list[tuple[int, float]] = []) -> str:  # noqa: B006 - not changed
    """Draw losses against steps, as SVG; ``measured`` ones are dots.

    Parameters
    ----------
    losses, measured : list of tuple
        Step and loss.
    """
    steps = [step for step, _ in (*losses, *measured)]
    values = [value for _, value in (*losses, *measured)]
    first, last, low, high = min(steps), max(steps), min(values), max(values)
    wide, tall = _WIDTH - 2 * _MARGIN, _HEIGHT - 2 * _MARGIN

    def place(step: int, value: float) -> tuple[float, float]:
        across = (step - first) / max(1, last - first)
        down = (high - value) / ((high - low) or 1.0)
        return round(_MARGIN + wide * across, 1), round(_MARGIN + tall * down, 1)

    line = " ".join("{},{}".format(*place(*point)) for point in losses)
    dots = "".join('<circle cx="{}" cy="{}" r="3" fill="#b3541e"/>'.format(*place(*point)) for point in measured)
    bottom, right = _HEIGHT - _MARGIN, _WIDTH - _MARGIN
    labels = [
        (_MARGIN - 6, _MARGIN + 4, "end", f"{high:.2f}"),
        (_MARGIN - 6, bottom + 4, "end", f"{low:.2f}"),
        (_MARGIN, bottom + 18, "start", f"{first:,}"),
        (right, bottom + 18, "end", f"{last:,} steps"),
        (_MARGIN, _MARGIN - 16, "start", "loss, nats per token" + ("; dots: held out" if measured else "")),
    ]
    texts = "".join(f'<text x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>' for x, y, anchor, text in labels)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>'
        f'<path d="M{_MARGIN} {_MARGIN}V{bottom}H{right}" fill="none" stroke="#888888"/>'
        f'<polyline points="{line}" fill="none" stroke="#1f5fa8" stroke-width="1.5"/>{dots}{texts}</svg>\n'
    )
