"""A LlamaIndex retriever over a library: nodes that bring their memories along."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.callbacks import CallbackManager
from llama_index.core.schema import NodeWithScore, QueryBundle
from llama_index.core.vector_stores.types import MetadataFilters
from llama_index.core.vector_stores.utils import build_metadata_filter_fn

from ctxdocs.checks import one_of
from ctxdocs.errors import InputError
from ctxdocs.integrations.chunks import Content
from ctxdocs.integrations.llama_index.nodes import node_of, with_content
from ctxdocs.integrations.reading import LibraryReader
from ctxdocs.integrations.searching import Search
from ctxdocs.library import Library
from ctxdocs.sharing import shared_library


class CompressedMemoryRetriever(BaseRetriever):
    """Finds chunks of a library; each comes as a node with its text, of which a language model reads the memory.

    Parameters
    ----------
    library : Library or str or path
        The library.
    k : int
        Nodes to return; all there are, where the library holds fewer.
    retrieval : {"hybrid", "dense", "lexical"}
        Embeddings and BM25 joined, or one of them alone.
    rerank : {"none", "likelihood"}
        As in :meth:`ctxdocs.Library.search`.
    filters : MetadataFilters or dict, optional
        What must be so of a document: LlamaIndex's filters over its metadata, or values by their names, a list for
        "one of". ``source`` is the document's uri. The documents of the library are gone through with every query.
    content : {"text", "memory"}
        What a node's text is: the chunk's, for rerankers, filters and people; or the reference to its memory, for
        engines that write nodes' texts into prompts of their own making (``CitationQueryEngine``). The chunk's text
        is then ``text`` in the metadata.
    callback_manager : CallbackManager, optional
        LlamaIndex's.

    Notes
    -----
    A node's metadata are those of the library's document, and ``memory`` (the reference, see
    :mod:`ctxdocs.references`), ``source``, ``chunk``, ``start_index``, ``end_index``, ``slots`` and ``tokens``.

    Raises
    ------
    LibraryError
        If there is no library.
    InputError
        If a choice is unknown, or ``k`` is below 1.
    """

    def __init__(
        self,
        library: Library | str | Path,
        k: int = 4,
        *,
        retrieval: str = "hybrid",
        rerank: str = "none",
        filters: MetadataFilters | Mapping[str, Any] | None = None,
        content: Content = "text",
        callback_manager: CallbackManager | None = None,
    ) -> None:
        self.library = shared_library(library)
        self.search = Search(k, retrieval, rerank, _filter(filters))
        self.content = one_of("content", content, get_args(Content))
        self._reader = LibraryReader(self.library)
        super().__init__(callback_manager=callback_manager)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        (hits,) = self._reader.search([query_bundle.query_str], self.search)
        stored = {uri: self.library.store.document(uri) for uri in {hit.document for hit in hits}}
        nodes = []
        for hit in hits:
            document = stored[hit.document]
            node = node_of(hit, self._reader.references, document.metadata if document else {})
            nodes.append(NodeWithScore(node=with_content(node, self.content), score=hit.score))
        return nodes

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await asyncio.to_thread(self._retrieve, query_bundle)


def _filter(
    filters: MetadataFilters | Mapping[str, Any] | None,
) -> Mapping[str, Any] | Callable[[Mapping[str, Any]], bool] | None:
    if filters is None or isinstance(filters, Mapping):
        return filters
    if not isinstance(filters, MetadataFilters):
        raise InputError(f"filters must be MetadataFilters or a dict, got {type(filters).__name__}")
    # The metadata themselves take the place of the id that LlamaIndex looks them up by.
    accepts: Any = build_metadata_filter_fn(lambda metadata: metadata, filters)  # type: ignore[arg-type, return-value]

    def checked(metadata: Mapping[str, Any]) -> bool:
        try:
            return accepts(metadata)
        except (TypeError, ValueError) as error:
            raise InputError(f"the filters cannot be applied to {metadata['source']}: {error}") from error

    return checked
