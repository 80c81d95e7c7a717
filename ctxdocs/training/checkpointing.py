"""Checkpoints of a run: written whole or not at all, and gone on from by the same configuration only."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ctxdocs.errors import InputError, StorageError
from ctxdocs.training.config import TrainingConfig
from ctxdocs.training.config_files import read_yaml, write_config
from ctxdocs.training.options import differing, free_options

#: Parameters that train, by name.
TRAINED = "trained.safetensors"
#: The configuration that a folder was trained with.
CONFIG = "training.yaml"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def last_checkpoint(output: Path) -> Path | None:
    """Return the checkpoint with the most steps; None if there is none."""
    found = _checkpoints(output)
    return found[-1] if found else None


def steps_of(checkpoint: Path) -> int:
    """Return how many steps had been taken."""
    match = _CHECKPOINT.fullmatch(checkpoint.name)
    return int(match[1]) if match else 0


def remove_oldest(output: Path, keep: int) -> None:
    """Remove all checkpoints but the last ``keep``."""
    for folder in _checkpoints(output)[: -max(1, keep)]:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give a folder to write to, which takes its name when the block ends without an error.

    Raises
    ------
    StorageError
        If writing fails: the disk is full, or nothing may be written. What was there before is as it was.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    with storing(folder):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            yield partial
            if folder.exists():
                shutil.rmtree(folder)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def storing(folder: Path) -> Iterator[None]:
    """Turn what writers raise when the disk is full, or nothing may be written, into a ``StorageError``."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise _storage_error(folder, error) from error
    except RuntimeError as error:  # torch.save
        if "write" not in str(error).lower() and not isinstance(error.__context__, OSError):
            raise
        raise _storage_error(folder, error) from error


def replace_files(source: Path, target: Path) -> None:
    """Move all files of a folder into another one, over those of the same names."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        path.replace(target / path.name)


def check_same(config: TrainingConfig, output: Path) -> None:
    """Raise ``InputError`` if the checkpoints in a folder are of a run with another configuration."""
    path = output / CONFIG
    if last_checkpoint(output) is None or not path.is_file():
        return
    told = set(differing(read_yaml(path), _plain(config)))
    if changed := sorted(told - free_options(TrainingConfig)):
        raise InputError(
            f"{output} holds checkpoints of a run that differs in {', '.join(changed)}",
            f"go on with the configuration in {path}, or choose another --output",
        )


def keep_config(config: TrainingConfig, output: Path) -> None:
    """Write the configuration beside what it makes."""
    with storing(output):
        output.mkdir(parents=True, exist_ok=True)
        write_config(config, output / CONFIG)


def _plain(config: TrainingConfig) -> dict[str, Any]:
    return config.to_mapping()


def _checkpoints(output: Path) -> list[Path]:
    if not output.is_dir():
        return []
    return sorted((path for path in output.iterdir() if _CHECKPOINT.fullmatch(path.name)), key=steps_of)


def _storage_error(folder: Path, error: Exception) -> StorageError:
    full = (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "No space" in str(error)
    what = "the disk is full" if full else str(error).splitlines()[0] if str(error) else type(error).__name__
    return StorageError(
        f"{folder} could not be written: {what}",
        "free some space and run the same command again; earlier checkpoints are intact",
    )
