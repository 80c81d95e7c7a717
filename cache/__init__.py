"""A library on disk: documents, chunks and their memories, kept durably and found again.

:class:`Store` reads a library, from any number of processes; :class:`Writer` is the one that changes it. The format
is described in ``docs/library-format.md``.
"""

from __future__ import annotations

from ctxdocs.cache.codecs import CODECS
from ctxdocs.cache.manifest import Manifest
from ctxdocs.cache.records import Counts, NewChunk, StoredChunk, StoredDocument
from ctxdocs.cache.store import Store
from ctxdocs.cache.writer import Writer

__all__ = ["CODECS", "Counts", "Manifest", "NewChunk", "Store", "StoredChunk", "StoredDocument", "Writer"]
