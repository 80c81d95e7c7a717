"""References: short strings that stand for memories of a library where only text can pass.

Frameworks hand prompts on as strings, so a memory travels through templates, callbacks and other people's code as a
reference, and becomes the memory again where the prompt is read. A reference carries a keyed digest (HMAC-SHA256), so
that nobody can write one who does not hold the library's key: text that merely looks like a reference stays text, and
reads nothing.

The key lies in the library's folder, ``references.key``, readable by its owner only; it is made when the first
reference is written or read. So a reference is good wherever the same library is opened by the same user, in any
process, and nowhere else. Where the folder cannot be written, references are good within the process.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ctxdocs.cache.layout import REFERENCE_KEY
from ctxdocs.errors import InputError, LibraryError

if TYPE_CHECKING:
    from ctxdocs.cache import Store, StoredChunk

logger = logging.getLogger(__name__)

# No character in it means anything to f-strings, Jinja2, mustache, JSON, HTML or Markdown links without a target.
_REFERENCE = re.compile(r"\[\[memory:([0-9]{1,18}:[0-9a-f]{16}):([0-9a-f]{32})\]\]")
_BEGINNING = "[[memory:"
_KEY_BYTES = 32

_lock = threading.Lock()
_process_key = secrets.token_bytes(_KEY_BYTES)
#: Keys in use in this process by the library's resolved folder: a reference to the wrong library can be told.
_keys: dict[Path, bytes] = {}


class Chunk(Protocol):
    """What a reference is made of: a ``Hit`` of a search, or a ``StoredChunk``."""

    @property
    def id(self) -> int:
        """The chunk's number in the library."""

    @property
    def text(self) -> str:
        """The chunk's text."""


class References:
    """Writes and reads the references of one library.

    Parameters
    ----------
    store : Store
        The library's.

    Raises
    ------
    LibraryError
        If the library's key is damaged.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._folder = store.path.resolve()
        self._key = _key_of(self._folder)
        with _lock:
            _keys[self._folder] = self._key

    def write(self, chunk: Chunk) -> str:
        """Return the reference to a chunk's memory."""
        name = f"{chunk.id}:{_digest_of(chunk.text)}"
        return f"[[memory:{name}:{_signature(self._key, name)}]]"

    def read(self, text: str) -> list[str | StoredChunk]:
        """Take a text apart at the references that stand in it.

        Parameters
        ----------
        text : str
            Any text.

        Returns
        -------
        list of str or StoredChunk
            Stretches of text, none empty, and the chunks referred to, in order. What looks like a reference and was
            not written by this library is text.

        Raises
        ------
        LibraryError
            If a chunk referred to is no longer in the library.
        InputError
            If a reference was written by another library of this process.
        """
        parts: list[str] = []
        start = strange = 0
        for found in _REFERENCE.finditer(text):
            name, signature = found.groups()
            if not hmac.compare_digest(_signature(self._key, name), signature):
                self._refuse_other_libraries(name, signature)
                strange += 1
                continue
            parts += [text[start : found.start()], name]
            start = found.end()
        parts.append(text[start:])
        if strange:
            logger.warning(
                "text that looks like %d reference%s to memories was not written by the library %s and is read as text",
                strange,
                "s" * (strange != 1),
                self._store.path,
            )
        if cut := text.count(_BEGINNING) - len(parts) // 2 - strange:
            logger.warning(
                "text begins like a reference to a memory and goes on otherwise (%d); it is read as text. "
                "If something cuts or rewrites prompts, memories are lost there",
                cut,
            )
        texts, chunks = parts[::2], self._chunks(parts[1::2])
        woven: list[str | StoredChunk] = []
        for index, stretch in enumerate(texts):
            woven += [stretch] if stretch else []
            woven += chunks[index : index + 1]
        return woven

    def _chunks(self, names: list[str]) -> list[StoredChunk]:
        """Return the chunks of genuine references."""
        wanted = [(int(number), digest) for number, _, digest in (name.partition(":") for name in names)]
        there = {chunk.id: chunk for chunk in self._store.chunks(number for number, _ in wanted)}
        chunks = []
        for number, digest in wanted:
            chunk = there.get(number)
            # A library that was restored from a copy may have given the number to another text.
            if chunk is None or _digest_of(chunk.text) != digest:
                raise LibraryError(
                    f"the prompt refers to chunk {number}, which is no longer in the library {self._store.path}",
                    "search again; an index outside the library has to be built anew",
                )
            chunks.append(chunk)
        return chunks

    def _refuse_other_libraries(self, name: str, signature: str) -> None:
        with _lock:
            others = [(folder, key) for folder, key in _keys.items() if folder != self._folder]
        for folder, key in others:
            if hmac.compare_digest(_signature(key, name), signature):
                raise InputError(
                    f"the prompt refers to a memory of the library {folder}, and is read by {self._store.path}",
                    "give the retriever and the model the same library",
                )


def _signature(key: bytes, name: str) -> str:
    return hmac.new(key, name.encode(), hashlib.sha256).hexdigest()[:32]


def _digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _key_of(folder: Path) -> bytes:
    """Return a library's key, made now if there is none; where it cannot be kept, one of this process."""
    path = folder / REFERENCE_KEY
    try:
        if not path.exists():
            _make_key(path)
        key = path.read_bytes()
        if os.name == "posix" and path.stat().st_mode & 0o077:
            logger.warning("%s can be read by others, who can then forge references: chmod 600 it", path)
    except OSError as error:
        logger.info("%s: %s; references are good within this process only", path, error)
        return hmac.new(_process_key, os.fsencode(folder), hashlib.sha256).digest()
    if len(key) != _KEY_BYTES:
        raise LibraryError(
            f"{path} is damaged: it holds {len(key)} bytes, not {_KEY_BYTES}",
            "delete it; another key is made, and references that were written before are no longer read",
        )
    return key


def _make_key(path: Path) -> None:
    """Write a key that only its owner can read; one that another process wrote meanwhile stays."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(_KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)  # unlike a rename, it replaces nothing
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
