"""Texts from elsewhere, compressed when they are first seen and kept by content in a library."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ctxdocs.corpus import Document
from ctxdocs.errors import InputError, LibraryError
from ctxdocs.references import References
from ctxdocs.sharing import one_at_a_time

if TYPE_CHECKING:
    from ctxdocs.library import Library

_URI = "content:"


class ContentMemories:
    """Gives texts memories. Equal texts share a memory.

    Parameters
    ----------
    library : Library
        Where memories are kept. Texts are added to it, so choose one of their own where the library is also searched.
    """

    def __init__(self, library: Library) -> None:
        self.library = library
        self.references = References(library.store)

    def of(self, texts: Sequence[str]) -> list[str]:
        """Return the references to texts' memories, compressing those that are new.

        A text longer than the library's chunks has several, one behind another; a blank one has none, ``""``.

        Raises
        ------
        StorageError
            If the library cannot be written.
        LibraryError
            If another process is writing it.
        """
        self._add({_uri(text): text for text in texts if text.strip()})
        return [self.of_document(_uri(text)) if text.strip() else "" for text in texts]

    def of_document(self, uri: str) -> str:
        """Return the references to the memories of a document of the library, one behind another."""
        store = self.library.store
        return "".join(map(self.references.write, store.chunks(store.chunk_ids([uri]).tolist())))

    def has(self, reference: object) -> bool:
        """Whether something refers to a memory that is in the library."""
        if not isinstance(reference, str):
            return False
        try:
            return any(not isinstance(part, str) for part in self.references.read(reference))
        except (InputError, LibraryError):  # it is of another library, or gone
            return False

    def _add(self, texts: dict[str, str]) -> None:
        store = self.library.store
        if all(store.document(uri) for uri in texts):
            return
        with one_at_a_time(self.library, with_model=True):
            missing = {uri: text for uri, text in texts.items() if store.document(uri) is None}
            if missing:
                self.library.add([Document.from_text(text, uri) for uri, text in missing.items()])


def _uri(text: str) -> str:
    return _URI + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
