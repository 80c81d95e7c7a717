"""Memories as LlamaIndex nodes: the text to be embedded, ranked and shown, the reference for the language model."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from llama_index.core.schema import BaseNode, MetadataMode, NodeRelationship, RelatedNodeInfo, TextNode

from ctxdocs.integrations.chunks import MEMORY, TEXT, stored_chunks
from ctxdocs.integrations.reading import source_of
from ctxdocs.references import References
from ctxdocs.sharing import shared_library

if TYPE_CHECKING:
    from pathlib import Path

    from ctxdocs.answers import Hit
    from ctxdocs.cache import StoredChunk
    from ctxdocs.library import Library

#: The key under which they hold the id of the document that it is a part of.
DOCUMENT = "ref_doc_id"

_Node = TypeVar("_Node", bound=BaseNode)


def memory_nodes(library: Library | str | Path) -> Iterator[TextNode]:
    """Yield every chunk of a library as a node, for any index.

    ``VectorStoreIndex(list(memory_nodes("./lib")))`` finds by their texts what the language model then reads as
    memories.

    Parameters
    ----------
    library : Library or str or path
        The library.

    Yields
    ------
    TextNode
        Its text is the chunk's; what a language model is given of it is the reference to the chunk's memory. The
        metadata are those of the library's document, as far as they are words, numbers and truth values, which all
        stores take, and ``memory`` (the reference), ``source``, ``chunk``, ``start_index``, ``end_index``, ``slots``,
        ``tokens``. Its ``node_id`` is the same whenever the library is gone through, so that indexing again replaces.
    """
    store = shared_library(library).store
    references = References(store)
    for chunk, metadata in stored_chunks(store):
        yield node_of(chunk, references, metadata)


def node_of(chunk: Hit | StoredChunk, references: References, metadata: dict[str, Any]) -> TextNode:
    """Return a chunk as a node, with these metadata and its own."""
    reference, place = references.write(chunk), source_of(chunk)
    source = RelatedNodeInfo(node_id=metadata.get(DOCUMENT, place["source"]))
    node = TextNode(
        id_=str(uuid.uuid5(uuid.NAMESPACE_URL, reference)),
        text=chunk.text,
        metadata={**metadata, **place},
        start_char_idx=chunk.start,
        end_char_idx=chunk.end,
        relationships={NodeRelationship.SOURCE: source},
    )
    return with_memory(node, reference)


def with_memory(node: _Node, references: str) -> _Node:
    """Return a copy of a node, of which a language model is given references instead of its text.

    Its templates say so, which every store keeps; what is embedded is the text alone.
    """
    metadata = {**node.metadata, MEMORY: references}
    return node.model_copy(
        update={
            "metadata": metadata,
            "excluded_llm_metadata_keys": [key for key in metadata if key != MEMORY],
            "excluded_embed_metadata_keys": list(metadata),
            "metadata_template": "{value}",
            "text_template": "{metadata_str}",
        }
    )


def with_content(node: BaseNode, content: str) -> BaseNode:
    """Return a node with a memory whose text is its own, or the references to the memory.

    The references are what pipelines need that take a node's text, and not what its templates make of it. The text is
    then among the metadata, none of which a language model or an embedding is given.
    """
    if content == "text" or node.get_content(MetadataMode.NONE) == node.metadata[MEMORY]:
        return node
    metadata = {**node.metadata, TEXT: node.get_content(MetadataMode.NONE)}
    return TextNode(
        id_=node.node_id,
        text=metadata[MEMORY],
        metadata=metadata,
        excluded_llm_metadata_keys=list(metadata),
        excluded_embed_metadata_keys=list(metadata),
        relationships=node.relationships,
    )


def text_of(node: BaseNode) -> str:
    """Return what a language model would read of a node; of one with a memory, its text."""
    return node.get_content(MetadataMode.NONE if MEMORY in node.metadata else MetadataMode.LLM)
