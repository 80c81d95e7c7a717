"""The vector index of a library, kept in step with its catalog."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ctxdocs.cache.catalog import Catalog, Changes
from ctxdocs.cache.layout import INDEX
from ctxdocs.cache.manifest import Manifest
from ctxdocs.cache.shards import ShardMissing, Shards, gather_embeddings
from ctxdocs.cache.vectors import VectorIndex

RETRIES = 4
NO_REVISION = -1


class LibraryIndex:
    """Finds chunks by embedding.

    The file is only a head start: whatever it lacks is added from the shards, whatever the catalog no longer holds
    is removed, and without a usable file the index is built from the shards alone.

    Parameters
    ----------
    folder : pathlib.Path
        The library.
    manifest : Manifest
        Says the dimension and the kind of index.
    catalog : Catalog
        Says which chunks there are.
    shards : Shards
        Hold their embeddings.
    """

    def __init__(self, folder: Path, manifest: Manifest, catalog: Catalog, shards: Shards) -> None:
        self._path = folder / INDEX
        self._manifest = manifest
        self._catalog = catalog
        self._shards = shards
        self._vectors: VectorIndex | None = None
        self._revision = NO_REVISION
        self._saved = True
        self._lock = threading.RLock()

    def search(
        self, vectors: NDArray[np.float32], k: int, allowed: Iterable[int] | None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Search the committed chunks, see :meth:`VectorIndex.search`."""
        with self._lock:
            return self._current().search(vectors, k, allowed)

    def save(self) -> None:
        """Bring the file up to date; nothing is written if it is."""
        with self._lock:
            vectors = self._current()
            if vectors.train() or not self._saved:
                vectors.save(self._path)
                self._saved = True

    def rebuild(self) -> None:
        """Build the index anew if vectors of removed chunks still take up space in it."""
        with self._lock:
            if self._current().holds_removed:
                self._start(VectorIndex(self._manifest.dimension, self._manifest.index))
                self._saved = False

    def _current(self) -> VectorIndex:
        for _ in range(RETRIES):
            # A compaction may move memories between the look at the catalog and the look at the shards.
            with suppress(ShardMissing):
                return self._follow()
        return self._follow()

    def _follow(self) -> VectorIndex:
        vectors = self._start(self._read("mapped")) if self._vectors is None else self._vectors
        if self._catalog.revision() == self._revision:
            return vectors
        changes = self._catalog.changes(self._revision)
        added, removed = _difference(vectors, changes)
        if vectors.mapped and (len(added) or len(removed)):
            vectors = self._start(self._read("owned"))
            changes = self._catalog.changes(self._revision)
            added, removed = _difference(vectors, changes)
        # Until the index is whole again it is nobody's: after an error the next search starts from the file.
        self._vectors = None
        if len(removed):
            vectors.remove(removed)
        for ids, embeddings in gather_embeddings(self._shards, added):
            vectors.add(ids, embeddings)
        self._saved = self._saved and not (len(added) or len(removed))
        self._vectors, self._revision = vectors, changes.revision
        return vectors

    def _start(self, vectors: VectorIndex) -> VectorIndex:
        self._vectors, self._revision = vectors, NO_REVISION
        return vectors

    def _read(self, how: str) -> VectorIndex:
        vectors = VectorIndex.read(self._path, self._manifest.dimension, self._manifest.index, how=how)
        self._saved = vectors is not None
        return VectorIndex(self._manifest.dimension, self._manifest.index) if vectors is None else vectors


def _difference(vectors: VectorIndex, changes: Changes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows of ``changes.added`` to add and the ids to remove."""
    if changes.removed is not None:
        return changes.added, changes.removed
    known, wanted = vectors.ids, changes.added[:, 0]
    return changes.added[np.isin(wanted, known, invert=True)], np.setdiff1d(known, wanted)
