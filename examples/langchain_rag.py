"""A LangChain RAG chain whose model reads memories: python examples/langchain_rag.py."""

import tempfile
from pathlib import Path

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough

import ctxdocs
from ctxdocs.integrations.langchain import (
    ChatCompressedMemory,
    CompressedMemoryLLM,
    CompressedMemoryRetriever,
    format_memories,
)

HANDBOOK = Path(__file__).parent / "corpus" / "handbook"
PAGES = [HANDBOOK / name for name in ("welcome.md", "safety-rules-2019.md", "safety-rules-2025.md")]
QUESTION = "How long is the causeway to Tarrow Head?"

TEMPLATE = ChatPromptTemplate.from_messages([("system", "{context}"), ("human", "{question}")])


def main() -> None:
    """Compress a few pages; ask it by itself, and in a chain."""
    with tempfile.TemporaryDirectory() as folder:
        library = ctxdocs.Library.create(Path(folder) / "library")
        library.add(PAGES)

        # The model searches for itself. A library that is there already is given by its path: library="./library".
        llm = CompressedMemoryLLM(library=library, k=2, max_tokens=16)
        print(QUESTION, "->", llm.invoke(QUESTION))

        # A chain as it is with any model; only the retriever, what joins the documents, and the model are ctxdocs'.
        retriever = CompressedMemoryRetriever(library=library, k=2)
        model = ChatCompressedMemory(library=library, max_tokens=16)
        chain = {"context": retriever | format_memories, "question": RunnablePassthrough()} | TEMPLATE | model
        message = chain.invoke(QUESTION)
        slots = message.usage_metadata["input_token_details"]["memory_slots"]
        print(f"the chain -> {message.content} ({slots} of {message.usage_metadata['input_tokens']} were memory slots)")
        for source in message.response_metadata["sources"]:
            print(f"  {Path(source['source']).name}: {source['tokens']} tokens read as {source['slots']} slots")

        print("streamed ->", *(chain | StrOutputParser()).stream(QUESTION), sep="|")


if __name__ == "__main__":
    main()
