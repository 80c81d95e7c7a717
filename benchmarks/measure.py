"""Fair timing: what is compared runs alternately in one process, and ratios are taken round by round."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WARMUP_ROUNDS = 1
#: What seconds are: by the clock on the wall, or of processor time, which other processes do not use up.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}


@dataclass(frozen=True)
class Spread:
    """Median and range of repeated measurements.

    Parameters
    ----------
    median, low, high : float
        Median, smallest and largest value.
    rounds : int
        How many there were.
    """

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise values."""
        return cls(statistics.median(values), min(values), max(values), len(values))

    @classmethod
    def of_ratios(cls, above: Sequence[float], below: Sequence[float]) -> Spread:
        """Summarise ``above / below``, paired by round: what slows a whole round down cancels out."""
        return cls.of([a / b for a, b in zip(above, below, strict=True)])

    def __str__(self) -> str:
        return f"{_shown(self.median)} ({_shown(self.low)}..{_shown(self.high)})"


class Clock:
    """Times blocks of work, waiting for the device at both ends.

    Parameters
    ----------
    device : torch.device
        Where the work runs.
    clock : str
        One of ``CLOCKS``; processor time means something for one thread on a CPU alone.
    """

    def __init__(self, device: torch.device, clock: str = "wall") -> None:
        self.device = device
        self._now = CLOCKS[clock]
        self.seconds: dict[Hashable, list[float]] = {}

    @contextmanager
    def time(self, name: Hashable) -> Iterator[None]:
        """Add the time of the block to ``seconds[name]``."""
        self._synchronize()
        start = self._now()
        yield
        self._synchronize()
        self.seconds.setdefault(name, []).append(self._now() - start)

    def alternate(self, actions: Mapping[Any, Callable[[], object]], rounds: int) -> dict[Hashable, list[float]]:
        """Run all actions in turn, round after round, and return their seconds; a first round is not timed."""
        for _ in range(WARMUP_ROUNDS):
            for action in actions.values():
                action()
        self.seconds = {}
        for _ in range(rounds):
            for name, action in actions.items():
                with self.time(name):
                    action()
        return self.seconds

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class PeakMemory:
    """Peak memory of this process and of its device from here on, in bytes.

    What was freed before is given back first, or it would hide what is taken again. Where the kernel does not let the
    peak be reset, the resident peak counts from the start of the process.
    """

    _RESET_PEAK = "5"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        with suppress(OSError, AttributeError):  # only glibc can
            ctypes.CDLL(None).malloc_trim(0)
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text(self._RESET_PEAK, encoding="ascii")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.before = self.now()

    def now(self) -> dict[str, int]:
        """Return the peak so far: ``resident`` and, with a GPU, ``device``."""
        peak = {"resident": _resident_peak()}
        if self.device.type == "cuda":
            peak["device"] = torch.cuda.max_memory_allocated(self.device)
        return peak

    def grown(self) -> dict[str, int]:
        """Return how far the peak lies above what was in use at the start."""
        return {name: value - self.before[name] for name, value in self.now().items()}


def peak_mib(device: torch.device, action: Callable[[], object]) -> int:
    """Return how far an action lifts memory above what is held now, in MiB: the GPU's, or else the process's."""
    peak = PeakMemory(device)
    action()
    grown = peak.grown()
    return grown.get("device", grown["resident"]) // 2**20


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that is made inside the block, in bytes; what kernels hold is not seen."""

    nbytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation and look at what it made."""
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.nbytes = max(self.nbytes, tensor.numel() * tensor.element_size())
        return made


def _resident_peak() -> int:
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def environment(device: torch.device) -> dict[str, Any]:
    """Return what a figure depends on besides the code: device and versions."""
    import transformers

    import ctxdocs

    return {
        "device": device_name(device),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "ctxdocs": ctxdocs.__version__,
    }


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the processor's architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU"


def command_line() -> str:
    """Return the command this process was started with."""
    return shlex.join(["python", *sys.argv])


def table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows with the same keys as an aligned table."""
    print(f"\n{title}")
    if not rows:
        print("  nothing measured")
        return
    cells = [list(rows[0]), *([_shown(value) for value in row.values()] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    for row in cells:
        print("  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)), flush=True)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def as_json(result: Mapping[str, Any]) -> str:
    """Return a result as JSON, its spreads as objects."""
    return json.dumps(result, indent=1, default=asdict) + "\n"


def write_json(path: Path | None, result: Mapping[str, Any]) -> None:
    """Write a result and say so; None writes nothing."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_json(result), encoding="utf-8")
    print(f"\nwritten: {path}")
