"""Documents of any LangChain retriever, compressed on the way to the model and kept."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from pydantic import ConfigDict

from ctxdocs import corpus
from ctxdocs.errors import InputError, LibraryError
from ctxdocs.integrations.langchain.documents import MEMORY
from ctxdocs.integrations.langchain.settings import LibraryField
from ctxdocs.references import References
from ctxdocs.sharing import one_at_a_time

if TYPE_CHECKING:
    from ctxdocs.cache import StoredChunk

_URI = "content:"


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
    def _references(self) -> References:
        return References(self.library.store)

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
        have = [self._has_memory(document) for document in documents]
        texts = [document.page_content for document, has in zip(documents, have, strict=True) if not has]
        self._add({_uri(text): text for text in texts if text.strip()})
        return [document if has else self._with_memory(document) for document, has in zip(documents, have, strict=True)]

    def _add(self, texts: dict[str, str]) -> None:
        store = self.library.store
        if all(store.document(uri) for uri in texts):
            return
        with one_at_a_time(self.library, with_model=True):
            missing = {uri: text for uri, text in texts.items() if store.document(uri) is None}
            if missing:
                self.library.add([corpus.Document.from_text(text, uri) for uri, text in missing.items()])

    def _has_memory(self, document: Document) -> bool:
        reference = document.metadata.get(MEMORY)
        if not isinstance(reference, str):
            return False
        try:
            return any(not isinstance(part, str) for part in self._references.read(reference))
        except (InputError, LibraryError):  # it is of another library, or gone: the text is there
            return False

    def _with_memory(self, document: Document) -> Document:
        chunks = self._chunks(document.page_content)
        return document.model_copy(
            update={"metadata": {**document.metadata, MEMORY: "".join(map(self._references.write, chunks))}}
        )

    def _chunks(self, text: str) -> list[StoredChunk]:
        if not text.strip():
            return []
        store = self.library.store
        return store.chunks(store.chunk_ids([_uri(text)]).tolist())


def _uri(text: str) -> str:
    return _URI + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
