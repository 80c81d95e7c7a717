"""Errors that users meet. Each says what went wrong, where, and what to do about it."""

from __future__ import annotations


class CtxdocsError(Exception):
    """Base class of every error ctxdocs raises on purpose.

    Parameters
    ----------
    message : str
        What went wrong and where.
    hint : str, optional
        What the user can do about it.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class InputError(CtxdocsError, ValueError):
    """An argument that cannot be used: empty text, ids out of vocabulary, ``k`` below one."""


class ContextTooLong(InputError):
    """Text and memories that need more positions than the model has."""


class DocumentError(CtxdocsError):
    """A file that cannot be read as a document."""


class CheckpointError(CtxdocsError):
    """A folder or name that is no usable checkpoint."""


class FingerprintMismatch(CtxdocsError):
    """A memory or a library made by another compressor than the one that should read it."""


class LibraryError(CtxdocsError):
    """A library that is missing, damaged, locked or used in a way it does not allow."""


class StorageError(LibraryError):
    """Writing failed (disk full, no permission). What was committed before is intact."""


class TrainingError(CtxdocsError):
    """Training that cannot go on: a loss that is no number."""


class MissingDependency(CtxdocsError, ImportError):
    """An optional package is needed; the hint names the extra that installs it."""
