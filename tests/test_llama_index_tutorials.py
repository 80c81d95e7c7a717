"""The pipelines of LlamaIndex's tutorials, with nothing but models and retrievers exchanged."""

from __future__ import annotations

import pytest

pytest.importorskip("llama_index.core")

from llama_index.core import (
    PromptTemplate,
    Settings,
    SimpleDirectoryReader,
    StorageContext,
    SummaryIndex,
    VectorStoreIndex,
    load_index_from_storage,
)
from llama_index.core.evaluation import FaithfulnessEvaluator, RelevancyEvaluator
from llama_index.core.indices.prompt_helper import PromptHelper
from llama_index.core.indices.query.query_transform import HyDEQueryTransform
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter, SentenceWindowNodeParser
from llama_index.core.postprocessor import (
    LongContextReorder,
    MetadataReplacementPostProcessor,
    SentenceEmbeddingOptimizer,
    SimilarityPostprocessor,
)
from llama_index.core.query_engine import (
    CitationQueryEngine,
    RetrieverQueryEngine,
    RouterQueryEngine,
    TransformQueryEngine,
)
from llama_index.core.response_synthesizers import get_response_synthesizer
from llama_index.core.retrievers import QueryFusionRetriever
from llama_index.core.schema import MetadataMode, NodeWithScore
from llama_index.core.selectors import LLMSingleSelector
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.tools import QueryEngineTool
from llama_index.core.workflow import Context, Event, StartEvent, StopEvent, Workflow, step

from ctxdocs.corpus import Document as Source
from ctxdocs.errors import InputError
from ctxdocs.integrations.llama_index import (
    CompressedMemoryLLM,
    CompressedMemoryQueryEngine,
    CompressedMemoryRetriever,
    MemoryEmbedding,
    MemoryIngestion,
    MemoryNodePostprocessor,
    memory_nodes,
)
from tests.conftest import TEXT

QUESTION = "When does the ferry sail?"
FERRY = "The ferry sails twice a day in winter."


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
def llm(library):
    return CompressedMemoryLLM(library=library, max_tokens=8)


@pytest.fixture
def retriever(library):
    return CompressedMemoryRetriever(library, k=2)


@pytest.fixture
def references(library):
    """The retriever for engines that take nodes' texts."""
    return CompressedMemoryRetriever(library, k=2, content="memory")


@pytest.fixture(autouse=True)
def settings(monkeypatch, embedder, llm):
    """LlamaIndex's global settings, as its tutorials set them."""
    for name in ("_llm", "_embed_model", "_tokenizer", "_prompt_helper", "_callback_manager", "_node_parser"):
        monkeypatch.setattr(Settings, name, None, raising=False)
    Settings.llm = llm
    Settings.embed_model = MemoryEmbedding(embedder)
    return Settings


def read_by(prompt):
    """How many memories stand in a prompt; no reference does."""
    assert "memory:" not in prompt
    return prompt.count("<4>")


# The starter tutorial.


def test_the_starter_tutorial(memories, corpus, prompts):
    """Files, an index, a query engine: the models come from the settings, memories with the postprocessor."""
    index = VectorStoreIndex.from_documents(SimpleDirectoryReader(str(corpus)).load_data())
    postprocessor = MemoryNodePostprocessor(library=memories)
    model = CompressedMemoryLLM(library=memories, max_tokens=8)
    engine = index.as_query_engine(llm=model, node_postprocessors=[postprocessor])
    answer = str(engine.query(QUESTION))
    assert read_by(prompts[-1]) == memories.info()["chunks"] >= 2
    streaming = index.as_query_engine(llm=model, node_postprocessors=[postprocessor], streaming=True)
    assert "".join(streaming.query(QUESTION).response_gen) == answer


def test_the_models_of_the_settings_alone(library, prompts):
    """An index of memories needs nothing else."""
    index = VectorStoreIndex(list(memory_nodes(library)))
    assert str(index.as_query_engine(similarity_top_k=2).query(QUESTION))
    assert read_by(prompts[0]) == 2
    assert str(SummaryIndex(list(memory_nodes(library))).as_query_engine().query(QUESTION))
    assert read_by(prompts[1]) == 3


@pytest.mark.parametrize("mode", ["context", "condense_question", "condense_plus_context", "best"])
def test_chat_engines_of_an_index(library, prompts, mode):
    chat = VectorStoreIndex(list(memory_nodes(library))).as_chat_engine(chat_mode=mode, similarity_top_k=2)
    chat.chat(QUESTION)
    assert read_by(prompts[-1]) == 2
    prompts.clear()
    assert "".join(chat.stream_chat("And in summer?").response_gen)
    assert read_by(prompts[-1]) == 2
    assert len(chat.chat_history) == 4


