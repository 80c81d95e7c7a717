"""One writer at a time."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from filelock import FileLock, Timeout

from ctxdocs.cache.catalog import Catalog
from ctxdocs.cache.files import writing
from ctxdocs.cache.layout import CATALOG, LOCK
from ctxdocs.errors import LibraryError


def lock_library(folder: Path) -> FileLock:
    """Take the lock of a library, or raise :class:`LibraryError` at once.

    The operating system frees it when the process ends, however it ends.
    """
    lock = FileLock(folder / LOCK, timeout=0, thread_local=False)
    with writing(folder):
        try:
            lock.acquire()
        except Timeout as error:
            raise LibraryError(
                f"{folder} is being written to by {_holder(folder)}",
                "wait until that is done, or end it; reading is possible meanwhile",
            ) from error
    return lock


def _holder(folder: Path) -> str:
    try:
        with closing(Catalog.open(folder / CATALOG)) as catalog:
            return catalog.writer() or "another process"
    except LibraryError:
        return "another process"
