"""An embedder of ctxdocs as LangChain's: for vector stores that shall search as a library does."""

from __future__ import annotations

import threading
from pathlib import Path

from langchain_core.embeddings import Embeddings

from ctxdocs.embedding import load_embedder


class MemoryEmbeddings(Embeddings):
    """What a library embeds with, as LangChain ``Embeddings``.

    The other way round, :meth:`ctxdocs.Library.create` takes any LangChain ``Embeddings`` as its ``embedder``.

    Parameters
    ----------
    embedder : object or str or path, optional
        As in :func:`ctxdocs.embedding.load_embedder`; default all-MiniLM-L6-v2, offline if it is installed.
    device : str, optional
        Where a named model runs.
    """

    def __init__(self, embedder: object | str | Path | None = None, device: str | None = None) -> None:
        self.embedder = load_embedder(embedder, device)
        self._lock = threading.Lock()

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Return the vectors of texts to be found."""
        with self._lock:
            return self.embedder.embed_documents(texts).tolist()

    def embed_query(self, text: str) -> list[float]:
        """Return the vector of a text to search with."""
        with self._lock:
            return self.embedder.embed_queries([text])[0].tolist()
