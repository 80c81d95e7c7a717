"""Texts from elsewhere, compressed: for one prompt, or when they are first seen and then kept in a library."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ctxdocs.checks import items
from ctxdocs.corpus import Chunker, Document
from ctxdocs.errors import InputError, LibraryError
from ctxdocs.references import References
from ctxdocs.sharing import one_at_a_time, shared_model

if TYPE_CHECKING:
    from ctxdocs.cache import StoredChunk
    from ctxdocs.library import Library
    from ctxdocs.memory import Memory

_URI = "content:"


@dataclass(frozen=True)
class Contents:
    """What is read with a question, in place of what a search finds.

    Parameters
    ----------
    texts : sequence of str
        What they refer to is read as memories; other text is compressed for the one prompt, and not kept.

    Raises
    ------
    InputError
        If they are no texts.
    """

    texts: Sequence[str]

    def __post_init__(self) -> None:
        for text in items("contents", self.texts):
            if not isinstance(text, str):
                raise InputError(f"contents are texts, got {type(text).__name__}")

    def read(self, library: Library, references: References) -> tuple[list[Memory], list[StoredChunk]]:
        """Return the contents as memories, in order, and the chunks of those that are in the library.

        Raises
        ------
        LibraryError
            If a chunk referred to is no longer in the library.
        InputError
            If a reference was written by another library of this process.
        """
        parts = [part for text in self.texts for part in references.read(text)]
        chunks = [part for part in parts if not isinstance(part, str)]
        stored = iter(library.store.memories(chunks))
        compressed = iter(_compressed(library, [part for part in parts if isinstance(part, str)]))
        memories: list[Memory] = []
        for part in parts:
            memories += next(compressed) if isinstance(part, str) else [next(stored)]
        return memories, chunks


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

    def are_of(self, references: object, text: str) -> bool:
        """Whether something refers to memories that are in the library, and they are those of a text.

        Texts that were split or rewritten on their way still carry the references of what they were.
        """
        if not isinstance(references, str) or not self.has(references):
            return False
        chunks = self.references.read(references)
        first = chunks[0]
        if isinstance(first, str) or first.text not in text:
            return False
        shift, rest = text.index(first.text) - first.start, list(text)
        for chunk in chunks:
            if isinstance(chunk, str) or text[chunk.start + shift : chunk.end + shift] != chunk.text:
                return False
            rest[chunk.start + shift : chunk.end + shift] = " " * len(chunk.text)
        return not "".join(rest).strip()

    def _add(self, texts: dict[str, str]) -> None:
        store = self.library.store
        if all(store.document(uri) for uri in texts):
            return
        with one_at_a_time(self.library, with_model=True):
            missing = {uri: text for uri, text in texts.items() if store.document(uri) is None}
            if missing:
                self.library.add([Document.from_text(text, uri) for uri, text in missing.items()])


def _compressed(library: Library, texts: Sequence[str]) -> list[list[Memory]]:
    """Compress texts, cut as the library cuts documents."""
    compressor: Any = library.compressor
    settings = library.store.manifest.settings
    chunker = Chunker(compressor.tokenizer, settings["chunk_tokens"], settings["overlap_tokens"])
    cut = [[chunk.ids for chunk in chunker(text)] for text in texts]
    documents = [ids for chunks in cut for ids in chunks]
    with shared_model(library).lock, torch.no_grad():
        memories = iter(compressor.compress_ids(documents) if documents else ())
    return [[next(memories) for _ in chunks] for chunks in cut]


def _uri(text: str) -> str:
    return _URI + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
