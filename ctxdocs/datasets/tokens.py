"""Token sequences on disk: one flat file and an index, read through a memory map."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ctxdocs.errors import DocumentError, InputError, StorageError

#: Token ids as they are stored: uint16, or uint32 for a vocabulary above 65,536.
TokenArray: TypeAlias = NDArray[np.uint16] | NDArray[np.uint32]
_HEADER_BYTES = 128


@dataclass(frozen=True)
class TokenSequences:
    """Many token sequences in one array.

    Parameters
    ----------
    tokens : numpy.ndarray
        uint16 or uint32 ``[total]``.
    offsets : numpy.ndarray
        int64 ``[sequences + 1]``: sequence ``i`` is ``tokens[offsets[i] : offsets[i + 1]]``.
    """

    tokens: TokenArray
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> TokenArray:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens per sequence, int64 ``[sequences]``."""
        return np.diff(self.offsets)

    @classmethod
    def pack(cls, sequences: Iterable[Sequence[int] | TokenArray], dtype: DTypeLike = np.uint16) -> TokenSequences:
        """Join sequences in memory; lists become arrays of ``dtype``, arrays keep theirs."""
        arrays = [item if isinstance(item, np.ndarray) else np.array(item, dtype=dtype) for item in sequences]
        offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int64)
        return cls(np.concatenate(arrays) if arrays else np.empty(0, dtype), offsets)

    def save(self, stem: str | Path) -> None:
        """Write ``stem.tokens.npy`` and ``stem.offsets.npy``."""
        with TokenWriter(stem, self.tokens.dtype) as writer:
            for index in range(len(self)):
                writer.add(self[index])

    @classmethod
    def load(cls, stem: str | Path) -> TokenSequences:
        """Map what :meth:`save` or a :class:`TokenWriter` wrote.

        Raises
        ------
        InputError
            If the files are not there.
        DocumentError
            If they are cut off, or do not belong together.
        """
        try:
            tokens, offsets = np.load(f"{stem}.tokens.npy", mmap_mode="r"), np.load(f"{stem}.offsets.npy")
        except FileNotFoundError as error:
            raise InputError(
                f"{error.filename}: no such file", "`python -m ctxdocs.datasets tokenize` writes it"
            ) from error
        except (OSError, ValueError, EOFError) as error:
            raise DocumentError(f"{stem}: damaged token files ({error})", "tokenise the texts again") from error
        if tokens.dtype not in (np.uint16, np.uint32) or not len(offsets) or offsets[-1] != len(tokens):
            raise DocumentError(f"{stem}: tokens and offsets do not belong together", "tokenise the texts again")
        return cls(tokens, offsets)


def token_dtype(vocabulary: int) -> np.dtype[Any]:
    """Return the smallest of uint16 and uint32 that holds every id of a vocabulary of that size."""
    return np.dtype(np.uint16 if vocabulary <= 2**16 else np.uint32)


class TokenWriter:
    """Writes sequences one behind the other, holding only their offsets in memory.

    Used as a context manager. The files take their names when the block ends without an error.

    Parameters
    ----------
    stem : path
        ``stem.tokens.npy`` and ``stem.offsets.npy`` are written.
    dtype : dtype
        uint16 or uint32; see :func:`token_dtype`.
    """

    def __init__(self, stem: str | Path, dtype: DTypeLike = np.uint16) -> None:
        self.stem = Path(stem)
        self.dtype = np.dtype(dtype)
        self._offsets = array("q", [0])
        self._partial = Path(f"{stem}.tokens.npy.part")
        self._file: IO[bytes] | None = None

    @property
    def sequences(self) -> int:
        """Sequences written so far."""
        return len(self._offsets) - 1

    @property
    def tokens(self) -> int:
        """Tokens written so far."""
        return self._offsets[-1]

    def add(self, sequence: Sequence[int] | TokenArray) -> None:
        """Append one sequence."""
        if self._file is None:
            raise InputError("this writer of tokens is not open", "use it as `with TokenWriter(...) as writer`")
        try:
            np.asarray(sequence, dtype=self.dtype).tofile(self._file)
        except OSError as error:
            raise self._failed(error) from error
        self._offsets.append(self._offsets[-1] + len(sequence))

    def __enter__(self) -> TokenWriter:
        try:
            self.stem.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._partial.open("wb")
            self._file.write(bytes(_HEADER_BYTES))
        except OSError as error:
            raise self._failed(error) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        if self._file is None:
            return
        offsets = Path(f"{self.stem}.offsets.npy.part")
        try:
            with self._file:
                self._file.seek(0)
                self._file.write(_header(self.dtype, self.tokens))
            self._file = None
            if kind is None:
                with offsets.open("wb") as file:
                    np.save(file, np.frombuffer(self._offsets, dtype=np.int64))
                self._partial.replace(self._partial.with_suffix(""))
                offsets.replace(offsets.with_suffix(""))
        except OSError as error:
            raise self._failed(error) from error
        finally:
            self._partial.unlink(missing_ok=True)
            offsets.unlink(missing_ok=True)

    def _failed(self, error: OSError) -> StorageError:
        return StorageError(f"{self.stem}: tokens cannot be written ({error.strerror or error})")


def _header(dtype: np.dtype[Any], count: int) -> bytes:
    """Return a .npy header of a fixed size: the count is known only when all is written."""
    text = f"{{'descr': {dtype.str!r}, 'fortran_order': False, 'shape': ({count},), }}".encode()
    body = text.ljust(_HEADER_BYTES - 11) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body
