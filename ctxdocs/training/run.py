"""A training run from its configuration to the folder that ``load_compressor`` loads."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ctxdocs.errors import InputError, MissingDependency
from ctxdocs.training.checkpointing import (
    check_same,
    keep_config,
    last_checkpoint,
    replace_files,
    steps_of,
    storing,
    whole_folder,
)
from ctxdocs.training.config import TrainingConfig
from ctxdocs.training.config_files import resolve
from ctxdocs.training.lora import merge_lora
from ctxdocs.training.start import choose_trainable, start

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from ctxdocs.compressors.base import Compressor
    from ctxdocs.training.callbacks import OnLog
    from ctxdocs.training.data import TrainingData
    from ctxdocs.training.sampling import Batches, Drawn
    from ctxdocs.training.steps.base import Step
    from ctxdocs.training.trainer import CompressorTrainer

#: What is trained on, by file; kept in checkpoints.
_DATA = "data.json"
#: Sequences of a run that does not say how long they are.
_LONGEST, _SHORTEST = 2048, 32
#: The log, beside the model.
LOG = "training_log.json"


@dataclass
class TrainingResult:
    """What a run came to.

    Parameters
    ----------
    output : str
        The folder.
    steps, of_steps : int
        Steps taken, and steps there are.
    resumed_from : int
        Steps that an earlier call had taken.
    trained_parameters, parameters : int
        How many train, and how many there are.
    log : list of dict
        Every line of the log.
    interrupted : bool
        Stopped early; the same call goes on.
    """

    output: str
    steps: int
    of_steps: int
    resumed_from: int
    trained_parameters: int
    parameters: int
    log: list[dict[str, Any]] = field(default_factory=list)
    interrupted: bool = False

    def losses(self, name: str = "loss") -> list[tuple[int, float]]:
        """Return step and value of every line of the log that holds a loss of that name."""
        return [(line["step"], line[name]) for line in self.log if name in line]


def train(config: TrainingConfig, on_log: OnLog | None = None) -> TrainingResult:
    """Train, or go on where an earlier call with the same configuration stopped.

    Checks that need no training come first: options, data, whether sequences fit the model. Ctrl-C ends the run
    after the running step, with a checkpoint.

    Parameters
    ----------
    config : TrainingConfig
        See ``docs/training.md``.
    on_log : callable, optional
        Told every line of the log.

    Raises
    ------
    InputError
        If the configuration cannot be used, the data are empty or do not fit, or the folder holds checkpoints of
        another run.
    CheckpointError
        If what the run starts from cannot be loaded.
    DocumentError
        If a line of the data holds no record.
    TrainingError
        If the loss is no number; its batch is kept.
    StorageError
        If a checkpoint or the model cannot be written; earlier checkpoints are intact.
    """
    _check_package()
    from ctxdocs.training.arguments import training_arguments
    from ctxdocs.training.callbacks import Reporter, interruptible

    config = resolve(config)
    config.check()
    training_arguments(config, steps=1)  # raises what would otherwise come after the data have been read
    output = Path(config.output)
    if isinstance(config.init, str) and Path(config.init).expanduser().resolve() == output.resolve():
        raise InputError(f"a run into {output} cannot start from what it replaces", "choose another --output")
    check_same(config, output)
    compressor = start(config)
    step, train_data, batches, held_out = _prepare(config, compressor, output)
    choose_trainable(compressor, config)
    total, trained = sum(p.numel() for p in compressor.parameters()), _trained(compressor)
    if _is_main():
        keep_config(config, output)
    counts = json.dumps({name: asdict(counts) for name, counts in train_data.files.items()}, indent=1)
    checkpoint = last_checkpoint(output)
    if checkpoint is not None:
        _check_data(checkpoint, counts)
    with _being_trained(compressor, config.recompute), interruptible() as stop:
        trainer = _trainer(config, step, batches, held_out, counts, [Reporter(on_log), stop])
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if not stop.requested and trainer.state.global_step not in trainer.measured_steps:
            trainer.evaluate()
    result = TrainingResult(
        output=str(output),
        steps=trainer.state.global_step,
        of_steps=trainer.state.max_steps,
        resumed_from=steps_of(checkpoint) if checkpoint else 0,
        trained_parameters=trained,
        parameters=total,
        log=trainer.state.log_history,
        interrupted=stop.requested and trainer.state.global_step < trainer.state.max_steps,
    )
    if not result.interrupted and _is_main():
        merge_lora(compressor)
        _finish(config, compressor.eval(), result, train_data, output)
    return result


def _prepare(
    config: TrainingConfig, compressor: Compressor, output: Path
) -> tuple[Step[Any], TrainingData, tuple[Drawn, Batches], tuple[Drawn, Batches] | None]:
    from ctxdocs.training.data import load_data
    from ctxdocs.training.examples import Asking
    from ctxdocs.training.sampling import Batches, Drawn
    from ctxdocs.training.steps import build_step

    step = build_step(compressor, config.objective, getattr(config, config.objective, {}))
    options = replace(config.data, sequence_tokens=longest_sequence(step, config.data.sequence_tokens))
    if compressor.tokenizer is None:
        raise InputError("there is no tokenizer to read the data with", "--set tokenizer=FOLDER")
    data, measured = load_data(config.data, compressor.tokenizer, output / "data", config.seed)
    asking = Asking(compressor.tokenizer, compressor.prompt_format)

    def drawn(data: TrainingData, leftovers: str) -> tuple[Drawn, Batches] | None:
        examples = step.examples(data, options, asking, config.seed)
        groups = np.array([step.group(int(length)) for length in examples.lengths], dtype=np.int64)
        if not len(groups):
            return None
        return Drawn(examples, config.seed), Batches(groups, config.batch_size, _devices(), config.seed, leftovers)

    batches = drawn(data, "dropped")
    if batches is None:
        raise InputError(
            f"nothing in {', '.join(config.data.files)} is long enough to train on "
            f"(at least {max(step.shortest, options.shortest)} tokens)",
            "check data.sequence_tokens, data.shortest and settings",
        )
    per_pass = batches[1].per_pass // _devices()
    steps = config.steps or max(1, math.ceil(config.epochs * per_pass / config.accumulation))
    batches[1].total = steps * config.accumulation * _devices()
    return step, data, batches, drawn(measured, "kept") if measured is not None else None


def longest_sequence(step: Step[Any], tokens: int) -> int:
    """Return the longest sequence: the one that is given, or else the longest that fits the model and the method.

    Raises
    ------
    InputError
        If sequences of that length do not fit.
    """
    if not tokens:
        tokens = _LONGEST
        while tokens > _SHORTEST:
            try:
                step.check(tokens)
            except InputError:
                tokens //= 2
            else:
                break
    step.check(tokens)
    return tokens


def _trainer(
    config: TrainingConfig,
    step: Step[Any],
    batches: tuple[Drawn, Batches],
    held_out: tuple[Drawn, Batches] | None,
    counts: str,
    callbacks: list[TrainerCallback],
) -> CompressorTrainer:
    from ctxdocs.training.arguments import training_arguments, usable_together
    from ctxdocs.training.trainer import CompressorTrainer

    steps = len(batches[1]) // _devices() // config.accumulation
    arguments = training_arguments(config, steps, config.logging.validate_every if held_out else 0)
    with usable_together():
        return CompressorTrainer(step, arguments, *batches, held_out, {_DATA: counts}, callbacks)


def _finish(
    config: TrainingConfig, compressor: Compressor, result: TrainingResult, data: TrainingData, output: Path
) -> None:
    """Write the model, its card and the log; what an earlier run left is replaced when all is written."""
    from ctxdocs.training.card import write_card

    with storing(output), whole_folder(output / "model") as folder:
        compressor.save(folder)
        (folder / LOG).write_text(json.dumps(result.log, indent=1) + "\n", encoding="utf-8")
        write_card(folder, config, compressor, result, data)
    with storing(output):
        replace_files(output / "model", output)
        (output / "model").rmdir()


def _check_data(checkpoint: Path, counts: str) -> None:
    path = checkpoint / _DATA
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != json.loads(counts):
        raise InputError(
            f"the data have changed since {checkpoint} was written", "put them back, or choose another --output"
        )


def _trained(compressor: Compressor) -> int:
    return sum(parameter.numel() for parameter in compressor.parameters() if parameter.requires_grad)


def _devices() -> int:
    """Return how many processes train together: what torchrun says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _check_package() -> None:
    if importlib.util.find_spec("accelerate") is None:
        raise MissingDependency("training needs accelerate", "pip install ctxdocs[train]")


@contextmanager
def _being_trained(compressor: Compressor, recompute: bool) -> Iterator[None]:
    """Stamp memories without hashing weights that change with every step, and recompute activations if told to."""
    from ctxdocs.modeling.backbone import Backbone

    backbones = [value for value in vars(compressor).values() if isinstance(value, Backbone)]
    compressor._fingerprint = "in training"
    for backbone in backbones:
        backbone.recomputes = recompute
    try:
        yield
    finally:
        compressor.forget_fingerprint()
        for backbone in backbones:
            backbone.recomputes = False
