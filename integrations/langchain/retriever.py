"""A LangChain retriever over a library: documents that bring their memories along."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from pydantic import ConfigDict, model_validator

from ctxdocs.integrations.chunks import Content
from ctxdocs.integrations.langchain.documents import document_of, with_content
from ctxdocs.integrations.reading import LibraryReader
from ctxdocs.integrations.searching import Search
from ctxdocs.integrations.settings import LibraryField


class CompressedMemoryRetriever(BaseRetriever):
    """Finds chunks of a library; each comes as its text, with a reference to its memory.

    Parameters
    ----------
    library : Library or str or path
        The library.
    k : int
        Chunks to return; all there are, where the library holds fewer.
    retrieval : {"hybrid", "dense", "lexical"}
        Embeddings and BM25 joined, or one of them alone.
    rerank : {"none", "likelihood"}
        As in :meth:`ctxdocs.Library.search`.
    filter : dict, optional
        What must be so of a document: values by the names of its metadata, or ``source`` for its uri. A list stands
        for any of its values. The documents of the library are gone through for it with every call.
    content : {"text", "memory"}
        What a document's ``page_content`` is: the chunk's text, for rerankers, filters and people; or the reference to
        its memory, for chains that write the content into a prompt by themselves. The text is then ``text`` in the
        metadata.

    Notes
    -----
    ``k`` and the others may be given for one call as well: ``retriever.invoke(query, k=2)``.

    A document's metadata are those of the library's document, and ``memory`` (the reference, see
    :mod:`ctxdocs.references`), ``score``, ``source``, ``chunk``, ``start_index``, ``end_index``, ``slots`` and
    ``tokens``.
    """

    library: LibraryField
    k: int = 4
    retrieval: str = "hybrid"
    rerank: str = "none"
    filter: dict[str, Any] | None = None
    content: Content = "text"

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    @model_validator(mode="after")
    def _check(self) -> CompressedMemoryRetriever:
        Search(self.k, self.retrieval, self.rerank, self.filter)
        return self

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """Whether LangChain can write the object as JSON; the library is written as its path."""
        return True

    @property
    def lc_attributes(self) -> dict[str, Any]:
        """What is written in place of attributes that JSON cannot hold."""
        return {"library": str(self.library.path)}

    @cached_property
    def _reader(self) -> LibraryReader:
        return LibraryReader(self.library)

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,
        k: int | None = None,
        retrieval: str | None = None,
        rerank: str | None = None,
        filter: dict[str, Any] | None = None,
    ) -> list[Document]:
        search = Search(
            self.k if k is None else k,
            self.retrieval if retrieval is None else retrieval,
            self.rerank if rerank is None else rerank,
            self.filter if filter is None else filter,
        )
        (hits,) = self._reader.search([query], search)
        stored = {uri: self.library.store.document(uri) for uri in {hit.document for hit in hits}}
        documents = []
        for hit in hits:
            document = stored[hit.document]
            metadata = {**(document.metadata if document else {}), "score": hit.score}
            documents.append(with_content(document_of(hit, self._reader.references, metadata), self.content))
        return documents
