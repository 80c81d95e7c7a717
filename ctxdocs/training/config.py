"""Everything a training run can be told, as YAML and as dataclasses; see ``docs/training.md``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from ctxdocs.compressors import METHODS
from ctxdocs.errors import InputError
from ctxdocs.training.options import from_mapping, option
from ctxdocs.training.steps import PUBLISHED

#: Which parameters are trained: the method's own, those and a LoRA on the model, or everything.
TRAINABLE = ("own", "lora", "full")
#: What is minimised: what the method's authors did, or answers and texts behind memories of several documents.
OBJECTIVES = ("published", "documents", "text")
PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass
class LoraOptions:
    """The LoRA of ``train: lora``; it is merged into the weights at the end."""

    rank: int = option(16, "rank")
    alpha: float = option(16.0, "its scale is alpha / rank")
    dropout: float = option(0.05, "on its inputs")
    layers: list[str] = option(["q_proj", "k_proj", "v_proj", "o_proj"], "names of the linear layers it acts on")


@dataclass
class DataOptions:
    """What is trained on."""

    files: list[str] = option([], "JSON lines of documents and questions (.jsonl, .jsonl.zst, .jsonl.gz), or folders")
    validation_files: list[str] = option([], "more of them, for the validation loss only")
    validation_share: float = option(0.0, "share of the titles in files that is held out, and measured instead")
    splits: list[str] = option([], "published splits of questions that are used, such as train; default: all")
    on_error: str = option("raise", "raise or skip: what a line without a record leads to")
    sequence_tokens: int = option(0, "longest sequence; 0: 2048, or fewer if the model has no room for them")
    shortest: int = option(2, "documents with fewer tokens are left out")
    packing: str = option("pack", "pack: documents joined and cut to sequence_tokens; documents: one per sequence")


@dataclass
class OptimizerOptions:
    """The optimiser and its learning rate."""

    name: str = option("adamw_torch", "an optimiser of transformers.TrainingArguments.optim")
    lr: float = option(5e-5, "highest learning rate")
    schedule: str = option("linear", "linear, cosine, constant_with_warmup ...: how it falls")
    warmup_steps: int = option(0, "steps in which it rises")
    warmup_ratio: float = option(0.0, "the same as a share of all steps")
    weight_decay: float = option(0.0, "AdamW's")
    betas: list[float] = option([0.9, 0.999], "AdamW's")
    max_grad_norm: float = option(1.0, "gradients are cut to this norm; 0: they are not")


@dataclass
class CheckpointOptions:
    """Checkpoints, from which an interrupted run goes on."""

    every: int = option(500, "steps between them", free=True)
    keep: int = option(2, "older ones are removed", free=True)


@dataclass
class LoggingOptions:
    """What is reported while training."""

    every: int = option(10, "steps between lines of the log", free=True)
    validate_every: int = option(0, "steps between validations; 0: only at the end", free=True)
    report_to: list[str] = option([], "tensorboard, trackio, wandb ...: packages that must be installed", free=True)
    run_name: str = option("", "what they call the run", free=True)


@dataclass
class TrainingConfig:
    """A training run."""

    init: Any = option("", "a language model or a compressor to start from: folder, hub name, or configuration")
    method: str = option("", f"one of {', '.join(PUBLISHED)}")
    output: str = option("", "the folder to write", free=True)
    tokenizer: str = option("", "folder or hub name, where init has none; bundled: that of the bundled model")
    settings: dict[str, Any] = option({}, "settings of the method, as of its compressor")
    train: str = option("own", "own: the method's parameters; lora: those and a LoRA; full: everything")
    lora: LoraOptions = field(default_factory=LoraOptions)
    objective: str = option(
        "published", "published: as the authors train; documents: texts behind memories; text: no memory"
    )
    published: dict[str, Any] = option({}, "options of the method's published objective")
    documents: dict[str, Any] = option({}, "options of the objective documents")
    data: DataOptions = field(default_factory=DataOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    steps: int = option(0, "optimiser steps; 0: as many as epochs need")
    epochs: float = option(1.0, "passes over the data, where steps is 0")
    batch_size: int = option(1, "sequences per device")
    accumulation: int = option(1, "batches per optimiser step")
    precision: str = option("float32", "float32, bfloat16 or float16; parameters that train stay in float32")
    recompute: bool = option(False, "compute activations again for the gradient instead of keeping them")
    attention: str = option("auto", "the model's attention: auto, sdpa, eager, flash_attention_2", free=True)
    device: str = option("auto", "auto or cpu", free=True)
    workers: int = option(0, "processes that prepare batches", free=True)
    seed: int = option(42, "of weights, batches and dropout")
    checkpoints: CheckpointOptions = field(default_factory=CheckpointOptions)
    logging: LoggingOptions = field(default_factory=LoggingOptions)
    trainer: dict[str, Any] = option({}, "any other field of transformers.TrainingArguments: deepspeed, fsdp ...")

    @classmethod
    def from_mapping(cls, values: dict[str, Any]) -> TrainingConfig:
        """Build from YAML's mappings.

        Raises
        ------
        InputError
            If an option is unknown (the nearest known one is named), or a value is of the wrong type.
        """
        return from_mapping(cls, values)

    def to_mapping(self) -> dict[str, Any]:
        """Return plain mappings, as YAML holds them."""
        return dataclasses.asdict(self)

    def check_choices(self) -> None:
        """Raise ``InputError`` for a value that is none of those an option has."""
        if self.method in METHODS and self.method not in PUBLISHED:
            raise InputError(f"{self.method} works with any model as it is: there is nothing to train")
        for name, value, known in (
            ("method", self.method, tuple(PUBLISHED)),
            ("train", self.train, TRAINABLE),
            ("objective", self.objective, OBJECTIVES),
            ("precision", self.precision, PRECISIONS),
            ("data.packing", self.data.packing, ("pack", "documents")),
            ("data.on_error", self.data.on_error, ("raise", "skip")),
        ):
            if value not in known:
                said = f"{name} is {value!r}" if value else f"{name} is not given"
                raise InputError(said, f"one of: {', '.join(known)}")

    def check(self) -> None:
        """Raise ``InputError`` for what can be told wrong without a model."""
        self.check_choices()
        for name, wanted in (("init", self.init), ("output", self.output), ("data.files", self.data.files)):
            if not wanted:
                raise InputError(f"{name} is not given", f"--{name.removeprefix('data.').replace('files', 'data')}")
        for name, least in (("batch_size", 1), ("accumulation", 1), ("steps", 0), ("workers", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}", f"it is at least {least}")
        if not self.steps and self.epochs <= 0:
            raise InputError("neither steps nor epochs says how long to train", "--set steps=1000")
