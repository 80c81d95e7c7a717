"""LlamaIndex's own pipelines over memories: indices, ingestion, engines of engines, chat, embeddings."""

from __future__ import annotations

import pickle

import pytest

pytest.importorskip("llama_index.core")

from llama_index.core import Document, MockEmbedding, StorageContext, VectorStoreIndex, load_index_from_storage
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.chat_engine import CondensePlusContextChatEngine, ContextChatEngine, SimpleChatEngine
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.postprocessor import SimilarityPostprocessor
from llama_index.core.query_engine import RetrieverQueryEngine, RouterQueryEngine, SubQuestionQueryEngine
from llama_index.core.question_gen.types import BaseQuestionGenerator, SubQuestion
from llama_index.core.retrievers import QueryFusionRetriever
from llama_index.core.schema import IndexNode, MetadataMode, NodeWithScore, TextNode
from llama_index.core.selectors import EmbeddingSingleSelector
from llama_index.core.tools import QueryEngineTool
from pydantic import ValidationError

from ctxdocs.corpus import Document as Source
from ctxdocs.errors import InputError, LibraryError
from ctxdocs.integrations.llama_index import (
    CompressedMemoryChatEngine,
    CompressedMemoryLLM,
    CompressedMemoryQueryEngine,
    CompressedMemoryRetriever,
    CompressedMemorySynthesizer,
    MemoryEmbedding,
    MemoryIngestion,
    MemoryNodePostprocessor,
    memory_nodes,
)
from ctxdocs.library import Library
from tests.conftest import TEXT, FakeEmbedder

QUESTION = "When does the ferry sail?"
LINES = TEXT.splitlines()


@pytest.fixture
def library(make_library, corpus):
    library = make_library()
    library.add(corpus)
    return library


@pytest.fixture
def memories(make_library):
    """A library that keeps what a postprocessor makes."""
    return make_library("memories")


@pytest.fixture
def embedding(embedder):
    return MemoryEmbedding(embedder)


@pytest.fixture
def index(embedding):
    """An index of texts, as any application has it."""
    documents = [
        Document(text=line, id_=f"line/{number}", metadata={"line": number}) for number, line in enumerate(LINES)
    ]
    splitter = SentenceSplitter(chunk_size=64, chunk_overlap=8)
    return VectorStoreIndex.from_documents(documents, embed_model=embedding, transformations=[splitter])


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


def found(*texts, **metadata):
    return [NodeWithScore(node=TextNode(text=text, metadata=metadata), score=0.5) for text in texts]


# Nodes of any index.


def test_nodes_of_any_index_get_memories_that_the_model_reads(memories, index, compressed):
    llm = CompressedMemoryLLM(library=memories, max_tokens=8)
    postprocessor = MemoryNodePostprocessor(library=memories)
    engine = index.as_query_engine(llm=llm, similarity_top_k=2, node_postprocessors=[postprocessor])
    response = engine.query(QUESTION)
    nodes = response.source_nodes
    texts = [f"line: {node.metadata['line']}\n\n{node.text}" for node in nodes]
    assert all(node.get_content(MetadataMode.LLM) == node.metadata["memory"] for node in nodes)
    assert memories.info()["documents"] == 2
    assert compressed == [sum(node.metadata["memory"].count("[[memory:") for node in nodes)]
    assert str(engine.query(QUESTION)) == str(response)
    assert len(compressed) == 1
    synthesizer = CompressedMemorySynthesizer(llm=llm)
    given = llm.complete(QUESTION, contents=texts)
    assert str(synthesizer.synthesize(QUESTION, nodes)) == given.text
    assert len(given.raw["sources"]) == 0 < given.raw["usage"]["memory_slots"]
    assert index.docstore.docs[nodes[0].node_id].get_content() == nodes[0].text
    assert "memory" not in index.docstore.docs[nodes[0].node_id].metadata  # the index is left alone


def test_our_synthesizer_behind_any_index(memories, index):
    synthesizer = CompressedMemorySynthesizer(memories, max_tokens=8)
    postprocessor = MemoryNodePostprocessor(library=memories)
    kept = RetrieverQueryEngine(index.as_retriever(), synthesizer, node_postprocessors=[postprocessor])
    passing = RetrieverQueryEngine(index.as_retriever(), synthesizer)
    assert str(passing.query(QUESTION)) == str(kept.query(QUESTION))


