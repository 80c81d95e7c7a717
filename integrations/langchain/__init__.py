"""ctxdocs in LangChain: language models that read memories, and what brings memories to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    try:
        import langchain_core  # noqa: F401
    except ImportError as error:
        from ctxdocs.errors import MissingDependency

        raise MissingDependency(f"{name} needs langchain-core", "pip install 'ctxdocs[langchain]'") from error
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
