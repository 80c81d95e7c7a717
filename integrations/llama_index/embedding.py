"""An embedder of ctxdocs as LlamaIndex's: for indices that shall search as a library does."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from pydantic import PrivateAttr

from ctxdocs.embedding import Embedder, load_embedder


class MemoryEmbedding(BaseEmbedding):
    """What a library embeds with, as a LlamaIndex ``BaseEmbedding``.

    The other way round, :meth:`ctxdocs.Library.create` takes any LlamaIndex embedding as its ``embedder``.

    Parameters
    ----------
    embedder : object or str or path, optional
        As in :func:`ctxdocs.embedding.load_embedder`; default all-MiniLM-L6-v2, offline if it is installed.
    device : str, optional
        Where a named model runs.
    **settings
        Other parameters of ``BaseEmbedding``, such as ``embed_batch_size``.
    """

    _embedder: Embedder = PrivateAttr()
    _lock: Any = PrivateAttr(default_factory=threading.Lock)

    def __init__(self, embedder: object | str | Path | None = None, device: str | None = None, **settings: Any) -> None:
        loaded = load_embedder(embedder, device)
        super().__init__(**{"embed_batch_size": 64, "model_name": loaded.name, **settings})
        self._embedder = loaded

    @classmethod
    def class_name(cls) -> str:
        """Return the name in serialised objects."""
        return "MemoryEmbedding"

    def _get_query_embedding(self, query: str) -> list[float]:
        with self._lock:
            return self._embedder.embed_queries([query])[0].tolist()

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        with self._lock:
            return self._embedder.embed_documents(texts).tolist()

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.to_thread(self._get_query_embedding, query)

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return await asyncio.to_thread(self._get_text_embedding, text)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)
