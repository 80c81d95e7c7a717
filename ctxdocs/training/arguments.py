"""A run's configuration as ``transformers.TrainingArguments``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ctxdocs.errors import InputError, MissingDependency
from ctxdocs.training.config import TrainingConfig
from ctxdocs.training.options import unknown

if TYPE_CHECKING:
    from transformers import TrainingArguments


def training_arguments(config: TrainingConfig, steps: int, validate_every: int = 0) -> TrainingArguments:
    """Return the arguments of a run of so many steps, validated every so many.

    Raises
    ------
    MissingDependency
        If accelerate, or a package of ``logging.report_to``, is not installed.
    InputError
        If ``trainer`` holds a field that does not exist or an option stands for, or a value cannot be used.
    """
    import torch
    from transformers import TrainingArguments

    optimizer, logging = config.optimizer, config.logging
    values: dict[str, Any] = {
        "output_dir": config.output,
        "max_steps": steps,
        "per_device_train_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.accumulation,
        "optim": optimizer.name,
        "learning_rate": optimizer.lr,
        "lr_scheduler_type": optimizer.schedule,
        "warmup_steps": optimizer.warmup_steps or round(optimizer.warmup_ratio * steps),
        "weight_decay": optimizer.weight_decay,
        "adam_beta1": optimizer.betas[0],
        "adam_beta2": optimizer.betas[1],
        "max_grad_norm": optimizer.max_grad_norm,
        "bf16": config.precision == "bfloat16",
        "fp16": config.precision == "float16",
        "logging_steps": logging.every,
        "logging_first_step": True,
        "report_to": logging.report_to,
        "run_name": logging.run_name or None,
        "eval_strategy": "steps" if validate_every else "no",
        "eval_steps": validate_every or None,
        "save_strategy": "steps",
        "save_steps": config.checkpoints.every,
        "save_total_limit": config.checkpoints.keep,
        "dataloader_num_workers": config.workers,
        "seed": config.seed,
        "use_cpu": config.device == "cpu" or not torch.accelerator.is_available(),
    }
    # What a batch uses differs: ratios, kinds of rows, what special tokens put out in the last layer.
    fixed: dict[str, Any] = {
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,
        "average_tokens_across_devices": False,
        "disable_tqdm": True,
    }
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    for name in config.trainer:
        if name not in known:
            raise unknown(f"trainer.{name}", [f"trainer.{other}" for other in sorted(known)])
        if name in values or name in fixed or name in ("gradient_checkpointing", "activation_checkpointing"):
            raise InputError(f"trainer.{name} is not for you to set", "see --print-config for the option it stands for")
    with usable_together():
        arguments = TrainingArguments(**values, **fixed, **{"ddp_find_unused_parameters": True, **config.trainer})
    arguments._n_gpu = min(1, arguments.n_gpu)  # one process per device; torchrun starts several
    return arguments


@contextmanager
def usable_together() -> Iterator[None]:
    """Turn what transformers says of options, and of packages that are not there, into errors of ours."""
    try:
        yield
    except ImportError as error:
        raise MissingDependency(str(error).splitlines()[0], "pip install ctxdocs[train]") from error
    except (ValueError, TypeError, RuntimeError) as error:
        said = " ".join(str(error).split())
        if "requires" in said and "installed" in said:  # a package that reports are sent to
            raise MissingDependency(
                said.partition(".")[0], "install it, or leave it out of logging.report_to"
            ) from error
        raise InputError(f"these options cannot be used together: {said}") from error
