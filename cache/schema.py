"""Tables of ``catalog.sqlite``."""

from __future__ import annotations

VERSION = 1

# Documents and chunks without a revision are pending: written, but not yet part of a finished document. The triggers
# keep the full-text index and the list of removals in step with the chunks that have one.
SCHEMA = f"""
CREATE TABLE state (
    id            INTEGER PRIMARY KEY CHECK (id = 1),
    revision      INTEGER NOT NULL,
    removals_from INTEGER NOT NULL,
    writer        TEXT
);
INSERT INTO state VALUES (1, 0, 0, NULL);

CREATE TABLE documents (
    id       INTEGER PRIMARY KEY AUTOINCREMENT,
    uri      TEXT NOT NULL,
    sha256   TEXT NOT NULL,
    metadata TEXT NOT NULL,
    added_at TEXT NOT NULL,
    chunks   INTEGER NOT NULL DEFAULT 0,
    tokens   INTEGER NOT NULL DEFAULT 0,
    slots    INTEGER NOT NULL DEFAULT 0,
    nbytes   INTEGER NOT NULL DEFAULT 0,
    revision INTEGER
);
CREATE UNIQUE INDEX documents_by_uri ON documents (uri) WHERE revision IS NOT NULL;
CREATE INDEX pending_documents ON documents (id) WHERE revision IS NULL;

CREATE TABLE shards (
    id      INTEGER PRIMARY KEY AUTOINCREMENT,
    entries INTEGER NOT NULL
);

CREATE TABLE chunks (
    id            INTEGER PRIMARY KEY AUTOINCREMENT,
    document_id   INTEGER NOT NULL REFERENCES documents (id) ON DELETE CASCADE,
    ordinal       INTEGER NOT NULL,
    start         INTEGER NOT NULL,
    "end"         INTEGER NOT NULL,
    tokens        INTEGER NOT NULL,
    kind          TEXT NOT NULL,
    dtype         TEXT NOT NULL,
    slots         INTEGER NOT NULL,
    span          INTEGER NOT NULL,
    source_tokens INTEGER NOT NULL,
    nbytes        INTEGER NOT NULL,
    shard_id      INTEGER NOT NULL REFERENCES shards (id),
    entry         INTEGER NOT NULL,
    revision      INTEGER,
    text          TEXT NOT NULL,
    UNIQUE (document_id, ordinal)
);
CREATE INDEX chunks_by_shard ON chunks (shard_id);
CREATE INDEX chunks_by_revision ON chunks (revision, shard_id, entry);

CREATE TABLE removals (
    chunk_id INTEGER PRIMARY KEY,
    revision INTEGER NOT NULL
);
CREATE INDEX removals_by_revision ON removals (revision);

CREATE VIRTUAL TABLE passages USING fts5 (
    text, content = 'chunks', content_rowid = 'id', tokenize = 'porter unicode61 remove_diacritics 2'
);
CREATE TRIGGER chunk_written AFTER INSERT ON chunks WHEN new.revision IS NOT NULL BEGIN
    INSERT INTO passages (rowid, text) VALUES (new.id, new.text);
END;
CREATE TRIGGER chunk_finished AFTER UPDATE OF revision ON chunks WHEN old.revision IS NULL BEGIN
    INSERT INTO passages (rowid, text) VALUES (new.id, new.text);
END;
CREATE TRIGGER chunk_removed AFTER DELETE ON chunks WHEN old.revision IS NOT NULL BEGIN
    INSERT INTO passages (passages, rowid, text) VALUES ('delete', old.id, old.text);
    INSERT INTO removals VALUES (old.id, (SELECT revision FROM state));
END;

PRAGMA user_version = {VERSION};
"""
