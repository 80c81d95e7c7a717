"""Memories as LangChain documents: the text as content, the reference to the memory as metadata."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from langchain_core.documents import Document

from ctxdocs.errors import InputError
from ctxdocs.integrations.chunks import MEMORY, TEXT, stored_chunks
from ctxdocs.integrations.reading import source_of
from ctxdocs.references import References
from ctxdocs.sharing import shared_library

if TYPE_CHECKING:
    from pathlib import Path

    from ctxdocs.answers import Hit
    from ctxdocs.cache import StoredChunk
    from ctxdocs.library import Library


def format_memories(documents: Sequence[Document]) -> str:
    """Return the references to documents' memories, one behind another, to be put into a prompt.

    ``retriever | format_memories`` takes the place of the function that joins documents' texts in a chain. What the
    prompt's model then reads in this place are the memories. Documents that share a memory, as pieces of one text do,
    have it read once.

    Raises
    ------
    InputError
        If a document has no memory.
    """
    references = []
    for document in documents:
        reference = document.metadata.get(MEMORY)
        if not isinstance(reference, str):
            raise InputError(
                f"a document has no memory: {document.page_content[:60]!r}",
                "retrieve with CompressedMemoryRetriever, or put MemoryCompressor in front",
            )
        references.append(reference)
    return "".join(dict.fromkeys(references))


def with_content(document: Document, content: str) -> Document:
    """Return a document with a memory whose content is its text, or the reference to the memory.

    The reference is what pipelines need that write a document's content into a prompt by themselves. The text is then
    among the metadata.
    """
    is_reference = _is_reference(document)
    if is_reference == (content == "memory"):
        return document
    metadata = dict(document.metadata)
    if is_reference:
        return document.model_copy(update={"page_content": metadata.pop(TEXT), "metadata": metadata})
    metadata[TEXT] = document.page_content
    return document.model_copy(update={"page_content": metadata[MEMORY], "metadata": metadata})


def text_of(document: Document) -> str:
    """Return a document's text, whatever its content is."""
    return document.metadata[TEXT] if _is_reference(document) else document.page_content


def _is_reference(document: Document) -> bool:
    return TEXT in document.metadata and document.page_content == document.metadata.get(MEMORY)


def memory_documents(library: Library | str | Path) -> Iterator[Document]:
    """Yield every chunk of a library as a document, for a vector store to index.

    What the store finds then brings its memory along: ``store.as_retriever() | format_memories``.

    Parameters
    ----------
    library : Library or str or path
        The library.

    Yields
    ------
    langchain_core.documents.Document
        ``page_content`` is the chunk's text; ``metadata`` are those of the library's document, as far as they are
        words, numbers and truth values, which all stores take, and ``memory`` (the reference), ``source``, ``chunk``,
        ``start_index``, ``end_index``, ``slots``, ``tokens``. Its ``id`` is the same whenever the library is gone
        through, so that indexing again replaces.
    """
    store = shared_library(library).store
    references = References(store)
    for chunk, metadata in stored_chunks(store):
        yield document_of(chunk, references, metadata)


def document_of(chunk: Hit | StoredChunk, references: References, metadata: dict[str, Any]) -> Document:
    """Return a chunk as a document, with these metadata and its own."""
    reference = references.write(chunk)
    return Document(
        id=reference.strip("[]").rpartition(":")[0],
        page_content=chunk.text,
        metadata={**metadata, MEMORY: reference, **source_of(chunk)},
    )
