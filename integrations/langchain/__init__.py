"""ctxdocs in LangChain: language models that read memories, and what brings memories to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ctxdocs.integrations.loading import load

if TYPE_CHECKING:
    from ctxdocs.integrations.langchain.chat import ChatCompressedMemory as ChatCompressedMemory
    from ctxdocs.integrations.langchain.compression import MemoryCompressor as MemoryCompressor
    from ctxdocs.integrations.langchain.documents import format_memories as format_memories
    from ctxdocs.integrations.langchain.documents import memory_documents as memory_documents
    from ctxdocs.integrations.langchain.embeddings import MemoryEmbeddings as MemoryEmbeddings
    from ctxdocs.integrations.langchain.llm import CompressedMemoryLLM as CompressedMemoryLLM
    from ctxdocs.integrations.langchain.retriever import CompressedMemoryRetriever as CompressedMemoryRetriever

_MODULES = {
    "ChatCompressedMemory": "chat",
    "CompressedMemoryLLM": "llm",
    "CompressedMemoryRetriever": "retriever",
    "MemoryCompressor": "compression",
    "MemoryEmbeddings": "embeddings",
    "format_memories": "documents",
    "memory_documents": "documents",
}

__all__ = [
    "ChatCompressedMemory",
    "CompressedMemoryLLM",
    "CompressedMemoryRetriever",
    "MemoryCompressor",
    "MemoryEmbeddings",
    "format_memories",
    "memory_documents",
]


def __getattr__(name: str) -> Any:
    return load(__name__, _MODULES, name, framework="langchain_core", extra="langchain")


def __dir__() -> list[str]:
    return sorted(__all__)
