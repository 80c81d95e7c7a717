"""What goes into a library and what comes out of it, apart from the memories."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctxdocs.memory import Memory


@dataclass(frozen=True, eq=False)
class NewChunk:
    """A chunk to be written.

    Parameters
    ----------
    document_id : int
        What :meth:`Writer.begin` returned for its document.
    ordinal : int
        Its place among the chunks of the document, from 0; unique in the document.
    start, end : int
        Character offsets in the document's text.
    text : str
        The text itself.
    tokens : int
        Length of the text in the compressor's tokens.
    embedding : numpy.ndarray
        ``[dimension]``, float32. Only its direction is used.
    memory : Memory
        What the compressor made of the text.
    """

    document_id: int
    ordinal: int
    start: int
    end: int
    text: str
    tokens: int
    embedding: NDArray[np.float32]
    memory: Memory


@dataclass(frozen=True)
class StoredChunk:
    """A chunk of a library.

    ``id`` is never used again for another chunk. ``nbytes`` is what the memory takes up on disk (after the codec);
    ``dtype`` is the floating-point dtype it had before. ``shard_id`` and ``entry`` say where it lies.
    """

    id: int
    document_id: int
    uri: str
    ordinal: int
    start: int
    end: int
    text: str
    tokens: int
    kind: str
    dtype: str
    slots: int
    span: int
    source_tokens: int
    nbytes: int
    shard_id: int
    entry: int


@dataclass(frozen=True)
class StoredDocument:
    """A document of a library: its name, the sha256 of its content, and sums over its chunks.

    ``added_at`` is in UTC, ISO 8601. ``nbytes`` is what its memories take up on disk.
    """

    id: int
    uri: str
    sha256: str
    metadata: dict[str, Any]
    added_at: str
    chunks: int
    tokens: int
    slots: int
    nbytes: int


@dataclass(frozen=True)
class Counts:
    """Sums over a library: ``memory_bytes`` are those of the memories in use, ``disk_bytes`` of all its files."""

    documents: int
    chunks: int
    tokens: int
    slots: int
    memory_bytes: int
    disk_bytes: int


def utc_now() -> str:
    """Return the time in UTC, ISO 8601, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
