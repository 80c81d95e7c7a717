"""Documents of any LangChain retriever, compressed on the way to the model and kept."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from pydantic import ConfigDict

from ctxdocs.integrations.chunks import MEMORY, Content
from ctxdocs.integrations.contents import ContentMemories
from ctxdocs.integrations.langchain.documents import text_of, with_content
from ctxdocs.integrations.settings import LibraryField


class MemoryCompressor(BaseDocumentCompressor):
    """Gives documents of any retriever a memory, compressed when a text is first seen and kept in a library.

    A document's metadata then hold ``memory``, the references to its memories: a text longer than the library's chunks
    has several. Documents that have one already, of this library and of the text they hold, keep it. Equal texts share
    a memory.

    ``retriever | compressor.compress | format_memories`` is a chain; LangChain's ``ContextualCompressionRetriever``
    takes the compressor as its ``base_compressor``.

    Parameters
    ----------
    library : Library or str or path
        Where memories are kept, and found by the model: give the language model the same. Texts are added to it, so
        choose one of their own where the library is also searched.
    content : {"text", "memory"}
        What a document's ``page_content`` is afterwards; see
        :class:`~ctxdocs.integrations.langchain.CompressedMemoryRetriever`. What ranks, filters or splits by texts
        belongs in front.
    """

    library: LibraryField
    content: Content = "text"

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
        texts = [text_of(document) for document in documents]
        references = [document.metadata.get(MEMORY) for document in documents]
        missing = [
            not self._memories.are_of(reference, text) for reference, text in zip(references, texts, strict=True)
        ]
        made = iter(self._memories.of([text for text, is_missing in zip(texts, missing, strict=True) if is_missing]))
        return [
            with_content(_with_memory(document, next(made)) if is_missing else document, self.content)
            for document, is_missing in zip(documents, missing, strict=True)
        ]


def _with_memory(document: Document, reference: str) -> Document:
    return document.model_copy(update={"metadata": {**document.metadata, MEMORY: reference}})
