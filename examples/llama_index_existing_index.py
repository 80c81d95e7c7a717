"""Memories behind an index that is already there: python examples/llama_index_existing_index.py.

The index is LlamaIndex's in-memory vector store; all its others are used in the same way.
"""

import tempfile
from pathlib import Path

from llama_index.core import SimpleDirectoryReader, VectorStoreIndex
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter

import ctxdocs
from ctxdocs.integrations.llama_index import (
    CompressedMemoryLLM,
    CompressedMemoryQueryEngine,
    CompressedMemorySynthesizer,
    MemoryEmbedding,
    MemoryIngestion,
    MemoryNodePostprocessor,
    memory_nodes,
)

CORPUS = Path(__file__).parent / "corpus" / "handbook"
QUESTION = "How long is the causeway to Tarrow Head?"


def main() -> None:
    """Ask an index of texts, compressed when they are found; an index of memories; a library that a pipeline filled."""
    with tempfile.TemporaryDirectory() as folder:
        embedding = MemoryEmbedding()
        documents = SimpleDirectoryReader(str(CORPUS), required_exts=[".md"], filename_as_id=True).load_data()[:3]
        splitter = SentenceSplitter(chunk_size=256, chunk_overlap=16)

        # An index of plain texts, as any application has it.
        texts = VectorStoreIndex.from_documents(documents, embed_model=embedding, transformations=[splitter])
        memories = ctxdocs.Library.create(Path(folder) / "memories")
        engine = texts.as_query_engine(
            llm=CompressedMemoryLLM(library=memories, max_new_tokens=16),
            similarity_top_k=3,
            node_postprocessors=[MemoryNodePostprocessor(library=memories)],
        )
        for time in ("first", "second"):
            print(f"{time} time -> {engine.query(QUESTION)} ({memories.info()['documents']} texts compressed so far)")

        # A library compressed beforehand, with another index than its own.
        handbook = ctxdocs.Library.create(Path(folder) / "handbook")
        handbook.add(CORPUS)
        index = VectorStoreIndex(list(memory_nodes(handbook)), embed_model=embedding)
        engine = index.as_query_engine(
            llm=CompressedMemoryLLM(library=handbook, max_new_tokens=16),
            response_synthesizer=CompressedMemorySynthesizer(handbook, max_new_tokens=16),
            similarity_top_k=3,
        )
        response = engine.query(QUESTION)
        names = sorted({Path(node.metadata["source"]).name for node in response.source_nodes})
        print(f"another index -> {response} (from {', '.join(names)})")

        # A library filled by an ingestion pipeline.
        filled = ctxdocs.Library.create(Path(folder) / "filled")
        IngestionPipeline(transformations=[splitter, MemoryIngestion(library=filled)]).run(documents=documents)
        answer = CompressedMemoryQueryEngine.from_library(filled, k=3, max_new_tokens=16).query(QUESTION)
        print(f"a pipeline -> {answer} ({filled.info()['documents']} nodes)")


if __name__ == "__main__":
    main()
