"""ctxdocs in LlamaIndex: a language model that reads memories, engines over it, and what brings memories to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ctxdocs.integrations.loading import load

if TYPE_CHECKING:
    from ctxdocs.integrations.llama_index.chat_engine import CompressedMemoryChatEngine as CompressedMemoryChatEngine
    from ctxdocs.integrations.llama_index.embedding import MemoryEmbedding as MemoryEmbedding
    from ctxdocs.integrations.llama_index.ingestion import MemoryIngestion as MemoryIngestion
    from ctxdocs.integrations.llama_index.llm import CompressedMemoryLLM as CompressedMemoryLLM
    from ctxdocs.integrations.llama_index.nodes import memory_nodes as memory_nodes
    from ctxdocs.integrations.llama_index.postprocessor import MemoryNodePostprocessor as MemoryNodePostprocessor
    from ctxdocs.integrations.llama_index.query_engine import CompressedMemoryQueryEngine as CompressedMemoryQueryEngine
    from ctxdocs.integrations.llama_index.retriever import CompressedMemoryRetriever as CompressedMemoryRetriever
    from ctxdocs.integrations.llama_index.synthesizer import CompressedMemorySynthesizer as CompressedMemorySynthesizer

_MODULES = {
    "CompressedMemoryChatEngine": "chat_engine",
    "CompressedMemoryLLM": "llm",
    "CompressedMemoryQueryEngine": "query_engine",
    "CompressedMemoryRetriever": "retriever",
    "CompressedMemorySynthesizer": "synthesizer",
    "MemoryEmbedding": "embedding",
    "MemoryIngestion": "ingestion",
    "MemoryNodePostprocessor": "postprocessor",
    "memory_nodes": "nodes",
}

__all__ = [
    "CompressedMemoryChatEngine",
    "CompressedMemoryLLM",
    "CompressedMemoryQueryEngine",
    "CompressedMemoryRetriever",
    "CompressedMemorySynthesizer",
    "MemoryEmbedding",
    "MemoryIngestion",
    "MemoryNodePostprocessor",
    "memory_nodes",
]


def __getattr__(name: str) -> Any:
    return load(__name__, _MODULES, name, framework="llama_index.core", extra="llama-index")


def __dir__() -> list[str]:
    return sorted(__all__)
