"""``catalog.sqlite`` as its one writer changes it."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctxdocs.cache.catalog import Catalog, Transaction, connect
from ctxdocs.cache.schema import SCHEMA
from ctxdocs.errors import InputError


@dataclass(frozen=True)
class DocumentRow:
    """A document that was begun: the columns its row starts with."""

    id: int
    uri: str
    sha256: str
    metadata: str
    added_at: str


class Ledger(Catalog):
    """A catalog open for writing. Every method that changes it is one transaction."""

    @classmethod
    def create(cls, path: Path) -> None:
        """Make an empty catalog."""
        connection = connect(path.absolute().as_uri())
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.executescript(f"BEGIN; {SCHEMA} COMMIT;")
        finally:
            connection.close()

    @classmethod
    def open(cls, path: Path) -> Ledger:
        """Open a catalog for writing; the caller holds the lock of the library."""
        ledger = cls(path, connect(f"{path.absolute().as_uri()}?mode=rw"))
        try:
            ledger._check_version()
            # Ids are never used again, not even after a power cut: what is committed must be on the disk.
            for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
                ledger._connection.execute(f"PRAGMA {pragma}")
        except BaseException:
            ledger.close()
            raise
        return ledger

    def next_id(self, table: str) -> int:
        """Return the first id of ``documents`` or ``shards`` that was never used."""
        rows = self._rows("SELECT seq FROM sqlite_sequence WHERE name = ?", (table,))
        return rows[0][0] + 1 if rows else 1

    def start(self, writer: str) -> None:
        """Note who writes, and drop what the writer before may have left unfinished."""
        with self._transaction():
            self._connection.execute("UPDATE state SET writer = ?", (writer,))
            self._drop_unfinished()

    def drop_unfinished(self) -> None:
        """Drop pending documents, and the shards that no chunk lies in any more."""
        with self._transaction():
            self._drop_unfinished()

    def shards(self) -> list[int]:
        """Return the ids of all shards."""
        return [row[0] for row in self._rows("SELECT id FROM shards")]

    def write(
        self,
        documents: Iterable[DocumentRow],
        shard_id: int | None,
        chunks: Sequence[Mapping[str, Any]],
        finished: Collection[int],
    ) -> None:
        """Add a shard with its chunks; make the ``finished`` documents visible and drop what they replace.

        Parameters
        ----------
        documents : iterable of DocumentRow
            The documents concerned; those written before are passed over.
        shard_id : int or None
            None if there are no chunks.
        chunks : sequence of mappings
            Values by column, entry by entry.
        finished : collection of int
            Document ids.
        """
        with self._transaction():
            self._connection.executemany(
                "INSERT INTO documents (id, uri, sha256, metadata, added_at) VALUES (?, ?, ?, ?, ?) "
                "ON CONFLICT (id) DO NOTHING",
                [(row.id, row.uri, row.sha256, row.metadata, row.added_at) for row in documents],
            )
            revision = self._next_revision() if finished else None
            if shard_id is not None:
                visible = set(finished)
                revisions = [revision if chunk["document_id"] in visible else None for chunk in chunks]
                self._insert(shard_id, chunks, revisions)
            for document_id in finished:
                self._finish(document_id, revision)

    def remove(self, uris: Iterable[str]) -> int:
        """Remove documents; return how many there were."""
        with self._transaction():
            self._next_revision()
            return self._connection.executemany(
                "DELETE FROM documents WHERE revision IS NOT NULL AND uri = ?", [(uri,) for uri in uris]
            ).rowcount

    def holey_shards(self) -> list[tuple[int, int]]:
        """Return ``(shard id, bytes in use)`` of the shards some of whose memories are no longer in use."""
        return self._rows(
            "SELECT shards.id, sum(chunks.nbytes) FROM shards JOIN chunks ON chunks.shard_id = shards.id "
            "GROUP BY shards.id HAVING count(*) < shards.entries"
        )

    def entries(self, shard_ids: Iterable[int]) -> list[tuple[int, int, int]]:
        """Return ``(chunk id, shard id, entry)`` of every chunk that lies in the shards, pending ones too."""
        return self._rows(
            "SELECT id, shard_id, entry FROM chunks WHERE shard_id IN (SELECT value FROM json_each(?)) ORDER BY id",
            (json.dumps(list(shard_ids)),),
        )

    def move(self, chunk_ids: Sequence[int], shard_id: int, emptied: Iterable[int]) -> None:
        """Let chunks lie in a new shard, in order, and forget the shards they came from."""
        with self._transaction():
            self._connection.execute("INSERT INTO shards VALUES (?, ?)", (shard_id, len(chunk_ids)))
            self._connection.executemany(
                "UPDATE chunks SET shard_id = ?, entry = ? WHERE id = ?",
                [(shard_id, entry, chunk_id) for entry, chunk_id in enumerate(chunk_ids)],
            )
            self._connection.executemany("DELETE FROM shards WHERE id = ?", [(number,) for number in emptied])

    def vacuum(self) -> None:
        """Forget shards that no chunk lies in, forget removals, and give unused pages of the file back.

        Readers that have not seen the removals yet compare all ids once.
        """
        with self._transaction():
            self._drop_empty_shards()
            self._connection.execute("DELETE FROM removals")
            self._connection.execute("UPDATE state SET removals_from = revision")
            self._connection.execute("INSERT INTO passages (passages) VALUES ('optimize')")
        self._connection.execute("VACUUM")
        self.checkpoint()

    def checkpoint(self) -> None:
        """Move the write-ahead log into the file, as far as readers allow."""
        self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _next_revision(self) -> int:
        return self._connection.execute("UPDATE state SET revision = revision + 1 RETURNING revision").fetchone()[0]

    def _insert(self, shard_id: int, chunks: Sequence[Mapping[str, Any]], revisions: Sequence[int | None]) -> None:
        self._connection.execute("INSERT INTO shards VALUES (?, ?)", (shard_id, len(chunks)))
        columns = [*chunks[0], "shard_id", "entry", "revision"]
        names, places = ", ".join(f'"{column}"' for column in columns), ", ".join("?" * len(columns))
        try:
            self._connection.executemany(
                f"INSERT INTO chunks ({names}) VALUES ({places})",
                [
                    (*chunk.values(), shard_id, entry, revision)
                    for entry, (chunk, revision) in enumerate(zip(chunks, revisions, strict=True))
                ],
            )
        except sqlite3.IntegrityError as error:
            raise InputError("two chunks of a document have the same ordinal") from error

    def _finish(self, document_id: int, revision: int | None) -> None:
        for statement in (
            # Its predecessor goes first: two visible documents of one name cannot be.
            "DELETE FROM documents WHERE revision IS NOT NULL AND uri = (SELECT uri FROM documents WHERE id = :id)",
            "UPDATE chunks SET revision = :revision WHERE document_id = :id AND revision IS NULL",
            "UPDATE documents SET revision = :revision, (chunks, tokens, slots, nbytes) = ("
            "SELECT count(*), coalesce(sum(tokens), 0), coalesce(sum(slots), 0), coalesce(sum(nbytes), 0) "
            "FROM chunks WHERE document_id = :id) WHERE id = :id",
        ):
            self._connection.execute(statement, {"id": document_id, "revision": revision})

    def _drop_unfinished(self) -> None:
        self._connection.execute("DELETE FROM documents WHERE revision IS NULL")
        self._drop_empty_shards()

    def _drop_empty_shards(self) -> None:
        self._connection.execute(
            "DELETE FROM shards WHERE NOT EXISTS (SELECT 1 FROM chunks WHERE shard_id = shards.id)"
        )

    def _transaction(self) -> Transaction:
        return Transaction(self._connection, "BEGIN IMMEDIATE")