def test_behind_other_postprocessors(memories, index):
    best, *others = (node.score for node in index.as_retriever(similarity_top_k=3).retrieve(QUESTION))
    cutoff = SimilarityPostprocessor(similarity_cutoff=(best + max(others)) / 2)
    engine = index.as_query_engine(
        llm=CompressedMemoryLLM(library=memories, max_tokens=4),
        similarity_top_k=3,
        node_postprocessors=[cutoff, MemoryNodePostprocessor(library=memories)],
    )
    assert len(engine.query(QUESTION).source_nodes) == memories.info()["documents"] == 1


async def test_postprocessing_asynchronously(memories):
    postprocessor = MemoryNodePostprocessor(library=memories)
    nodes = await postprocessor.apostprocess_nodes(found(LINES[0]), query_str=QUESTION)
    assert nodes[0].metadata == postprocessor.postprocess_nodes(found(LINES[0]))[0].metadata


def test_a_text_is_compressed_once(memories, compressed):
    postprocessor = MemoryNodePostprocessor(library=memories)
    first = postprocessor.postprocess_nodes(found(LINES[0], LINES[1], LINES[0]))
    assert first[0].metadata == first[2].metadata
    again = MemoryNodePostprocessor(library=memories.path.parent / "memories")
    assert [n.metadata for n in again.postprocess_nodes(found(LINES[1]))] == [first[1].metadata]
    assert postprocessor.postprocess_nodes(first) == first
    assert len(compressed) == 1
    assert [node.score for node in first] == [0.5] * 3


def test_what_language_models_are_not_shown_is_not_compressed(memories):
    postprocessor = MemoryNodePostprocessor(library=memories)
    plain, secret = found(LINES[0]), found(LINES[0], key="x")
    secret[0].node.excluded_llm_metadata_keys = ["key"]
    one, other = postprocessor.postprocess_nodes([*plain, *secret])
    assert one.metadata["memory"] == other.metadata["memory"]
    assert other.metadata["key"] == "x"


def test_documents_and_nodes_of_other_kinds(memories):
    postprocessor = MemoryNodePostprocessor(library=memories)
    whole = NodeWithScore(node=Document(text=LINES[0], metadata={"page": 3}))
    pointing = NodeWithScore(node=IndexNode(text=LINES[1], index_id="x"))
    given = postprocessor.postprocess_nodes([whole, pointing])
    assert [type(found.node) for found in given] == [Document, IndexNode]
    assert all(found.node.get_content(MetadataMode.LLM) == found.metadata["memory"] != "" for found in given)
    assert [found.node.get_content() for found in given] == LINES[:2]


def test_texts_without_anything_to_read_have_no_memory(memories, compressed):
    postprocessor = MemoryNodePostprocessor(library=memories)
    (node,) = postprocessor.postprocess_nodes(found(" \n"))
    assert node.metadata["memory"] == ""
    assert postprocessor.postprocess_nodes([]) == []
    assert compressed == []


def test_nodes_of_another_library_get_a_memory_here(library, memories):
    nodes = CompressedMemoryRetriever(library, k=1).retrieve(QUESTION)
    (node,) = MemoryNodePostprocessor(library=memories).postprocess_nodes(nodes)
    assert node.metadata["memory"] != nodes[0].metadata["memory"]
    (chunk,) = memories.store.chunks([1])
    assert chunk.text == nodes[0].text.strip()


def test_a_library_that_is_being_written_says_so(memories):
    postprocessor = MemoryNodePostprocessor(library=memories)
    with memories.store.writer(), pytest.raises(LibraryError, match="is being written to"):
        postprocessor.postprocess_nodes(found("new"))
    with pytest.raises(LibraryError, match="does not exist"):
        MemoryNodePostprocessor(library=memories.path / "nothing")
    with pytest.raises(ValidationError):
        MemoryNodePostprocessor(library=memories, k=3)


# A library as nodes of any index.


def test_every_chunk_is_a_node(library):
    library.add(Source.from_text("Rule one. " * 20, "rule", {"year": 2025, "tags": ["a"], "by": {"name": "x"}}))
    nodes = list(memory_nodes(library))
    assert len({node.node_id for node in nodes}) == len(nodes) == library.store.counts().chunks > 4
    assert [node.node_id for node in memory_nodes(library.path)] == [node.node_id for node in nodes]
    rule = next(node for node in nodes if node.metadata["source"] == "rule")
    assert rule.metadata["year"] == 2025
    assert not {"tags", "by"} & set(rule.metadata)


