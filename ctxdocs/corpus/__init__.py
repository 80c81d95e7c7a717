"""Files become documents, documents become chunks.

:func:`find_files` lists what lies under the given paths, :func:`load_document` reads one file,
:class:`Chunker` cuts its text into token-sized pieces.
"""

from ctxdocs.corpus.chunking import Chunk, Chunker
from ctxdocs.corpus.documents import MAX_BYTES, Document, SourceFile, file_digest, find_files, load_document
from ctxdocs.corpus.formats import SUFFIXES

__all__ = [
    "MAX_BYTES",
    "SUFFIXES",
    "Chunk",
    "Chunker",
    "Document",
    "SourceFile",
    "file_digest",
    "find_files",
    "load_document",
]
