"""Documents of any LangChain retriever, compressed on the way to the model and kept."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from pydantic import ConfigDict

from ctxdocs.integrations.contents import ContentMemories
from ctxdocs.integrations.langchain.documents import MEMORY
from ctxdocs.integrations.settings import LibraryField


class MemoryCompressor(BaseDocumentCompressor):
    """Gives documents of any retriever a memory, compressed when a text is first seen and kept in a library.

    A document's metadata then hold ``memory``, the references to its memories: a text longer than the library's chunks
    has several. Documents that have one already, of this library, pass as they are. Equal texts share a memory.

    ``retriever | compressor.compress | format_memories`` is a chain; LangChain's ``ContextualCompressionRetriever``
    takes the compressor as its ``base_compressor``.

    Parameters
    ----------
    library : Library or str or path
        Where memories are kept, and found by the model: give the language model the same. Texts are added to it, so
        choose one of their own where the library is also searched.
    """

    library: LibraryField

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    @cached_property
    def _memories(self) -> ContentMemories:
        return ContentMemories(self.library)

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Return the documents with their memories; the query changes nothing."""
        return self.compress(documents)

    def compress(self, documents: Sequence[Document]) -> list[Document]:
        """Return copies of the documents, in this order, with references to their memories in the metadata.

        Raises
        ------
        StorageError
            If the library cannot be written.
        LibraryError
            If another process is writing it.
        """
        have = [self._memories.has(document.metadata.get(MEMORY)) for document in documents]
        texts = [document.page_content for document, has in zip(documents, have, strict=True) if not has]
        references = iter(self._memories.of(texts))
        return [
            document if has else _with_memory(document, next(references))
            for document, has in zip(documents, have, strict=True)
        ]


def _with_memory(document: Document, reference: str) -> Document:
    return document.model_copy(update={"metadata": {**document.metadata, MEMORY: reference}})
