"""Memories and LangChain's documents, vector stores and embeddings."""

from __future__ import annotations

import threading

import pytest

pytest.importorskip("langchain_core")

from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.prompts import PromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore
from pydantic import ValidationError

from ctxdocs.corpus import Document as Source
from ctxdocs.errors import InputError, LibraryError
from ctxdocs.integrations.langchain import (
    CompressedMemoryLLM,
    CompressedMemoryRetriever,
    MemoryCompressor,
    MemoryEmbeddings,
    format_memories,
    memory_documents,
)
from ctxdocs.library import Library
from tests.conftest import TEXT, FakeEmbedder

QUESTION = "When does the ferry sail?"
LINES = TEXT.splitlines()


class Found(BaseRetriever):
    """A retriever that always finds the same."""

    documents: list[Document]

    def _get_relevant_documents(self, query, *, run_manager):
        return self.documents


@pytest.fixture
def memories(make_library):
    """A library that keeps what a document compressor makes."""
    return make_library("memories")


@pytest.fixture
def compressor_of_documents(memories):
    return MemoryCompressor(library=memories)


@pytest.fixture
def compressed(monkeypatch, compressor):
    """Numbers of chunks compressed, call by call."""
    sizes, compress = [], type(compressor).compress_ids
    monkeypatch.setattr(
        type(compressor),
        "compress_ids",
        lambda self, documents, **options: (sizes.append(len(documents)), compress(self, documents, **options))[1],
    )
    return sizes


# Documents of any retriever.


def test_documents_get_memories_that_the_model_reads(memories, compressor_of_documents):
    documents = [Document(page_content=line, metadata={"line": number}) for number, line in enumerate(LINES)]
    given = compressor_of_documents.compress_documents(documents, QUESTION)
    assert [document.page_content for document in given] == LINES
    assert [document.metadata["line"] for document in given] == [0, 1, 2]
    assert all("memory" not in document.metadata for document in documents)  # the caller's are left alone
    llm = CompressedMemoryLLM(library=memories, max_tokens=8)
    chunks = memories.store.chunks(
        [number for line in LINES for number in memories.store.chunk_ids([uri_of(line)]).tolist()]
    )
    expected = memories.compressor.generate("?", memories.store.memories(chunks), max_new_tokens=8)
    assert llm.invoke(format_memories(given) + "?") == expected


def uri_of(text):
    import hashlib

    return "content:" + hashlib.sha256(text.encode()).hexdigest()


def test_a_text_is_compressed_once(compressor_of_documents, memories, compressed):
    documents = [Document(page_content=line) for line in (LINES[0], LINES[1], LINES[0])]
    first = compressor_of_documents.compress(documents)
    assert first[0].metadata == first[2].metadata
    assert len(compressed) == 1
    assert compressor_of_documents.compress(documents) == first
    MemoryCompressor(library=memories).compress(documents)
    assert len(compressed) == 1
    compressor_of_documents.compress([*documents, Document(page_content=LINES[2])])
    assert len(compressed) == 2
    assert memories.info()["documents"] == 3


def test_a_long_text_has_several_memories(compressor_of_documents, memories):
    (document,) = compressor_of_documents.compress([Document(page_content=TEXT * 3)])
    count = memories.info()["chunks"]
    assert count > 3
    assert document.metadata["memory"].count("[[memory:") == count


def test_texts_without_anything_to_read_have_no_memory(compressor_of_documents, compressed):
    given = compressor_of_documents.compress([Document(page_content=" \n"), Document(page_content="")])
    assert [document.metadata["memory"] for document in given] == ["", ""]
    assert compressor_of_documents.compress([]) == []
    assert compressed == []


def test_documents_with_a_memory_pass(make_library, compressor_of_documents, memories, compressed):
    memories.add(Source.from_text(LINES[0], uri="own"))
    documents = CompressedMemoryRetriever(library=memories, k=1).invoke(QUESTION)
    compressed.clear()
    assert compressor_of_documents.compress(documents) == documents
    forged = Document(page_content=LINES[1], metadata={"memory": "[[memory:1:" + "0" * 16 + ":" + "0" * 32 + "]]"})
    (given,) = compressor_of_documents.compress([forged])
    assert given.metadata["memory"] != forged.metadata["memory"]
    assert len(compressed) == 1


def test_documents_of_another_library_get_a_memory_here(make_library, compressor_of_documents, memories):
    other = make_library("other")
    other.add(Source.from_text(LINES[0], uri="own"))
    documents = CompressedMemoryRetriever(library=other, k=1).invoke(QUESTION)
    given = compressor_of_documents.compress(documents)
    assert CompressedMemoryLLM(library=memories, max_tokens=2).invoke(format_memories(given) + "?")