def test_what_is_kept_on_disk_is_read_from_there(library, prompts, tmp_path):
    VectorStoreIndex(list(memory_nodes(library))).storage_context.persist(str(tmp_path / "storage"))
    index = load_index_from_storage(StorageContext.from_defaults(persist_dir=str(tmp_path / "storage")))
    engine = index.as_query_engine(similarity_top_k=1)
    response = engine.query(QUESTION)
    assert response.source_nodes[0].node.text == FERRY
    assert read_by(prompts[0]) == 1
    # A reference is to what stands in the library: a document that is gone is missed, not passed over.
    library.remove(response.source_nodes[0].metadata["source"])
    with pytest.raises(Exception, match="no longer in the library"):
        engine.query(QUESTION)


@pytest.mark.parametrize("kind", ["faiss", "chroma"])
def test_vector_stores(library, prompts, tmp_path, kind):
    if kind == "faiss":
        stores = pytest.importorskip("llama_index.vector_stores.faiss")
        import faiss

        store = stores.FaissVectorStore(faiss_index=faiss.IndexFlatL2(64))
        VectorStoreIndex(
            list(memory_nodes(library)), storage_context=StorageContext.from_defaults(vector_store=store)
        ).storage_context.persist(str(tmp_path / "storage"))
        store = stores.FaissVectorStore.from_persist_dir(str(tmp_path / "storage"))
        context = StorageContext.from_defaults(vector_store=store, persist_dir=str(tmp_path / "storage"))
        index = load_index_from_storage(context)
    else:
        stores = pytest.importorskip("llama_index.vector_stores.chroma")
        import chromadb

        collection = chromadb.PersistentClient(str(tmp_path / "chroma")).create_collection("memories")
        store = stores.ChromaVectorStore(chroma_collection=collection)
        VectorStoreIndex(list(memory_nodes(library)), storage_context=StorageContext.from_defaults(vector_store=store))
        index = VectorStoreIndex.from_vector_store(store)
    response = index.as_query_engine(similarity_top_k=2).query(QUESTION)
    assert response.source_nodes[0].node.text == FERRY
    assert read_by(prompts[0]) == 2


# Texts in place of templates.


def test_the_text_is_the_text_or_the_reference(retriever, references, library):
    plain, referring = retriever.retrieve(QUESTION), references.retrieve(QUESTION)
    assert [found.node.text for found in referring] == [found.metadata["memory"] for found in plain]
    assert [found.metadata["text"] for found in referring] == [found.node.text for found in plain]
    for mode in MetadataMode.LLM, MetadataMode.EMBED:
        assert [found.node.get_content(mode) for found in referring] == [found.node.text for found in referring]
    assert [found.node.node_id for found in referring] == [found.node.node_id for found in plain]
    assert [found.node.ref_doc_id for found in referring] == [found.node.ref_doc_id for found in plain]
    made = MemoryNodePostprocessor(library=library, content="memory").postprocess_nodes(plain)
    assert [found.node for found in made] == [found.node for found in referring]
    with pytest.raises(InputError, match="unknown content 'texts'"):
        CompressedMemoryRetriever(library, content="texts")


def test_citations(references, prompts):
    """The engine writes its numbers into nodes' texts, so that these have to be the references."""
    engine = CitationQueryEngine.from_args(None, retriever=references, llm=Settings.llm, citation_chunk_size=256)
    response = engine.query(QUESTION)
    assert "Source 1:\n<4>" in prompts[0]
    assert "Source 2:\n<4>" in prompts[0]
    assert read_by(prompts[0]) == 2
    assert response.source_nodes[0].metadata["text"] == FERRY


# Between being found and being read.


def test_postprocessors_in_front(retriever, prompts):
    engine = RetrieverQueryEngine.from_args(
        retriever,
        node_postprocessors=[
            SimilarityPostprocessor(similarity_cutoff=0.0),
            LongContextReorder(),
            SentenceEmbeddingOptimizer(percentile_cutoff=0.5, tokenizer_fn=lambda text: text.split(" ")),
        ],
    )
    assert str(engine.query(QUESTION))
    assert read_by(prompts[0]) == 2


def test_sentence_windows(memories, prompts):
    """What is compressed is the window that another postprocessor has put in place of the sentence."""
    parser = SentenceWindowNodeParser.from_defaults(window_size=1, sentence_splitter=lambda text: text.split(". "))
    from llama_index.core import Document

    index = VectorStoreIndex(
        parser.get_nodes_from_documents([Document(text="One came. Two went. Three sang. Four sat")])
    )
    engine = index.as_query_engine(
        llm=CompressedMemoryLLM(library=memories, max_tokens=4),
        similarity_top_k=1,
        node_postprocessors=[
            MetadataReplacementPostProcessor(target_metadata_key="window"),
            MemoryNodePostprocessor(library=memories),
        ],
    )
    engine.query("Four sat")
    assert [chunk.text for chunk in memories.store.chunks([1])] == ["Three sang Four sat"]
    assert read_by(prompts[0]) == 1


