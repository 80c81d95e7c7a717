"""Finding files and reading them as documents."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ctxdocs.corpus.formats import SUFFIXES, read_text
from ctxdocs.errors import DocumentError, InputError

MAX_BYTES = 64 * 2**20
"""Largest file :func:`load_document` reads unless told otherwise, in bytes."""

_BLOCK = 2**20


@dataclass(frozen=True)
class Document:
    """A text and where it came from.

    Parameters
    ----------
    uri : str
        Identifies the document in a library; the absolute path for a file.
    text : str
        The whole text.
    sha256 : str
        Digest of the raw bytes of a file, or of the UTF-8 text of a document given from Python.
    metadata : dict
        Values that JSON can hold: ``format``, ``bytes`` and, where known, ``title``, ``encoding``, ``pages``.
    """

    uri: str
    text: str
    sha256: str
    metadata: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_text(cls, text: str, uri: str, metadata: dict[str, Any] | None = None) -> Document:
        """Make a document of a text that lies in no file.

        Raises
        ------
        InputError
            If the text is blank or holds lone surrogates, which no encoding can store.
        """
        if not text.strip():
            raise InputError(f"document {uri!r} has no text")
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"document {uri!r} holds a lone surrogate at character {error.start}",
                "decode the text with errors='replace'",
            ) from error
        return cls(uri, text, hashlib.sha256(data).hexdigest(), dict(metadata or {}))


@dataclass(frozen=True)
class SourceFile:
    """A file found by :func:`find_files`.

    Parameters
    ----------
    path : pathlib.Path
        Absolute, with symbolic links resolved.
    uri : str
        The same path with forward slashes.
    """

    path: Path
    uri: str

    @classmethod
    def from_path(cls, path: str | Path) -> SourceFile:
        """Resolve a path, relative or not."""
        resolved = Path(path).resolve()
        return cls(resolved, resolved.as_posix())


def find_files(paths: str | Path | Iterable[str | Path], *, suffixes: Iterable[str] | None = None) -> list[SourceFile]:
    """List the documents under files and folders, each once, in a stable order.

    Folders are searched recursively; hidden entries, broken links and link loops are skipped. A file that is
    named itself is listed whatever its suffix.

    Parameters
    ----------
    paths : path or iterable of paths
        Files and folders.
    suffixes : iterable of str, optional
        Suffixes taken from folders, such as ``[".md"]``; by default every suffix in :data:`SUFFIXES`.

    Returns
    -------
    list of SourceFile
        In the order of ``paths``, sorted inside each folder; empty if the folders hold nothing suitable.

    Raises
    ------
    InputError
        If a path does not exist or a folder cannot be listed.
    """
    wanted = frozenset(suffix.lower() for suffix in (SUFFIXES if suffixes is None else suffixes))
    found: dict[Path, SourceFile] = {}
    for path in map(Path, [paths] if isinstance(paths, str | Path) else paths):
        if path.is_dir():
            candidates: Iterable[Path] = (file for file in _walk(path) if file.suffix.lower() in wanted)
        elif path.is_file():
            candidates = [path]
        elif path.exists():
            raise InputError(f"{path}: neither a file nor a folder")
        else:
            raise InputError(f"{path}: no such file or folder", "check the spelling")
        for candidate in candidates:
            source = SourceFile.from_path(candidate)
            found.setdefault(source.path, source)
    return list(found.values())


def _walk(folder: Path) -> Iterator[Path]:
    # A folder that cannot be listed must not look empty: pruning would then drop its documents from a library.
    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: the folder cannot be listed ({error.strerror})") from error

    visited: set[str] = set()
    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            file = Path(parent, name)
            if not name.startswith(".") and file.is_file():
                yield file


def file_digest(path: str | Path) -> str:
    """Return the sha256 of a file's bytes: equal to ``load_document(path).sha256``, without parsing.

    Raises
    ------
    DocumentError
        If the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with Path(path).open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise _unreadable(path, error) from error
    return digest.hexdigest()


def load_document(source: SourceFile | str | Path, *, max_bytes: int = MAX_BYTES) -> Document:
    """Read a file as a document; the suffix decides the format, an unknown one is tried as plain text.

    Parameters
    ----------
    source : SourceFile or path
        The file.
    max_bytes : int, optional
        Size in bytes above which a file is refused.

    Raises
    ------
    DocumentError
        If the file is unreadable, too large, empty, binary, damaged, encrypted or without text, or if its format
        needs a package that is not installed; the hint then names the extra.
    """
    if not isinstance(source, SourceFile):
        source = SourceFile.from_path(source)
    path = source.path
    try:
        with path.open("rb") as file:
            # One byte more than allowed tells a file that is too large, even one still growing.
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise _unreadable(path, error) from error
    if len(data) > max_bytes:
        raise DocumentError(f"{path}: larger than {max_bytes:,} bytes", "split the file or raise max_bytes")
    if not data:
        raise DocumentError(f"{path}: the file is empty")
    try:
        source.uri.encode()
    except UnicodeEncodeError as error:  # a name of bytes that are no text cannot be written to a catalog
        raise DocumentError(f"{source.uri!r}: the file's name is not valid text", "rename the file") from error
    text, metadata = read_text(path, data)
    if not text.strip():
        raise DocumentError(f"{path}: no text in it", "scanned pages need character recognition first")
    return Document(source.uri, text, hashlib.sha256(data).hexdigest(), metadata | {"bytes": len(data)})


def _unreadable(path: str | Path, error: OSError) -> DocumentError:
    return DocumentError(f"{path}: cannot be read ({error.strerror or error})")
