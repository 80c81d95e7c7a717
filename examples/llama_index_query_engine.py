"""A LlamaIndex query engine whose model reads memories: python examples/llama_index_query_engine.py."""

import tempfile
from pathlib import Path

from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import get_response_synthesizer

import ctxdocs
from ctxdocs.integrations.llama_index import (
    CompressedMemoryChatEngine,
    CompressedMemoryLLM,
    CompressedMemoryQueryEngine,
    CompressedMemoryRetriever,
)

CORPUS = Path(__file__).parent / "corpus" / "handbook"
QUESTION = "How long is the causeway to Tarrow Head?"


def main() -> None:
    """Compress a folder; ask it by a query engine of its own, by LlamaIndex's, and in a conversation."""
    with tempfile.TemporaryDirectory() as folder:
        library = ctxdocs.Library.create(Path(folder) / "library")
        library.add(CORPUS)

        # A library that is there already is given by its path: from_library("./library", k=2).
        engine = CompressedMemoryQueryEngine.from_library(library, k=2, max_new_tokens=16)
        response = engine.query(QUESTION)
        print(QUESTION, "->", response)
        for node in response.source_nodes:
            source = Path(node.metadata["source"]).name
            print(f"  {source}: {node.metadata['tokens']} tokens read as {node.metadata['slots']} slots")

        # LlamaIndex's own engine and synthesizer; only the retriever and the model are ctxdocs'.
        retriever = CompressedMemoryRetriever(library, k=2)
        llm = CompressedMemoryLLM(library=library, max_new_tokens=16)
        stock = RetrieverQueryEngine(retriever, get_response_synthesizer(llm=llm, streaming=True))
        print("streamed ->", *stock.query(QUESTION).response_gen, sep="|")

        chat = CompressedMemoryChatEngine.from_library(library, k=2, history="memory", max_new_tokens=16)
        for message in (QUESTION, "And when is it under water?"):
            print("chat ->", chat.chat(message))


if __name__ == "__main__":
    main()
