"""The one who changes a library."""

from __future__ import annotations

import itertools
import json
import os
import socket
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ctxdocs.cache.codecs import DTYPES, get_codec
from ctxdocs.cache.files import size_on_disk, writing
from ctxdocs.cache.index import LibraryIndex
from ctxdocs.cache.layout import CATALOG
from ctxdocs.cache.ledger import DocumentRow, Ledger
from ctxdocs.cache.lock import lock_library
from ctxdocs.cache.manifest import Manifest
from ctxdocs.cache.records import NewChunk, utc_now
from ctxdocs.cache.shards import Shards
from ctxdocs.cache.vectors import normalised
from ctxdocs.errors import CtxdocsError, FingerprintMismatch, InputError

COMPACTED_SHARD_BYTES = 256 << 20


class Writer:
    """A library open for writing; there is one at a time.

    Documents are begun, written in as many calls as it takes, and finished; until then no reader sees them. Every
    :meth:`write` is all or nothing, and what it has written survives a crash. Use it in a ``with`` block: at its end,
    also when an exception passes through, documents that were not finished are dropped, the vector index is saved
    and the library is free for the next writer. All methods may be called from any thread.

    Raises
    ------
    LibraryError
        If there is another writer.
    StorageError
        If the folder cannot be written.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._path = path
        self._manifest = manifest
        self._codec = get_codec(manifest.codec)
        self._shards = Shards(path, manifest)
        self._begun: dict[int, DocumentRow] = {}
        self._lock = threading.RLock()
        with ExitStack() as undo, writing(path):
            self._file_lock = lock_library(path)
            undo.callback(self._file_lock.release)
            self._ledger = Ledger.open(path / CATALOG)
            undo.callback(self._ledger.close)
            self._ledger.start(f"process {os.getpid()} on {socket.gethostname()}")
            self._shards.delete_strays(self._ledger.shards())
            undo.pop_all()
        self._index = LibraryIndex(path, manifest, self._ledger, self._shards)
        self._document_ids = itertools.count(self._ledger.next_id("documents"))

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except CtxdocsError:
            # An error that is on its way already says more than what it made impossible here.
            if kind is None:
                raise

    def close(self) -> None:
        """Drop what was not finished, save the index and let the next writer in."""
        with self._lock:
            if not self._file_lock.is_locked:
                return
            try:
                with writing(self._path):
                    self._begun.clear()
                    self._ledger.drop_unfinished()
                    self._shards.delete_strays(self._ledger.shards())
                    self._index.save()
                    self._ledger.checkpoint()
            finally:
                self._ledger.close()
                self._file_lock.release()

    def begin(self, uri: str, sha256: str, metadata: dict[str, Any] | None = None) -> int:
        """Begin a document; nothing is written yet.

        Parameters
        ----------
        uri : str
            Its name. A document of the same name is replaced when this one is finished.
        sha256 : str
            Digest of its content, as :meth:`Store.digests` will give it back.
        metadata : dict, optional
            Anything that JSON can hold.

        Returns
        -------
        int
            The document's id, for :class:`NewChunk` and :meth:`write`.
        """
        try:
            text = json.dumps(metadata or {}, ensure_ascii=False)
        except (TypeError, ValueError) as error:
            raise InputError(f"the metadata of {uri} cannot be written as JSON: {error}") from error
        _check_text("the name of a document", uri)
        document_id = next(self._document_ids)
        self._begun[document_id] = DocumentRow(document_id, uri, sha256, text, utc_now())
        return document_id

    def write(self, chunks: Sequence[NewChunk] = (), finished: Collection[int] = ()) -> int:
        """Write chunks, and make documents visible: one shard, one transaction.

        Parameters
        ----------
        chunks : sequence of NewChunk
            Of documents that were begun and not finished, in any order. Their memories become one shard; a few tens
            of megabytes make a good one.
        finished : collection of int
            Ids of the documents of which this call brings the last chunks. They become visible, and what they
            replace disappears, in the same transaction.

        Returns
        -------
        int
            Bytes of the memories as stored, after the codec.

        Raises
        ------
        InputError
            If a document was not begun or is finished already, or an embedding or memory is not what it should be.
        FingerprintMismatch
            If a memory was made by another compressor than the library's.
        StorageError
            If the disk is full or refuses; nothing of this call is in the library then, and it may be tried again.
        """
        with self._lock:
            finished = set(finished)
            documents = [self._document(number) for number in finished.union(chunk.document_id for chunk in chunks)]
            if not documents:
                return 0
            entries = [self._encode(chunk) for chunk in chunks]
            rows = [_row(chunk, entry) for chunk, entry in zip(chunks, entries, strict=True)]
            embeddings = self._embeddings(chunks)
            with writing(self._path):
                if chunks:
                    with self._new_shard(entries, embeddings) as shard_id:
                        self._ledger.write(documents, shard_id, rows, finished)
                else:
                    self._ledger.write(documents, None, rows, finished)
            for document_id in finished:
                del self._begun[document_id]
            return sum(row["nbytes"] for row in rows)

    def remove(self, uris: Iterable[str]) -> int:
        """Remove documents; return how many of them there were.

        A shard's file is deleted when nothing in it is in use any more; :meth:`compact` frees the rest.
        """
        names = list(uris)
        for name in names:
            _check_text("the name of a document", name)
        with self._lock, writing(self._path):
            return self._ledger.remove(names)

    def flush(self) -> None:
        """Save the vector index, so that the next reader need not gather embeddings from the shards."""
        with self._lock, writing(self._path):
            self._index.save()

    def compact(self) -> int:
        """Free the space of removed documents; return how many bytes that was.

        Shards that hold removed memories are written anew without them, and the catalog is vacuumed. Readers go on
        meanwhile. The catalog needs its own size in free space once more.
        """
        with self._lock, writing(self._path):
            before = size_on_disk(self._path)
            for group in _groups(self._ledger.holey_shards(), COMPACTED_SHARD_BYTES):
                self._merge(group)
            self._ledger.vacuum()
            self._shards.delete_strays(self._ledger.shards())
            self._index.rebuild()
            self._index.save()
            return before - size_on_disk(self._path)

    def _merge(self, shard_ids: list[int]) -> None:
        """Write what is in use of some shards into a new one, and delete them."""
        located = self._ledger.entries(shard_ids)
        entries = [self._shards.tensors(shard_id, entry) for _, shard_id, entry in located]
        embeddings = np.stack([self._shards.embeddings(shard_id)[entry] for _, shard_id, entry in located])
        with self._new_shard(entries, embeddings) as shard_id:
            self._ledger.move([chunk_id for chunk_id, _, _ in located], shard_id, shard_ids)
        self._shards.delete(shard_ids)

    @contextmanager
    def _new_shard(self, entries: Sequence[dict[str, Tensor]], embeddings: NDArray[np.float32]) -> Iterator[int]:
        """Write a shard and yield its id; the block commits it, and if it does not the shard is deleted."""
        shard_id = self._ledger.next_id("shards")
        try:
            self._shards.write(shard_id, entries, embeddings)
            yield shard_id
        except BaseException:
            # An interrupt may arrive after the commit: only the catalog knows whether the shard is in use.
            if shard_id not in self._ledger.shards():
                self._shards.delete([shard_id])
            raise

    def _document(self, document_id: int) -> DocumentRow:
        try:
            return self._begun[document_id]
        except KeyError as error:
            raise InputError(f"document {document_id} was not begun here, or is finished already") from error

    def _encode(self, chunk: NewChunk) -> dict[str, Tensor]:
        memory = chunk.memory
        if memory.fingerprint != self._manifest.fingerprint:
            raise FingerprintMismatch(
                f"{self._path} holds memories of the compressor {self._manifest.fingerprint}, "
                f"this one was made by {memory.fingerprint}",
                "use the compressor the library was created with, or create another library",
            )
        return self._codec.encode(memory.tensors())

    def _embeddings(self, chunks: Sequence[NewChunk]) -> NDArray[np.float32]:
        dimension = self._manifest.dimension
        for chunk in chunks:
            if np.shape(chunk.embedding) != (dimension,) or not np.isfinite(chunk.embedding).all():
                raise InputError(
                    f"an embedding must be {dimension} finite numbers, got shape {np.shape(chunk.embedding)}",
                    "use the embedder the library was created with",
                )
        return normalised(np.array([chunk.embedding for chunk in chunks], np.float32).reshape(-1, dimension))


def _row(chunk: NewChunk, stored: dict[str, Tensor]) -> dict[str, Any]:
    """Return the columns of a chunk."""
    memory = chunk.memory
    dtypes = {tensor.dtype for tensor in memory.tensors().values() if tensor.is_floating_point()}
    names = [name for name, dtype in DTYPES.items() if dtype in dtypes]
    if len(names) != 1 or len(dtypes) != 1:
        raise InputError(f"a memory must be of one dtype among {', '.join(DTYPES)}, got {dtypes}")
    _check_text("the text of a chunk", chunk.text)
    # Integers may come from numpy, which SQLite does not know.
    return {
        "document_id": int(chunk.document_id),
        "ordinal": int(chunk.ordinal),
        "start": int(chunk.start),
        "end": int(chunk.end),
        "text": chunk.text,
        "tokens": int(chunk.tokens),
        "kind": memory.kind,
        "dtype": names[0],
        "slots": int(memory.slots),
        "span": int(memory.span),
        "source_tokens": int(memory.source_tokens),
        "nbytes": sum(tensor.nbytes for tensor in stored.values()),
    }


def _check_text(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name} is no valid Unicode: {text[:80]!r}", "decode it with errors='replace'") from error


def _groups(shards: Iterable[tuple[int, int]], limit: int) -> Iterator[list[int]]:
    """Yield shard ids in groups whose bytes in use stay below ``limit`` where they can."""
    group: list[int] = []
    total = 0
    for shard_id, nbytes in shards:
        if group and total + nbytes > limit:
            yield group
            group, total = [], 0
        group.append(shard_id)
        total += nbytes
    if group:
        yield group
