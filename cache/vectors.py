"""Nearest neighbours among embeddings, by FAISS."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctxdocs.cache.files import replacing
from ctxdocs.errors import InputError, StorageError

Ids = NDArray[np.int64]
Vectors = NDArray[np.float32]

# What FAISS asks for: training points for each centroid, and the centroids of a product quantizer.
POINTS_PER_CENTROID = 39
QUANTIZER_CENTROIDS = 256


class VectorIndex:
    """Embeddings by chunk id, compared by cosine.

    Indexes that need training (``IVF...``) are flat, and exact, until :meth:`train` finds enough vectors.

    Parameters
    ----------
    dimension : int
        Length of an embedding.
    factory : str
        FAISS ``index_factory`` string of the families Flat, HNSW and IVF.

    Raises
    ------
    InputError
        If FAISS does not know the string, or it is of another family.
    """

    def __init__(self, dimension: int, factory: str) -> None:
        faiss = _faiss()
        wanted = _build(dimension, factory)
        self._factory = factory
        self._inner = wanted if wanted.is_trained else faiss.IndexFlatIP(dimension)
        self._index = faiss.IndexIDMap(self._inner)
        self._removed = np.empty(0, np.int64)
        self.mapped = False

    @classmethod
    def read(cls, path: Path, dimension: int, factory: str, *, how: str = "mapped") -> VectorIndex | None:
        """Read an index file; None if it is missing, damaged or of another dimension.

        Parameters
        ----------
        path : pathlib.Path
            The file.
        dimension, factory
            What it should be.
        how : {"mapped", "owned"}
            A mapped index opens at once and shares its pages with other processes, but must not be changed.
        """
        faiss = _faiss()
        if not path.is_file():
            return None
        try:
            index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if how == "mapped" else 0)
        except (RuntimeError, MemoryError):
            return None
        if type(index) is not faiss.IndexIDMap or index.d != dimension:
            return None
        self = cls(dimension, factory)
        self._index, self._inner, self.mapped = index, faiss.downcast_index(index.index), how == "mapped"
        return self

    def __len__(self) -> int:
        return self._index.ntotal - len(self._removed)

    @property
    def ids(self) -> Ids:
        """Ids of the vectors, in no particular order."""
        faiss = _faiss()
        ids = faiss.vector_to_array(self._index.id_map)
        return np.setdiff1d(ids, self._removed) if len(self._removed) else ids

    def add(self, ids: Ids, vectors: Vectors) -> None:
        """Add vectors ``[n, dimension]`` of unit length under ids ``[n]`` that are not there yet."""
        self._index.add_with_ids(np.ascontiguousarray(vectors), np.ascontiguousarray(ids))

    def remove(self, ids: Ids) -> None:
        """Remove vectors; ids that are not there are passed over.

        Only a flat index can really lose vectors. The others pass the removed ones over when they search, and lose
        them when the index is built anew.
        """
        faiss = _faiss()
        if isinstance(self._inner, faiss.IndexFlat):
            self._index.remove_ids(np.ascontiguousarray(ids))
        else:
            known = faiss.vector_to_array(self._index.id_map)
            self._removed = np.union1d(self._removed, np.intersect1d(ids, known))

    @property
    def holds_removed(self) -> bool:
        """Whether vectors that were removed still take up space."""
        return len(self._removed) > 0

    def search(self, queries: Vectors, k: int, allowed: Iterable[int] | None = None) -> tuple[Ids, Vectors]:
        """Return ids and cosines ``[queries, min(k, len(self))]``, best first.

        Where fewer are found, the rest is -1 and minus infinity. ``allowed`` restricts the search to some ids.
        """
        faiss = _faiss()
        queries = normalised(queries)
        k = min(k, len(self))
        selector: Any = None
        if allowed is not None:
            ids = np.setdiff1d(np.fromiter(allowed, np.int64), self._removed)
            selector = faiss.IDSelectorBatch(ids)
            k = min(k, len(ids))
        elif len(self._removed):
            selector = faiss.IDSelectorNot(faiss.IDSelectorBatch(self._removed))
        if k < 1 or not len(queries):
            return np.empty((len(queries), 0), np.int64), np.empty((len(queries), 0), np.float32)
        scores, found = self._index.search(queries, k, params=self._parameters(selector))
        scores[found < 0] = -np.inf
        return found, scores

    def train(self) -> bool:
        """Become what the factory string says, if that needs training and there are vectors enough.

        Returns
        -------
        bool
            Whether the index changed.
        """
        faiss = _faiss()
        wanted = _build(self._inner.d, self._factory)
        if wanted.is_trained or not isinstance(self._inner, faiss.IndexFlat):
            return False
        centroids = max(wanted.nlist, QUANTIZER_CENTROIDS if isinstance(wanted, faiss.IndexIVFPQ) else 0)
        if len(self) < centroids * POINTS_PER_CENTROID:
            return False
        vectors = self._inner.reconstruct_n(0, len(self))
        wanted.train(vectors)
        index = faiss.IndexIDMap(wanted)
        index.add_with_ids(vectors, self.ids)
        self._index, self._inner, self.mapped = index, wanted, False
        return True

    def save(self, path: Path) -> None:
        """Write the index to a file, atomically."""
        faiss = _faiss()
        with replacing(path) as temporary:
            try:
                faiss.write_index(self._index, str(temporary))
            except RuntimeError as error:
                raise StorageError(
                    f"cannot write {path}: {error}", "free space and run again; the index is rebuilt from the shards"
                ) from error

    def _parameters(self, selector: Any) -> Any:
        faiss = _faiss()
        if isinstance(self._inner, faiss.IndexIVF):
            # One list, which is FAISS's default, finds too little.
            probes = min(self._inner.nlist, max(8, self._inner.nlist // 16))
            return faiss.SearchParametersIVF(sel=selector, nprobe=probes)
        if isinstance(self._inner, faiss.IndexHNSW):
            return faiss.SearchParametersHNSW(sel=selector, efSearch=64)
        return faiss.SearchParameters(sel=selector)


def normalised(vectors: Vectors) -> Vectors:
    """Return a copy ``[n, dimension]``, float32, whose rows have unit length (rows of zeros stay)."""
    faiss = _faiss()
    copy = np.array(vectors, dtype=np.float32, order="C", ndmin=2)
    faiss.normalize_L2(copy)
    return copy


def _build(dimension: int, factory: str) -> Any:
    faiss = _faiss()
    try:
        index = faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise InputError(f"FAISS cannot build the index {factory!r} for {dimension} dimensions: {error}") from error
    if not isinstance(index, (faiss.IndexFlat, faiss.IndexHNSW, faiss.IndexIVF)):
        raise InputError(f"the index {factory!r} is not supported", "use Flat, HNSW... or IVF...")
    return index


def _faiss() -> Any:
    import faiss

    return faiss
