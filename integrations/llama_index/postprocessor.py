"""Nodes of any LlamaIndex index, compressed on the way to the model and kept."""

from __future__ import annotations

from functools import cached_property

from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle
from pydantic import ConfigDict

from ctxdocs.integrations.chunks import MEMORY, Content
from ctxdocs.integrations.contents import ContentMemories
from ctxdocs.integrations.llama_index.nodes import text_of, with_content, with_memory
from ctxdocs.integrations.settings import LibraryField


class MemoryNodePostprocessor(BaseNodePostprocessor):
    """Gives nodes of any index a memory, compressed when a text is first seen and kept in a library.

    What is compressed is what a language model would read of a node, its metadata included unless they are excluded
    for language models. Any prompt of LlamaIndex then gets the reference to the memory in its place, and
    :class:`~ctxdocs.integrations.llama_index.CompressedMemoryLLM` reads the memory. A text longer than the library's
    chunks has several. Nodes that have a memory already, of this library, pass as they are. Equal texts share one.

    Put it behind postprocessors that read or change texts.

    Parameters
    ----------
    library : Library or str or path
        Where memories are kept, and found by the model: give the language model the same. Texts are added to it, so
        choose one of their own where the library is also searched.
    content : {"text", "memory"}
        What a node's text is afterwards; see :class:`~ctxdocs.integrations.llama_index.CompressedMemoryRetriever`.

    Raises
    ------
    StorageError
        While nodes are processed, if the library cannot be written.
    LibraryError
        If there is no library, or another process is writing it.
    """

    library: LibraryField
    content: Content = "text"

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    @classmethod
    def class_name(cls) -> str:
        """Return the name in serialised objects."""
        return "MemoryNodePostprocessor"

    @cached_property
    def _memories(self) -> ContentMemories:
        return ContentMemories(self.library)

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        have = [self._memories.has(found.node.metadata.get(MEMORY)) for found in nodes]
        texts = [text_of(found.node) for found, has in zip(nodes, have, strict=True) if not has]
        references = iter(self._memories.of(texts))
        remembered = [
            found.node if has else with_memory(found.node, next(references))
            for found, has in zip(nodes, have, strict=True)
        ]
        return [
            NodeWithScore(node=with_content(node, self.content), score=found.score)
            for node, found in zip(remembered, nodes, strict=True)
        ]
