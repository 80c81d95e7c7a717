"""Hugging Face's ``Trainer`` for training steps: several parts per step, checkpoints of what trains, no silent NaN."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ctxdocs.errors import TrainingError
from ctxdocs.training.checkpointing import TRAINED, remove_oldest, storing, whole_folder
from ctxdocs.training.sampling import Batches, Drawn
from ctxdocs.training.steps.base import Batch, Step, StepOutput

#: Where the batch goes whose loss is not a number.
FAILED_BATCH = "failed-batch"
_STATE = "trainer_state.json"


class CompressorTrainer(Trainer):
    """Trains a step.

    Parameters
    ----------
    step : Step
        With the compressor; its parameters with gradients are trained and kept in checkpoints.
    args : transformers.TrainingArguments
        See :func:`ctxdocs.training.arguments.training_arguments`.
    examples, batches
        What is trained on.
    held_out : tuple, optional
        Examples and batches that are measured.
    extra : dict of str to str, optional
        Text files that every checkpoint holds beside its own.
    callbacks : list of transformers.TrainerCallback, optional
        Beside those of ``args.report_to``.
    """

    def __init__(
        self,
        step: Step[Any],
        args: TrainingArguments,
        examples: Drawn,
        batches: Batches,
        held_out: tuple[Drawn, Batches] | None = None,
        extra: dict[str, str] | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.step, self.batches, self.held_out, self.extra = step, batches, held_out, extra or {}
        self.folder = Path(args.output_dir or ".")
        self._tally: dict[str, Tensor] = {}
        self._counts: dict[str, int] = defaultdict(int)
        super().__init__(
            model=step,
            args=args,
            train_dataset=examples,
            eval_dataset=held_out[0] if held_out else None,
            data_collator=step.collate,
            callbacks=callbacks,
        )
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)

    # Batches.

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return all batches of the run, in order."""
        return self._loader(self.train_dataset, self.batches)

    @cached_property
    def _held_out_loader(self) -> DataLoader[Any] | None:
        return None if self.held_out is None else self._loader(*self.held_out)

    def _loader(self, examples: Any, batches: Batches) -> DataLoader[Any]:
        loader: DataLoader[Any] = DataLoader(
            examples,
            batch_sampler=batches,  # type: ignore[arg-type]
            collate_fn=self.step.collate,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
        )
        return self.accelerator.prepare(loader)

    # Steps.

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Run the parts of a step, back-propagating each; return the mean of their losses."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        carried, total = None, torch.zeros((), device=self.args.device)
        for part in range(self.step.parts):
            is_last = part == self.step.parts - 1
            with nullcontext() if is_last else self._held_back(model):
                with self.compute_loss_context_manager():
                    output: StepOutput = model(inputs, part, carried)
                if not math.isfinite(output["loss"].item()):
                    raise self._not_a_number(inputs, output)
                self.accelerator.backward(output["loss"] / self.current_gradient_accumulation_steps)
            carried = output["carried"]
            total += output["loss"].detach()
            self._count(output["losses"])
        return total / self.step.parts / self.current_gradient_accumulation_steps

    @contextmanager
    def _held_back(self, model: nn.Module) -> Iterator[None]:
        """Leave gradients on their devices: more are to be added before they are averaged."""
        gradients = self.accelerator.gradient_state
        synchronises = gradients.sync_gradients
        gradients._set_sync_gradients(False)
        try:
            with self.accelerator.no_sync(model):
                yield
        finally:
            gradients._set_sync_gradients(synchronises)

    def _not_a_number(self, inputs: Batch, output: StepOutput) -> TrainingError:
        folder = self.folder / FAILED_BATCH
        losses = {name: value.item() for name, value in output["losses"].items()}
        about = {"step": self.state.global_step, "loss": output["loss"].item(), "losses": losses}
        with whole_folder(folder) as partial:
            tensors, others = _flattened(inputs)
            save_file(tensors, partial / "batch.safetensors")
            text = json.dumps({**about, "learning_rate": self._get_learning_rate(), **others}, indent=1)
            (partial / "batch.json").write_text(text, encoding="utf-8")
        return TrainingError(
            f"the loss of step {self.state.global_step + 1} is {about['loss']}; its batch lies in {folder}",
            "lower optimizer.lr, or go on from the last checkpoint with another seed in another folder",
        )

    # Measuring and reporting.

    @property
    def measured_steps(self) -> set[int]:
        """Steps after which what is held out has been measured."""
        return {int(line["step"]) for line in self.state.log_history if "eval_loss" in line}

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Return the mean losses of what is held out; the same whenever it is asked for."""
        loader = self._held_out_loader
        if loader is None:
            return {}
        model: Any = self.model_wrapped if self.is_in_train else self.model
        was_training = model.training
        model.eval()
        sums: dict[str, list[Tensor]] = defaultdict(list)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(self.args.seed)
            for inputs in loader:
                carried = None
                for part in range(self.step.parts):
                    with self.compute_loss_context_manager():
                        output: StepOutput = model(self._prepare_inputs(inputs), part, carried)
                    carried = output["carried"]
                    sums["loss"].append(output["loss"].detach().float())
                    for name, value in output["losses"].items():
                        if name != "loss":
                            sums[f"loss_{name}"].append(value.detach().float())
        model.train(was_training)
        means = {name: torch.stack(values).mean() for name, values in sorted(sums.items())}
        metrics = {
            f"{metric_key_prefix}_{name}": float(self.accelerator.reduce(mean, "mean")) for name, mean in means.items()
        }
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of what the loss is made of."""
        if "loss" in logs and self._tally:
            means = {name: float(value) / self._counts[name] for name, value in self._tally.items()}
            logs = {**logs, **{f"loss_{name}": value for name, value in means.items() if name != "loss"}}
            self._tally, self._counts = {}, defaultdict(int)
        super().log(logs, start_time)

    def _count(self, losses: dict[str, Tensor]) -> None:
        for name, value in losses.items():
            self._tally[name] = self._tally.get(name, 0) + value.detach().float()  # type: ignore[assignment]
            self._counts[name] += 1

    # Checkpoints.

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Write a checkpoint whole, then remove the oldest ones."""
        folder = self.folder / f"checkpoint-{self.state.global_step}"
        if not self.args.should_save:  # another process gives the folder its name
            self._write(folder.with_name(f".{folder.name}.partial"))
            self.accelerator.wait_for_everyone()
            return
        with whole_folder(folder) as partial:
            self._write(partial)
            self.accelerator.wait_for_everyone()
        remove_oldest(self.folder, self.args.save_total_limit or 1)

    def _write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        trained = self._trained()
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))
        if self.args.should_save:
            save_file(trained, folder / TRAINED, metadata={"format": "pt"})
            self.state.save_to_json(str(folder / _STATE))
            for name, text in self.extra.items():
                (folder / name).write_text(text, encoding="utf-8")

    def _trained(self) -> dict[str, Tensor]:
        """Return the parameters that train, by name, gathered from all devices."""
        names = [name for name, parameter in self.step.named_parameters() if parameter.requires_grad]
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            values = self.accelerator.get_state_dict(self.model_wrapped)
        else:
            values = dict(self.step.named_parameters())
        return {name: values[name].detach().cpu().contiguous() for name in names if name in values}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        parameters = dict(self.step.named_parameters())
        with torch.no_grad():
            for name, value in load_file(Path(resume_from_checkpoint) / TRAINED).items():
                parameters[name].copy_(value)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a folder that ``load_compressor`` loads."""
        folder = Path(output_dir or self.folder)
        if self.args.should_save:
            with storing(folder):
                self.step.compressor.save(folder)


def history(checkpoint: Path) -> list[dict[str, Any]]:
    """Return the log of a run up to a checkpoint."""
    return TrainerState.load_from_json(str(checkpoint / _STATE)).log_history


def _flattened(values: Batch) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Part a batch into tensors, named by where they stand, and everything else."""
    tensors: dict[str, Tensor] = {}

    def plain(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            tensors[name] = value.detach().cpu().contiguous().clone()
            return f"tensor {name}"
        if isinstance(value, list | tuple):
            return [plain(item, f"{name}.{number}") for number, item in enumerate(value)]
        return value

    return tensors, {name: plain(value, name) for name, value in values.items()}