def test_another_index_than_the_librarys_own(library, embedding, tmp_path):
    llm = CompressedMemoryLLM(library=library, max_tokens=8)
    index = VectorStoreIndex(list(memory_nodes(library)), embed_model=embedding)
    dense = library.search(QUESTION, k=2, retrieval="dense")
    response = RetrieverQueryEngine(index.as_retriever(similarity_top_k=2), CompressedMemorySynthesizer(llm=llm)).query(
        QUESTION
    )
    assert [node.text for node in response.source_nodes] == [hit.text for hit in dense]
    assert str(response) == library.ask(QUESTION, k=2, retrieval="dense", max_new_tokens=8).text
    index.storage_context.persist(tmp_path / "index")
    storage = StorageContext.from_defaults(persist_dir=str(tmp_path / "index"))
    again = load_index_from_storage(storage, embed_model=embedding).as_retriever(similarity_top_k=2).retrieve(QUESTION)
    assert [node.get_content(MetadataMode.LLM) for node in again] == [
        node.metadata["memory"] for node in response.source_nodes
    ]


def test_an_index_that_outlives_the_library_is_noticed(library, corpus):
    nodes = [NodeWithScore(node=node) for node in memory_nodes(library)]
    library.remove(corpus)
    with pytest.raises(LibraryError, match=r"no longer in the library.*index outside the library"):
        CompressedMemorySynthesizer(library).synthesize(QUESTION, nodes)


def test_retrievers_of_llama_index_around_ours(library, embedding):
    llm = CompressedMemoryLLM(library=library, max_tokens=4)
    index = VectorStoreIndex(list(memory_nodes(library)), embed_model=embedding)
    both = QueryFusionRetriever(
        [CompressedMemoryRetriever(library, k=2), index.as_retriever(similarity_top_k=2)],
        llm=llm,
        num_queries=1,
        mode="reciprocal_rerank",
        use_async=False,
    )
    nodes = both.retrieve(QUESTION)
    assert {node.text for node in nodes[:2]} <= {hit.text for hit in library.search(QUESTION, k=3)}
    assert str(CompressedMemorySynthesizer(llm=llm).synthesize(QUESTION, nodes)) != ""


# Ingestion.


def pipeline(library, **settings):
    splitter = SentenceSplitter(chunk_size=48, chunk_overlap=0)
    return IngestionPipeline(transformations=[splitter, MemoryIngestion(library=library)], **settings)


def test_a_pipeline_fills_a_library(memories):
    documents = [Document(text=TEXT, id_="harbour", metadata={"year": 1874}), Document(text=LINES[0], id_="rock")]
    nodes = pipeline(memories).run(documents=documents)
    counts = memories.store.counts()
    assert counts.documents == len(nodes) > 2
    assert all(node.get_content(MetadataMode.LLM) == node.metadata["memory"] for node in nodes)
    response = CompressedMemoryQueryEngine.from_library(
        memories, k=9, filters={"year": 1874}, max_tokens=4, retrieval="dense"
    ).query(QUESTION)
    assert {node.node.ref_doc_id for node in response.source_nodes} == {"harbour"}
    rock = next(document.uri for document in memories.store.documents() if document.uri.startswith("rock#"))
    assert len(response.source_nodes) == counts.chunks - len(memories.store.chunk_ids([rock]))


def test_what_is_there_is_not_compressed_again_and_what_changed_is_replaced(memories, compressed):
    documents = [Document(text=TEXT, id_="harbour"), Document(text=LINES[0], id_="rock")]
    first = pipeline(memories).run(documents=documents)
    assert len(compressed) == 1
    again = pipeline(memories).run(documents=documents)
    assert len(compressed) == 1
    assert [node.metadata["memory"] for node in again] == [node.metadata["memory"] for node in first]
    pipeline(memories).run(documents=[Document(text="A new text.", id_="harbour")])
    names = sorted(document.metadata["ref_doc_id"] for document in memories.store.documents())
    assert names == ["harbour", "rock"]


async def test_a_pipeline_runs_asynchronously_and_embeds_texts(memories, embedding):
    steps = [SentenceSplitter(chunk_size=48, chunk_overlap=0), MemoryIngestion(library=memories), embedding]
    nodes = await IngestionPipeline(transformations=steps).arun(documents=[Document(text=TEXT, id_="harbour")])
    assert nodes[0].embedding == pytest.approx(embedding.get_text_embedding(nodes[0].text))
    index = VectorStoreIndex(nodes, embed_model=embedding)
    engine = index.as_query_engine(llm=CompressedMemoryLLM(library=memories, max_tokens=4), similarity_top_k=1)
    assert "[[memory:" in (await engine.aquery(QUESTION)).source_nodes[0].get_content(MetadataMode.LLM)


