"""Memories in immutable safetensors files, read through mmap."""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ctxdocs.cache.files import replacing
from ctxdocs.cache.layout import MEMORIES
from ctxdocs.cache.manifest import Manifest
from ctxdocs.errors import LibraryError

FORMAT = "ctxdocs-shard-1"
EMBEDDINGS = "embeddings"
OPEN_SHARDS = 128


class ShardMissing(LibraryError):
    """A shard the catalog named a moment ago: removed, or its memories moved by a compaction."""


class Shards:
    """The folder ``memories/`` of a library.

    Shard ``7`` is the file ``00000007.safetensors``. Entry ``i`` of a shard are the tensors ``"i.<name>"`` and row
    ``i`` of ``"embeddings"`` (float32, ``[entries, dimension]``, unit length or zero).

    Parameters
    ----------
    folder : pathlib.Path
        The library.
    manifest : Manifest
        Says the codec, whose name is written into each shard, and the dimension of the embeddings.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder = folder / MEMORIES
        self._dimension = manifest.dimension
        self._metadata = {"format": FORMAT, "codec": manifest.codec}
        self._open: OrderedDict[int, _Shard] = OrderedDict()
        self._lock = threading.Lock()

    def write(self, shard_id: int, entries: Sequence[Mapping[str, Tensor]], embeddings: NDArray[np.float32]) -> None:
        """Write a shard: when this returns it is on the disk under its name; when it raises it is not there."""
        # Copies, because safetensors refuses tensors that share storage, as the rows of a batch do.
        tensors = {
            f"{number}.{name}": tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for number, entry in enumerate(entries)
            for name, tensor in entry.items()
        }
        tensors[EMBEDDINGS] = torch.from_numpy(np.ascontiguousarray(embeddings))
        with replacing(self._path(shard_id)) as temporary:
            save_file(tensors, temporary, metadata=self._metadata)

    def tensors(self, shard_id: int, entry: int) -> dict[str, Tensor]:
        """Return the stored tensors of one entry, by name, without copying them.

        They are private pages of the file: changing them changes neither the file nor other processes, but it does
        change what this process reads again.
        """
        return self._shard(shard_id).tensors(entry)

    def embeddings(self, shard_id: int) -> NDArray[np.float32]:
        """Return the embeddings of a shard, ``[entries, dimension]``."""
        return self._shard(shard_id).embeddings(self._dimension)

    def delete(self, shard_ids: Collection[int]) -> None:
        """Delete shards; those that are not there are passed over."""
        with self._lock:
            for shard_id in shard_ids:
                self._open.pop(shard_id, None)
        for shard_id in shard_ids:
            self._path(shard_id).unlink(missing_ok=True)

    def delete_strays(self, known: Collection[int]) -> None:
        """Delete every file that is none of the ``known`` shards: what interrupted writers left behind."""
        names = {self._path(shard_id).name for shard_id in known}
        for path in self._folder.iterdir():
            if path.name not in names:
                path.unlink(missing_ok=True)

    def _path(self, shard_id: int) -> Path:
        # The catalog may come from anywhere: what it says must not lead out of the folder.
        if not isinstance(shard_id, int) or shard_id < 1:
            raise LibraryError(f"{self._folder.parent} is damaged: {shard_id!r} is no shard")
        return self._folder / f"{shard_id:08d}.safetensors"

    def _shard(self, shard_id: int) -> _Shard:
        with self._lock:
            shard = self._open.get(shard_id)
            if shard is None:
                shard = self._open[shard_id] = _Shard(self._path(shard_id))
            self._open.move_to_end(shard_id)
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
            return shard


class _Shard:
    """An open shard. Tensors taken from it outlive it: each holds on to the mapping."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = safe_open(path, "pt")
        except FileNotFoundError as error:
            raise ShardMissing(
                f"{path} is missing", "search again; if it stays missing, the library is damaged"
            ) from error
        except (OSError, SafetensorError) as error:
            raise self._damaged(error) from error
        self._names: defaultdict[str, list[str]] = defaultdict(list)
        for full_name in self._file.keys():  # noqa: SIM118 - no mapping
            number, _, name = full_name.partition(".")
            self._names[number].append(name)

    def tensors(self, entry: int) -> dict[str, Tensor]:
        names = self._names.get(str(entry))
        if names is None:
            raise self._damaged(f"it has no entry {entry}")
        return {name: self._file.get_tensor(f"{entry}.{name}") for name in names}

    def embeddings(self, dimension: int) -> NDArray[np.float32]:
        try:
            embeddings = self._file.get_tensor(EMBEDDINGS)
        except SafetensorError as error:
            raise self._damaged(error) from error
        if embeddings.dtype != torch.float32 or embeddings.shape[1:] != (dimension,):
            raise self._damaged(f"its embeddings are {embeddings.dtype} {list(embeddings.shape)}")
        return embeddings.numpy()

    def _damaged(self, reason: object) -> LibraryError:
        return LibraryError(f"{self._path} is damaged: {reason}", "restore it from a copy, or add its documents again")


def gather_embeddings(
    shards: Shards, locations: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Yield ``(chunk ids [n], embeddings [n, dimension])``, shard by shard.

    Parameters
    ----------
    shards : Shards
        Where the embeddings lie.
    locations : numpy.ndarray
        ``[chunks, 3]``, int64: chunk id, shard id, entry.
    """
    locations = locations[np.argsort(locations[:, 1], kind="stable")]
    shard_ids, starts = np.unique(locations[:, 1], return_index=True)
    for shard_id, group in zip(shard_ids.tolist(), np.split(locations, starts[1:]), strict=False):
        embeddings = shards.embeddings(shard_id)
        ids, entries = group[:, 0], group[:, 2]
        if entries.min() < 0 or entries.max() >= len(embeddings):
            raise LibraryError(f"the catalog names entries that shard {shard_id} does not have")
        yield ids, embeddings[entries]
