"""Names of the files in a library's folder."""

from __future__ import annotations

MANIFEST = "manifest.json"
CATALOG = "catalog.sqlite"
MEMORIES = "memories"
INDEX = "index.faiss"
LOCK = "write.lock"
REFERENCE_KEY = "references.key"