def test_blank_nodes_and_metadata_that_are_no_json(memories):
    step = MemoryIngestion(library=memories)
    blank = TextNode(text=" ")
    assert step([blank]) == [blank]
    assert step([]) == []
    with pytest.raises(InputError, match="cannot be written as JSON"):
        step([TextNode(text="text", metadata={"when": object()})])
    assert memories.store.is_empty()
    with pytest.raises(LibraryError, match="does not exist"):
        MemoryIngestion(library=memories.path / "nothing")
    with pytest.raises(InputError, match=r"one process writes a library.*without num_workers"):
        pickle.dumps(step)


# Engines of engines.


class TwoQuestions(BaseQuestionGenerator):
    """Asks every tool the question as it is."""

    def generate(self, tools, query):
        return [SubQuestion(sub_question=query.query_str, tool_name=tool.name) for tool in tools]

    async def agenerate(self, tools, query):
        return self.generate(tools, query)

    def _get_prompts(self):
        return {}

    def _update_prompts(self, prompts):
        pass


@pytest.fixture
def tools(library, make_library):
    rules = make_library("rules")
    rules.add(Source.from_text("No lights after nine. No boats on Sunday.", "rules"))
    return [
        QueryEngineTool.from_defaults(
            CompressedMemoryQueryEngine.from_library(each, k=2, max_tokens=8), name=name, description=description
        )
        for each, name, description in ((library, "island", "ferry sail"), (rules, "rules", "what is forbidden"))
    ]


def test_a_router_chooses_between_libraries(library, tools, embedding):
    selector = EmbeddingSingleSelector.from_defaults(embed_model=embedding)
    router = RouterQueryEngine(selector, tools, llm=CompressedMemoryLLM(library=library))
    response = router.query(QUESTION)
    assert str(response) == library.ask(QUESTION, k=2, max_new_tokens=8).text
    assert router.query("forbidden").source_nodes[0].metadata["source"] == "rules"


@pytest.mark.parametrize("use_async", [False, True])
def test_sub_questions_to_several_libraries(library, tools, use_async):
    engine = SubQuestionQueryEngine(
        TwoQuestions(), CompressedMemorySynthesizer(library, max_tokens=8), tools, verbose=False, use_async=use_async
    )
    response = engine.query(QUESTION)
    answers = [str(tool.query_engine.query(QUESTION)) for tool in tools]
    contents = [f"Sub question: {QUESTION}\nResponse: {answer}" for answer in answers]
    expected = CompressedMemoryLLM(library=library, max_tokens=8).complete(QUESTION, contents=contents)
    assert str(response) == (expected.text or "None")
    assert {node.metadata.get("source") for node in response.source_nodes} >= {"rules", None}


# Chat engines.


@pytest.mark.parametrize("history", ["text", "memory"])
def test_a_chat_engine_reads_sources_and_history(library, history):
    engine = CompressedMemoryChatEngine.from_library(library, k=2, max_tokens=8, history=history)
    first = engine.chat(QUESTION)
    assert str(first) == library.ask(QUESTION, k=2, max_new_tokens=8).text
    assert len(first.source_nodes) == 2
    second = engine.chat("Who built it?")
    llm = CompressedMemoryLLM(library=library, max_tokens=8, history=history)
    nodes = CompressedMemoryRetriever(library, k=2).retrieve("Who built it?")
    messages = [ChatMessage(QUESTION), ChatMessage(str(first), role="assistant"), ChatMessage("Who built it?")]
    expected = llm.chat(messages, contents=[node.metadata["memory"] for node in nodes])
    assert str(second) == expected.message.content
    assert expected.raw["usage"]["memory_slots"] == 8 + (4 if history == "memory" else 0)
    assert [message.content for message in engine.chat_history] == [QUESTION, str(first), "Who built it?", str(second)]
    engine.reset()
    assert engine.chat_history == []
    assert str(engine.chat("Who built it?", chat_history=messages[:2])) == str(second)


async def test_a_chat_engine_streams_and_runs_asynchronously(library):
    def make():
        return CompressedMemoryChatEngine.from_library(library, k=2, max_tokens=8, system_prompt="Be brief.")

    engine = make()
    whole = [str(engine.chat(question)) for question in (QUESTION, "Why?")]
    assert whole[0] != library.ask(QUESTION, k=2, max_new_tokens=8).text
    streaming = make()
    for question, text in zip((QUESTION, "Why?"), whole, strict=True):
        response = streaming.stream_chat(question)
        assert "".join(response.response_gen) == text
        assert len(response.source_nodes) == 2
    assert streaming.chat_history == engine.chat_history
    waiting = make()
    assert [str(await waiting.achat(question)) for question in (QUESTION, "Why?")] == whole
    streaming = make()
    for question, text in zip((QUESTION, "Why?"), whole, strict=True):
        response = await streaming.astream_chat(question)
        assert "".join([piece async for piece in response.async_response_gen()]) == text
    assert [message.content for message in streaming.chat_history] == [m.content for m in engine.chat_history]