def test_in_a_chain_behind_any_retriever(memories, compressor_of_documents):
    retriever = Found(documents=[Document(page_content=line) for line in LINES])
    llm = CompressedMemoryLLM(library=memories, max_tokens=4)
    context = retriever | compressor_of_documents.compress | format_memories
    prompt = PromptTemplate.from_template("{context}{question}")
    chain = {"context": context, "question": RunnablePassthrough()} | prompt
    usage = llm.generate([chain.invoke(QUESTION).to_string()]).llm_output["token_usage"]
    assert usage["memory_slots"] == memories.info()["slots"] >= 12
    assert (chain | llm).invoke(QUESTION) == (chain | llm).batch([QUESTION, "?"])[0]


async def test_compressing_asynchronously(compressor_of_documents):
    documents = [Document(page_content=LINES[0])]
    given = await compressor_of_documents.acompress_documents(documents, QUESTION)
    assert given == compressor_of_documents.compress(documents)


def test_threads_that_find_the_same(compressor_of_documents, memories):
    documents, results, errors = [Document(page_content=line) for line in LINES], [], []

    def work():
        try:
            results.append(compressor_of_documents.compress(documents))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert all(result == results[0] for result in results)
    assert memories.info()["documents"] == 3


def test_a_library_that_is_being_written_says_so(compressor_of_documents, memories):
    with memories.store.writer(), pytest.raises(LibraryError, match="is being written to"):
        compressor_of_documents.compress([Document(page_content="new")])
    with pytest.raises(LibraryError, match="does not exist"):
        MemoryCompressor(library=memories.path / "nothing")
    with pytest.raises(ValidationError):
        MemoryCompressor(library=memories, k=3)


# Vector stores as the index.


@pytest.fixture
def library(make_library, corpus):
    library = make_library()
    library.add(corpus)
    library.add(Source.from_text("Rule one. " * 20, "rule", {"year": 2025, "tags": ["a"], "by": {"name": "x"}}))
    return library


def test_every_chunk_is_a_document(library):
    documents = list(memory_documents(library))
    counts = library.store.counts()
    assert len(documents) == counts.chunks > 4
    assert len({document.id for document in documents}) == counts.chunks
    assert all(isinstance(value, str | int | float) for document in documents for value in document.metadata.values())
    rule = next(document for document in documents if document.metadata["source"] == "rule")
    assert rule.metadata["year"] == 2025
    assert [document.id for document in memory_documents(library.path)] == [document.id for document in documents]


def test_a_vector_store_is_the_index(library):
    store = InMemoryVectorStore(MemoryEmbeddings(FakeEmbedder()))
    store.add_documents(list(memory_documents(library)))
    store.add_documents(list(memory_documents(library)))
    assert len(store.store) == library.store.counts().chunks
    dense = library.search(QUESTION, k=2, retrieval="dense")
    documents = store.as_retriever(search_kwargs={"k": 2}).invoke(QUESTION)
    assert [document.page_content for document in documents] == [hit.text for hit in dense]
    llm = CompressedMemoryLLM(library=library, max_tokens=8)
    expected = library.compressor.generate(QUESTION, library.memories(dense), max_new_tokens=8)
    assert llm.invoke(format_memories(documents) + QUESTION) == expected


def test_an_index_that_outlives_the_library_is_noticed(library, corpus):
    documents = list(memory_documents(library))
    library.remove(corpus)
    llm = CompressedMemoryLLM(library=library)
    with pytest.raises(LibraryError, match=r"no longer in the library.*index outside the library"):
        llm.invoke(format_memories(documents) + "?")


# Embeddings.


def test_a_library_embeds_with_langchains_embeddings(tmp_path, compressor):
    embeddings = DeterministicFakeEmbedding(size=16)
    library = Library.create(tmp_path / "lc", compressor, embeddings, chunk_tokens=32, overlap_tokens=4)
    library.add([Source.from_text(line, f"line/{number}") for number, line in enumerate(LINES)])
    hit = CompressedMemoryRetriever(library=library, k=1, retrieval="dense").invoke(library.search("ferry")[0].text)[0]
    assert hit.metadata["score"] == pytest.approx(1, abs=1e-5)
    again = Library.open(tmp_path / "lc", compressor, embeddings)
    assert [h.id for h in again.search("ferry")] == [h.id for h in library.search("ferry")]
    with pytest.raises(LibraryError, match="was indexed with"):
        Library.open(tmp_path / "lc", compressor, FakeEmbedder()).search("ferry")


def test_embeddings_are_the_librarys(library):
    embeddings = MemoryEmbeddings(library.embedder)
    assert embeddings.embed_query(QUESTION) == library.embedder.embed_queries([QUESTION])[0].tolist()
    assert embeddings.embed_documents(LINES) == library.embedder.embed_documents(LINES).tolist()
    assert embeddings.embed_documents([]) == []
    with pytest.raises(InputError, match="is no embedder"):
        MemoryEmbeddings(object())
