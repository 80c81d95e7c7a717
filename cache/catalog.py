"""``catalog.sqlite`` as its readers see it: only what is committed and finished."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctxdocs.cache.records import StoredChunk, StoredDocument
from ctxdocs.cache.schema import VERSION
from ctxdocs.errors import LibraryError

BUSY_SECONDS = 30
PAGE = 1000

_CHUNK_COLUMNS = ", ".join(
    "documents.uri" if field.name == "uri" else f'chunks."{field.name}"' for field in fields(StoredChunk)
)
_DOCUMENT_COLUMNS = ", ".join(field.name for field in fields(StoredDocument))


@dataclass(frozen=True)
class Changes:
    """How the visible chunks of a library differ from an earlier revision.

    Parameters
    ----------
    revision : int
        The revision they lead to.
    added : numpy.ndarray
        ``[chunks, 3]``, int64: chunk id, shard id, entry.
    removed : numpy.ndarray or None
        ``[chunks]``, int64. None if the catalog no longer knows: then ``added`` names all chunks there are.
    """

    revision: int
    added: NDArray[np.int64]
    removed: NDArray[np.int64] | None


class Catalog:
    """One connection to a catalog, usable from any thread."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self._path = path
        self._connection = connection
        self._lock = threading.RLock()

    @classmethod
    def open(cls, path: Path) -> Catalog:
        """Open a catalog for reading.

        Where neither the file nor its folder can be written, SQLite cannot follow a writer: such a reader sees the
        catalog as it is now, and must be opened again to see more.
        """
        if not path.is_file():
            raise LibraryError(f"{path} is missing", "restore it from a copy, or create the library anew")
        modes = ["mode=ro"] if os.access(path.parent, os.W_OK) else ["mode=ro", "immutable=1"]
        for mode in modes:
            catalog = cls(path, connect(f"{path.absolute().as_uri()}?{mode}"))
            try:
                catalog._check_version()
                break
            except LibraryError:
                catalog.close()
                if mode == modes[-1]:
                    raise
        return catalog

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            self._connection.close()

    def revision(self) -> int:
        """Return a number that grows with every commit that readers can see."""
        return self._one("SELECT revision FROM state")[0]

    def writer(self) -> str | None:
        """Return who last opened the library for writing."""
        return self._one("SELECT writer FROM state")[0]

    def changes(self, since: int) -> Changes:
        """Return how the visible chunks changed after revision ``since`` (-1: all there are)."""
        with self._lock, self._snapshot():
            revision, known_from = self._one("SELECT revision, removals_from FROM state")
            removed = None
            if since >= known_from:
                removed = self._numbers("SELECT chunk_id FROM removals WHERE revision > ?", (since,), 1)[:, 0]
            added = self._numbers(
                "SELECT id, shard_id, entry FROM chunks WHERE revision > ?", (-1 if removed is None else since,), 3
            )
        return Changes(revision, added, removed)

    def totals(self) -> tuple[int, int, int, int, int]:
        """Return the numbers of documents, chunks, tokens, slots and memory bytes."""
        return self._one(
            "SELECT count(*), total(chunks), total(tokens), total(slots), total(nbytes) "
            "FROM documents WHERE revision IS NOT NULL"
        )

    def has_documents(self) -> bool:
        """Return whether there is any document."""
        return bool(self._one("SELECT EXISTS (SELECT 1 FROM documents WHERE revision IS NOT NULL)")[0])

    def documents(self) -> Iterator[StoredDocument]:
        """Yield the documents in the order they were added, a page at a time."""
        last = 0
        while rows := self._rows(
            f"SELECT {_DOCUMENT_COLUMNS} FROM documents WHERE id > ? AND revision IS NOT NULL ORDER BY id LIMIT ?",
            (last, PAGE),
        ):
            yield from map(self._document, rows)
            last = rows[-1][0]

    def document(self, uri: str) -> StoredDocument | None:
        """Return the document of that name."""
        rows = self._rows(f"SELECT {_DOCUMENT_COLUMNS} FROM documents WHERE uri = ? AND revision IS NOT NULL", (uri,))
        return self._document(rows[0]) if rows else None

    def digests(self) -> dict[str, str]:
        """Return the sha256 of every document by its name."""
        return dict(self._rows("SELECT uri, sha256 FROM documents WHERE revision IS NOT NULL"))

    def chunks(self, ids: Iterable[int]) -> list[StoredChunk]:
        """Return chunks in the order of ``ids``, without those that are gone."""
        wanted = [int(number) for number in ids]
        rows = self._rows(
            f"SELECT {_CHUNK_COLUMNS} FROM json_each(?) AS wanted JOIN chunks ON chunks.id = wanted.value "
            "JOIN documents ON documents.id = chunks.document_id WHERE chunks.revision IS NOT NULL",
            (json.dumps(sorted(set(wanted))),),
        )
        found = {row[0]: StoredChunk(*row) for row in rows}
        return [found[number] for number in wanted if number in found]

    def chunk_ids(self, uris: Iterable[str]) -> NDArray[np.int64]:
        """Return the ids of the chunks of some documents, document by document, in order."""
        return self._numbers(
            "SELECT chunks.id FROM json_each(?) AS wanted JOIN documents ON documents.uri = wanted.value "
            "JOIN chunks ON chunks.document_id = documents.id "
            "WHERE documents.revision IS NOT NULL ORDER BY wanted.key, chunks.ordinal",
            (json.dumps(list(uris)),),
            1,
        )[:, 0]

    def matching(self, query: str, k: int, allowed: Collection[int] | None) -> list[tuple[int, float]]:
        """Return up to ``k`` ``(chunk id, BM25 score)``, best first, of chunks sharing a word with ``query``."""
        # Quoted, a word cannot be an operator of the query language; \w holds no quotes.
        words = dict.fromkeys(re.findall(r"\w+", query.lower()))
        if not words or k < 1:
            return []
        condition, parameters = "", [" OR ".join(f'"{word}"' for word in words)]
        if allowed is not None:
            condition = "AND rowid IN (SELECT value FROM json_each(?))"
            parameters.append(json.dumps([int(number) for number in allowed]))
        rows = self._rows(
            f"SELECT rowid, -rank FROM passages WHERE passages MATCH ? {condition} ORDER BY rank LIMIT ?",
            (*parameters, k),
        )
        return [(number, score) for number, score in rows]

    def _document(self, row: Sequence[Any]) -> StoredDocument:
        document = dict(zip((field.name for field in fields(StoredDocument)), row, strict=True))
        try:
            document["metadata"] = json.loads(document["metadata"])
        except (TypeError, ValueError) as error:
            raise self._damaged(error) from error
        return StoredDocument(**document)

    def _rows(self, query: str, parameters: Sequence[Any] = ()) -> list[Any]:
        with self._lock:
            try:
                return self._connection.execute(query, parameters).fetchall()
            except (sqlite3.Error, OverflowError, UnicodeEncodeError) as error:
                raise self._damaged(error) from error

    def _one(self, query: str) -> Any:
        rows = self._rows(query)
        if len(rows) != 1:
            raise self._damaged(f"{len(rows)} rows where one belongs")
        return rows[0]

    def _numbers(self, query: str, parameters: Sequence[Any], columns: int) -> NDArray[np.int64]:
        rows = self._rows(query, parameters)
        try:
            return np.array(rows, dtype=np.int64).reshape(-1, columns)
        except (TypeError, ValueError, OverflowError) as error:
            raise self._damaged(error) from error

    def _snapshot(self) -> Transaction:
        return Transaction(self._connection, "BEGIN")

    def _check_version(self) -> None:
        version = self._one("PRAGMA user_version")[0]
        if version != VERSION:
            raise self._damaged(f"its schema version is {version}, not {VERSION}")
        self.revision()

    def _damaged(self, reason: object) -> LibraryError:
        return LibraryError(f"{self._path} cannot be read: {reason}", "restore it from a copy")


class Transaction:
    """``with`` block that commits at its end and rolls back when it fails."""

    def __init__(self, connection: sqlite3.Connection, begin: str) -> None:
        self._connection = connection
        self._begin = begin

    def __enter__(self) -> None:
        self._connection.execute(self._begin)

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._connection.execute("COMMIT")
        finally:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")


def connect(uri: str) -> sqlite3.Connection:
    """Open a database by its SQLite URI, in autocommit mode, for use from any thread."""
    try:
        return sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    except sqlite3.Error as error:
        raise LibraryError(f"{uri} cannot be opened: {error}") from error