def test_a_chat_engine_over_any_index(memories, index):
    llm = CompressedMemoryLLM(library=memories, max_tokens=8)
    postprocessor = MemoryNodePostprocessor(library=memories)
    engine = CompressedMemoryChatEngine(
        index.as_retriever(), llm, node_postprocessors=[postprocessor], memory=ChatMemoryBuffer.from_defaults(llm=llm)
    )
    kept = engine.chat(QUESTION)
    passing = CompressedMemoryChatEngine(index.as_retriever(), llm).chat(QUESTION)
    assert str(kept) == str(passing)
    assert all("memory" in node.metadata for node in kept.source_nodes)


def test_llama_indexs_chat_engines(library):
    llm = CompressedMemoryLLM(library=library, max_tokens=8)
    retriever = CompressedMemoryRetriever(library, k=2)

    def memory():
        return ChatMemoryBuffer.from_defaults(llm=llm)

    context = ContextChatEngine.from_defaults(retriever, llm=llm, memory=memory(), context_template="{context_str}")
    nodes = retriever.retrieve(QUESTION)
    references = "\n\n".join(node.metadata["memory"] for node in nodes)
    expected = llm.chat([ChatMessage(references, role="system"), ChatMessage(QUESTION)])
    assert expected.raw["usage"]["memory_slots"] == 8
    assert str(context.chat(QUESTION)) == expected.message.content
    assert str(context.chat("Why?")) != ""
    condensing = CondensePlusContextChatEngine.from_defaults(retriever, llm=llm, memory=memory())
    assert len(condensing.chat(QUESTION).source_nodes) == 2
    simple = SimpleChatEngine.from_defaults(
        llm=CompressedMemoryLLM(library=library, k=2, max_tokens=8), memory=memory()
    )
    assert str(simple.chat(QUESTION)) == library.ask(QUESTION, k=2, max_new_tokens=8).text


def test_a_chat_engine_refuses_empty_messages(library):
    engine = CompressedMemoryChatEngine.from_library(library)
    with pytest.raises(InputError, match="query is empty"):
        engine.chat(" ")
    assert engine.chat_history == []


# Embeddings.


def test_a_library_embeds_with_llama_indexs_embeddings(tmp_path, compressor):
    class Letters(MockEmbedding):
        def _get_vector(self):
            return super()._get_vector()

        def _get_text_embedding(self, text):
            return [float(text.lower().count(letter)) for letter in "abcdefgh"]

        _get_query_embedding = _get_text_embedding

    embeddings = Letters(embed_dim=8)
    library = Library.create(tmp_path / "li", compressor, embeddings, chunk_tokens=32, overlap_tokens=4)
    library.add([Source.from_text(line, f"line/{number}") for number, line in enumerate(LINES)])
    text = library.search("ferry")[0].text
    (node,) = CompressedMemoryRetriever(library, k=1, retrieval="dense").retrieve(text)
    assert (node.text, node.score) == (text, pytest.approx(1, abs=1e-5))
    assert library.embedder.dimension == 8
    with pytest.raises(LibraryError, match="was indexed with"):
        Library.open(tmp_path / "li", compressor, FakeEmbedder()).search("ferry")


async def test_embeddings_are_the_librarys(library):
    embedding = MemoryEmbedding(library.embedder, embed_batch_size=2)
    query = library.embedder.embed_queries([QUESTION])[0].tolist()
    texts = library.embedder.embed_documents(LINES).tolist()
    assert embedding.get_query_embedding(QUESTION) == await embedding.aget_query_embedding(QUESTION) == query
    assert embedding.get_text_embedding_batch(LINES) == texts
    assert await embedding.aget_text_embedding_batch(LINES) == texts
    assert await embedding.aget_text_embedding(LINES[0]) == embedding.get_text_embedding(LINES[0]) == texts[0]
    assert embedding.model_name == "fake-bag-of-words"
    assert Library.create(library.path.parent / "round", library.compressor, embedding).embedder.dimension == 64
    with pytest.raises(InputError, match="is no embedder"):
        MemoryEmbedding(object())
