"""A LlamaIndex query engine over a library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_index.core.callbacks import CallbackManager
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.vector_stores.types import MetadataFilters

from ctxdocs.integrations.llama_index.retriever import CompressedMemoryRetriever
from ctxdocs.integrations.llama_index.synthesizer import CompressedMemorySynthesizer
from ctxdocs.library import Library
from ctxdocs.sharing import shared_library


class CompressedMemoryQueryEngine(RetrieverQueryEngine):
    """Answers queries from a library, as :meth:`ctxdocs.Library.ask` does, the sources as nodes beside the answer.

    It is LlamaIndex's ``RetrieverQueryEngine``, which takes any retriever and a
    :class:`~ctxdocs.integrations.llama_index.CompressedMemorySynthesizer`, with both made by :meth:`from_library`.
    """

    @classmethod
    def from_library(
        cls,
        library: Library | str | Path,
        k: int = 4,
        *,
        retrieval: str = "hybrid",
        rerank: str = "none",
        filters: MetadataFilters | Mapping[str, Any] | None = None,
        streaming: bool = False,
        node_postprocessors: Sequence[BaseNodePostprocessor] = (),
        callback_manager: CallbackManager | None = None,
        **options: Any,
    ) -> CompressedMemoryQueryEngine:
        """Return the query engine of a library.

        Parameters
        ----------
        library, k, retrieval, rerank, filters
            As in :class:`~ctxdocs.integrations.llama_index.CompressedMemoryRetriever`.
        streaming : bool
            Whether to answer piece by piece.
        node_postprocessors : sequence of BaseNodePostprocessor
            What nodes pass between being found and being read.
        callback_manager : CallbackManager, optional
            LlamaIndex's.
        **options
            Parameters of :class:`~ctxdocs.integrations.llama_index.CompressedMemoryLLM`, such as ``max_new_tokens``.

        Raises
        ------
        LibraryError
            If there is no library.
        InputError
            If a setting is out of range.
        """
        shared = shared_library(library)
        return cls(
            CompressedMemoryRetriever(
                shared, k, retrieval=retrieval, rerank=rerank, filters=filters, callback_manager=callback_manager
            ),
            CompressedMemorySynthesizer(shared, streaming=streaming, callback_manager=callback_manager, **options),
            node_postprocessors=list(node_postprocessors),
            callback_manager=callback_manager,
        )
