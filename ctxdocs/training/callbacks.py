"""What is asked of the trainer as it runs: to pass its log on, and to stop between steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

#: Told every line of the log as it is written: ``{"loss": ..., "step": ..., "of_steps": ..., ...}``.
OnLog = Callable[[dict[str, Any]], None]


class Reporter(TrainerCallback):
    """Passes lines of the log that hold losses on."""

    def __init__(self, on_log: OnLog | None) -> None:
        self._on_log = on_log

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Pass one line on, from the first process."""
        holds_losses = logs is not None and ("loss" in logs or "eval_loss" in logs)
        if self._on_log is not None and holds_losses and state.is_world_process_zero:
            self._on_log({**(logs or {}), "step": state.global_step, "of_steps": state.max_steps})


class Stop(TrainerCallback):
    """Ends a run after the running step, with a checkpoint, once ``requested`` is true."""

    requested = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for both."""
        if self.requested:
            control.should_save = control.should_training_stop = True


@contextmanager
def interruptible() -> Iterator[Stop]:
    """Have the first Ctrl-C (or SIGTERM) end a run after the running step; the second one ends it at once."""
    stop = Stop()
    before: dict[int, Any] = {}

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, frame: Any) -> None:
        stop.requested = True
        put_back()

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        put_back()