# Engines on engines.


def test_a_router_whose_model_answers_no_json_says_so(library):
    tool = QueryEngineTool.from_defaults(
        CompressedMemoryQueryEngine.from_library(library, max_tokens=2), description="x"
    )
    with pytest.raises(ValueError, match="JSON"):
        RouterQueryEngine(LLMSingleSelector.from_defaults(), [tool, tool]).query(QUESTION)


def test_a_hypothetical_document(library, prompts):
    engine = TransformQueryEngine(
        CompressedMemoryQueryEngine.from_library(library, k=2, max_tokens=4), HyDEQueryTransform(include_original=True)
    )
    assert str(engine.query(QUESTION))
    assert [read_by(prompt) for prompt in prompts] == [0, 2]


def test_queries_fused(retriever, prompts):
    fused = QueryFusionRetriever([retriever], num_queries=2, similarity_top_k=2, use_async=False)
    assert str(RetrieverQueryEngine.from_args(fused).query(QUESTION))
    assert read_by(prompts[-1]) == 2


def test_evaluators_read_texts(library, llm, prompts):
    """A judge reads what was found as text: it is not to be asked about what it cannot see."""
    response = CompressedMemoryQueryEngine.from_library(library, k=2, max_tokens=4).query(QUESTION)
    prompts.clear()
    FaithfulnessEvaluator(llm=llm).evaluate_response(response=response)
    RelevancyEvaluator(llm=llm).evaluate_response(query=QUESTION, response=response)
    assert all(FERRY in prompt and not read_by(prompt) for prompt in prompts)


def test_a_template_of_one_s_own(library, llm, retriever, prompts):
    template = PromptTemplate("Question: {query_str}\nContext: {context_str}\nAnswer: ")
    engine = RetrieverQueryEngine.from_args(retriever, text_qa_template=template)
    assert str(engine.query(QUESTION))
    assert prompts == [f"<4><4>Question: Question: {QUESTION}\nContext: \n\n\nAnswer: \nAnswer:"]


async def test_a_workflow(library, llm, retriever, prompts):
    class Found(Event):
        nodes: list[NodeWithScore]

    class Answering(Workflow):
        @step
        async def retrieve(self, ctx: Context, ev: StartEvent) -> Found:
            await ctx.store.set("query", ev.query)
            return Found(nodes=await retriever.aretrieve(ev.query))

        @step
        async def synthesize(self, ctx: Context, ev: Found) -> StopEvent:
            synthesizer = get_response_synthesizer(llm=llm, streaming=True, use_async=True)
            return StopEvent(result=await synthesizer.asynthesize(await ctx.store.get("query"), nodes=ev.nodes))

    response = await Answering(timeout=60).run(query=QUESTION)
    pieces = [piece async for piece in response.async_response_gen()]
    assert "".join(pieces) == str(RetrieverQueryEngine.from_args(retriever, llm=llm).query(QUESTION))
    assert [read_by(prompt) for prompt in prompts] == [2, 2]


# Ingestion, and how prompts are packed.


def test_ingestion_with_a_document_store(memories, corpus):
    documents = SimpleDirectoryReader(str(corpus), filename_as_id=True).load_data()
    pipeline = IngestionPipeline(
        transformations=[SentenceSplitter(), MemoryIngestion(library=memories)], docstore=SimpleDocumentStore()
    )
    assert len(pipeline.run(documents=documents)) == 3
    assert pipeline.run(documents=documents) == []
    assert memories.info()["documents"] == 3


def test_a_reference_counts_as_its_slots(library, llm, retriever):
    (found, *_) = retriever.retrieve(QUESTION)
    text = f"Read {found.metadata['memory']} now."
    assert len(llm.token_ids(text)) == len(llm.token_ids("Read ")) + 4 + len(llm.token_ids(" now."))


def test_many_memories_are_packed_by_what_they_take(make_library, prompts):
    """LlamaIndex counts a reference as text; told the model's own count, it fills a prompt."""
    library = make_library("many")
    library.add([Source.from_text(f"{number} {line}", f"{number}") for number in range(25) for line in [TEXT[:60]]])
    model = CompressedMemoryLLM(library=library, max_tokens=4)
    count = library.info()["chunks"]
    helper = PromptHelper.from_llm_metadata(model.metadata, tokenizer=model.token_ids)
    for given in (None, helper):
        prompts.clear()
        synthesizer = get_response_synthesizer(llm=model, prompt_helper=given)
        RetrieverQueryEngine(CompressedMemoryRetriever(library, k=count), synthesizer).query(QUESTION)
        assert sum(map(read_by, prompts)) == count
    assert len(prompts) == 1
