"""A step of LlamaIndex's ingestion pipelines that compresses nodes into a library."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from llama_index.core.schema import BaseNode, TransformComponent
from pydantic import ConfigDict

from ctxdocs.corpus import Document
from ctxdocs.errors import InputError
from ctxdocs.integrations.chunks import MEMORY
from ctxdocs.integrations.contents import ContentMemories
from ctxdocs.integrations.llama_index.nodes import DOCUMENT, text_of, with_memory
from ctxdocs.integrations.settings import LibraryField
from ctxdocs.sharing import one_at_a_time


class MemoryIngestion(TransformComponent):
    """Compresses nodes into a library, where its own retriever finds them, and hands them on with their memories.

    Every node becomes a document of the library with the node's metadata. Texts that are there already are not
    compressed again. The nodes of a document (one ``ref_doc_id``) take the place of those that the library holds of
    it, so hand all nodes of a document over at once, as pipelines do, and give documents ids that stay the same.

    Parameters
    ----------
    library : Library or str or path
        Where nodes are kept, with their memories and embeddings of its own.

    Notes
    -----
    What is compressed is what a language model would read of a node. The nodes that come out are copies, of which a
    language model is given the reference to the memory instead; an embedding behind this step reads the text alone.

    Raises
    ------
    InputError
        While nodes are added, if metadata cannot be written as JSON.
    StorageError
        If the library cannot be written.
    LibraryError
        If there is no library, or another process is writing it.
    """

    library: LibraryField

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    @classmethod
    def class_name(cls) -> str:
        """Return the name in serialised objects."""
        return "MemoryIngestion"

    @cached_property
    def _memories(self) -> ContentMemories:
        return ContentMemories(self.library)

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Add nodes to the library; return copies with references to their memories, blank ones as they are."""
        uris = [_uri(node) for node in nodes]
        documents = {
            uri: Document.from_text(text_of(node), uri, _metadata(node))
            for uri, node in zip(uris, nodes, strict=True)
            if uri is not None
        }
        if documents:
            with one_at_a_time(self.library, with_model=True):
                self.library.add(list(documents.values()))
                if stale := self._stale({_document_of(node) for node in nodes}, documents):
                    with self.library.store.writer() as writer:
                        writer.remove(stale)
        return [
            node if uri is None else with_memory(node, self._memories.of_document(uri))
            for uri, node in zip(uris, nodes, strict=True)
        ]

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Like calling it, in a thread."""
        return await asyncio.to_thread(self.__call__, nodes, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        raise InputError(
            "an ingestion step cannot be sent to other processes: one process writes a library",
            "run the pipeline without num_workers",
        )

    def _stale(self, documents: set[str], given: dict[str, Document]) -> list[str]:
        """Return what the library holds of documents besides what was given of them."""
        return [
            stored.uri
            for stored in self.library.store.documents()
            if stored.metadata.get(DOCUMENT) in documents and stored.uri not in given
        ]


def _document_of(node: BaseNode) -> str:
    return node.ref_doc_id or node.node_id


def _uri(node: BaseNode) -> str | None:
    """Return what a node is called in the library: by its document and its text, as ids are often random."""
    text = text_of(node)
    if not text.strip():
        return None
    return f"{_document_of(node)}#{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"


def _metadata(node: BaseNode) -> dict[str, Any]:
    kept = {name: value for name, value in node.metadata.items() if name != MEMORY}
    return {**kept, DOCUMENT: _document_of(node)}
