"""Memories behind an index that is already there: python examples/langchain_existing_index.py.

The index is LangChain's FAISS store, from ``pip install langchain-community``. With Chroma (``langchain-chroma``) or
another store nothing changes but the class: ``Chroma.from_documents(documents, embeddings)``.
"""

import tempfile
from pathlib import Path

from langchain_community.vectorstores import FAISS
from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough

import ctxdocs
from ctxdocs.integrations.langchain import (
    ChatCompressedMemory,
    MemoryCompressor,
    MemoryEmbeddings,
    format_memories,
    memory_documents,
)

HANDBOOK = Path(__file__).parent / "corpus" / "handbook"
PAGES = [HANDBOOK / name for name in ("welcome.md", "safety-rules-2019.md", "safety-rules-2025.md")]
QUESTION = "How long is the causeway to Tarrow Head?"

TEMPLATE = ChatPromptTemplate.from_messages([("system", "{context}"), ("human", "{question}")])


def main() -> None:
    """Ask an index of texts, compressed when they are first found; then one whose documents bring memories along."""
    with tempfile.TemporaryDirectory() as folder:
        embeddings = MemoryEmbeddings()

        # An index of plain texts, as any application has it.
        paragraphs = [
            Document(page_content=paragraph, metadata={"source": path.name})
            for path in PAGES
            for paragraph in path.read_text(encoding="utf-8").split("\n\n")
            if len(paragraph) > 100
        ]
        texts = FAISS.from_documents(paragraphs, embeddings)
        library = ctxdocs.Library.create(Path(folder) / "memories")
        compressor = MemoryCompressor(library=library)
        found = texts.as_retriever(search_kwargs={"k": 3})
        context = found | compressor.compress | format_memories
        model = ChatCompressedMemory(library=library, max_tokens=16)
        chain = {"context": context, "question": RunnablePassthrough()} | TEMPLATE | model
        for time in ("first", "second"):
            message = chain.invoke(QUESTION)
            print(f"{time} time -> {message.content} ({library.info()['documents']} texts compressed so far)")

        # A library compressed beforehand, with another index than its own.
        handbook = ctxdocs.Library.create(Path(folder) / "handbook")
        handbook.add(PAGES)
        index = FAISS.from_documents(list(memory_documents(handbook)), embeddings)
        context = index.as_retriever(search_kwargs={"k": 3}) | format_memories
        model = ChatCompressedMemory(library=handbook, max_tokens=16)
        chain = {"context": context, "question": RunnablePassthrough()} | TEMPLATE | model
        message = chain.invoke(QUESTION)
        names = sorted({Path(source["source"]).name for source in message.response_metadata["sources"]})
        print(f"another index -> {message.content} (from {', '.join(names)})")


if __name__ == "__main__":
    main()
