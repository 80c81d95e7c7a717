"""Chunks of a library, as adapters hand them to a framework: with metadata that every store takes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from ctxdocs.cache import Store, StoredChunk

#: The key under which metadata hold the references to memories.
MEMORY = "memory"
#: The key under which they hold the text, where the content is the references.
TEXT = "text"
#: What the content is.
Content: TypeAlias = Literal["text", "memory"]

_PAGE = 256


def stored_chunks(store: Store) -> Iterator[tuple[StoredChunk, dict[str, Any]]]:
    """Yield every chunk of a library, read a page at a time, with the metadata of its document.

    Of these only words, numbers and truth values, which all vector stores take.
    """
    for document in store.documents():
        metadata = {name: value for name, value in document.metadata.items() if isinstance(value, str | int | float)}
        numbers = iter(store.chunk_ids([document.uri]).tolist())
        while page := list(islice(numbers, _PAGE)):
            for chunk in store.chunks(page):
                yield chunk, metadata
