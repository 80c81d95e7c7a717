"""A library as its readers see it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctxdocs.cache.catalog import Catalog
from ctxdocs.cache.codecs import DTYPES, get_codec
from ctxdocs.cache.files import size_on_disk, writing
from ctxdocs.cache.index import LibraryIndex
from ctxdocs.cache.layout import CATALOG, LOCK, MANIFEST, MEMORIES
from ctxdocs.cache.ledger import Ledger
from ctxdocs.cache.lock import lock_library
from ctxdocs.cache.manifest import Manifest
from ctxdocs.cache.records import Counts, StoredChunk, StoredDocument, utc_now
from ctxdocs.cache.shards import ShardMissing, Shards
from ctxdocs.cache.vectors import VectorIndex
from ctxdocs.cache.writer import Writer
from ctxdocs.errors import InputError, LibraryError
from ctxdocs.memory import Memory

_UNFINISHED = {LOCK, MEMORIES, *(CATALOG + suffix for suffix in ("", "-wal", "-shm", "-journal"))}


class Store:
    """A library open for reading.

    It sees what is committed, also by other processes and after it was opened; it never writes. All methods may be
    called from any thread.
    """

    def __init__(self, path: Path, manifest: Manifest, catalog: Catalog) -> None:
        self.path = path
        self.manifest = manifest
        self._catalog = catalog
        self._codec = get_codec(manifest.codec)
        self._shards = Shards(path, manifest)
        self._index = LibraryIndex(path, manifest, catalog, self._shards)

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        compressor: dict[str, Any],
        embedder: dict[str, Any],
        codec: str = "exact",
        index: str = "Flat",
        settings: dict[str, Any] | None = None,
    ) -> Store:
        """Create an empty library and open it.

        Parameters
        ----------
        path : path
            A folder that is empty or not there yet.
        compressor : dict
            ``fingerprint`` of the compressor whose memories the library will hold, and anything else its owner
            wants to find again (JSON).
        embedder : dict
            ``name`` and ``dimension`` of the embeddings, and anything else (JSON).
        codec : {"exact", "bfloat16", "float16", "int8"}
            How memories are stored.
        index : str
            FAISS ``index_factory`` string of the families Flat, HNSW and IVF.
        settings : dict, optional
            Anything else about the library (JSON).

        Raises
        ------
        LibraryError
            If there is a library or anything else at ``path``.
        InputError
            If an argument is not of the kind above.
        StorageError
            If the folder cannot be written.
        """
        folder = Path(path)
        manifest = Manifest(
            compressor=compressor,
            embedder=embedder,
            codec=codec,
            index=index,
            settings=settings or {},
            created_at=utc_now(),
        )
        get_codec(codec)
        VectorIndex(manifest.dimension, index)
        if folder.exists() and not folder.is_dir():
            raise LibraryError(f"{folder} is a file", "choose a folder")
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            # Once before anything is written there, and once more when nobody else may.
            _check_vacant(folder)
            with lock_library(folder):
                _check_vacant(folder)
                (folder / MEMORIES).mkdir(exist_ok=True)
                for name in _UNFINISHED - {LOCK, MEMORIES}:
                    (folder / name).unlink(missing_ok=True)
                Ledger.create(folder / CATALOG)
                manifest.write(folder)
        return cls.open(folder)

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """Open a library.

        Raises
        ------
        LibraryError
            If there is none, it is damaged, or its format is newer than this version of ctxdocs.
        """
        folder = Path(path)
        manifest = Manifest.read(folder)
        try:
            return cls(folder, manifest, Catalog.open(folder / CATALOG))
        except InputError as error:
            raise LibraryError(f"{folder} cannot be read: {error.message}", error.hint) from error

    def close(self) -> None:
        """Close the catalog. Memories that were read stay valid."""
        self._catalog.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def writer(self) -> Writer:
        """Open the library for writing; see :class:`Writer`.

        Raises
        ------
        LibraryError
            If another writer, in this process or another, has it open.
        StorageError
            If the folder cannot be written.
        """
        return Writer(self.path, self.manifest)

    def documents(self) -> Iterator[StoredDocument]:
        """Yield the documents in the order they were added."""
        return self._catalog.documents()

    def document(self, uri: str) -> StoredDocument | None:
        """Return the document of that name, None if there is none."""
        return self._catalog.document(uri)

    def digests(self) -> dict[str, str]:
        """Return the sha256 of every document by its name."""
        return self._catalog.digests()

    def counts(self) -> Counts:
        """Return sums over the library."""
        documents, chunks, tokens, slots, memory_bytes = map(int, self._catalog.totals())
        return Counts(documents, chunks, tokens, slots, memory_bytes, size_on_disk(self.path))

    def revision(self) -> int:
        """Return a number that grows with every change of what the library holds."""
        return self._catalog.revision()

    def is_empty(self) -> bool:
        """Return whether the library holds no documents; cheaper than :meth:`counts`."""
        return not self._catalog.has_documents()

    def chunk(self, chunk_id: int) -> StoredChunk | None:
        """Return a chunk, None if it is gone."""
        return next(iter(self._catalog.chunks([chunk_id])), None)

    def chunks(self, ids: Iterable[int]) -> list[StoredChunk]:
        """Return chunks in the order of ``ids``; those that are gone are skipped."""
        return self._catalog.chunks(ids)

    def chunk_ids(self, uris: Iterable[str]) -> NDArray[np.int64]:
        """Return the ids ``[chunks]`` of some documents' chunks, document by document, in order."""
        return self._catalog.chunk_ids(uris)

    def nearest(
        self, vectors: NDArray[np.float32], k: int, *, allowed: Iterable[int] | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Find the chunks whose embeddings point most nearly in the direction of a query's.

        Parameters
        ----------
        vectors : numpy.ndarray
            ``[queries, dimension]``, float32.
        k : int
            Chunks wanted for each query.
        allowed : iterable of int, optional
            The only chunk ids to look among.

        Returns
        -------
        ids : numpy.ndarray
            ``[queries, n]``, int64, best first, ``n`` being ``k`` or the number of chunks there are to choose from
            if that is smaller; -1 where an approximate index finds fewer.
        scores : numpy.ndarray
            ``[queries, n]``, float32: cosines, minus infinity beside -1.
        """
        vectors = np.asarray(vectors)
        if vectors.ndim != 2 or vectors.shape[1] != self.manifest.dimension:
            raise InputError(f"vectors must be [queries, {self.manifest.dimension}], got {list(vectors.shape)}")
        return self._index.search(vectors, k, allowed)

    def matching(self, query: str, k: int, *, allowed: Collection[int] | None = None) -> list[tuple[int, float]]:
        """Find the chunks that share words with a query.

        Parameters
        ----------
        query : str
            Any text; only its words count, and one of them is enough.
        k : int
            Chunks wanted.
        allowed : collection of int, optional
            The only chunk ids to look among.

        Returns
        -------
        list of (int, float)
            Chunk ids and BM25 scores, best first; higher is better.
        """
        return self._catalog.matching(query, k, allowed)

    def memories(self, chunks: Sequence[StoredChunk]) -> list[Memory]:
        """Read the memories of chunks, in their order.

        With the codec "exact" the tensors are private pages of the shard's file, read when they are used: changing
        them in place changes what this process reads again, and nothing else.

        Raises
        ------
        LibraryError
            If a chunk was removed meanwhile, or a shard is damaged.
        """
        try:
            return [self._memory(chunk) for chunk in chunks]
        except ShardMissing:
            # A compaction may have moved them since the chunks were looked up.
            current = self._catalog.chunks(chunk.id for chunk in chunks)
            if len(current) < len(chunks):
                raise LibraryError(
                    f"{len(chunks) - len(current)} of the chunks were removed from {self.path}", "search again"
                ) from None
            return [self._memory(chunk) for chunk in current]

    def _memory(self, chunk: StoredChunk) -> Memory:
        stored = self._shards.tensors(chunk.shard_id, chunk.entry)
        try:
            return Memory.from_tensors(
                chunk.kind,
                self._codec.decode(stored, DTYPES[chunk.dtype]),
                span=chunk.span,
                source_tokens=chunk.source_tokens,
                fingerprint=self.manifest.fingerprint,
            )
        except (KeyError, InputError) as error:
            raise LibraryError(f"the memory of chunk {chunk.id} in {self.path} is damaged: {error}") from error


def _check_vacant(folder: Path) -> None:
    names = {entry.name for entry in folder.iterdir()}
    if MANIFEST in names:
        raise LibraryError(f"there is a library at {folder}", "open it, or choose another folder")
    # A creation that was interrupted left no manifest and no memories; anything else is somebody's.
    memories = folder / MEMORIES
    if names - _UNFINISHED or (memories.is_dir() and any(memories.iterdir())):
        raise LibraryError(f"there are other files in {folder}", "choose an empty folder")
