"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ctxdocs.errors import StorageError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn whatever the disk refuses inside the block into a :class:`StorageError`."""
    try:
        yield
    except (OSError, SafetensorError, sqlite3.Error) as error:
        raise StorageError(
            f"cannot write to {path}: {error}",
            "free space or mend the permissions and run again; what was committed before is intact",
        ) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path; at the end of the block its content is on the disk and bears the name ``path``.

    If the block or the disk fails, the temporary file is removed and a former ``path`` is left as it was.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        # Some libraries create files for their owner only; a library is as readable as the folder it lies in.
        temporary.chmod(mode)
        _sync(temporary)
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    if os.name == "posix":
        _sync(path)


def size_on_disk(folder: Path) -> int:
    """Return the bytes of all files below a folder; files that vanish meanwhile count nothing."""
    total = 0
    for directory, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(directory) / name).stat().st_size
            except FileNotFoundError:
                continue
    return total


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
