"""The pipelines of LangChain's tutorials, with nothing but the retriever and the model exchanged."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("langchain_core")

from langchain_core.chat_history import InMemoryChatMessageHistory
from langchain_core.documents import Document
from langchain_core.indexing import InMemoryRecordManager, index
from langchain_core.language_models import BaseChatModel, FakeListChatModel
from langchain_core.messages import AIMessage, HumanMessage, trim_messages
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder, PromptTemplate
from langchain_core.runnables import RunnableParallel, RunnablePassthrough
from langchain_core.runnables.history import RunnableWithMessageHistory
from langchain_core.tools import create_retriever_tool
from langchain_core.vectorstores import InMemoryVectorStore

from ctxdocs.corpus import Document as Source
from ctxdocs.integrations.langchain import (
    ChatCompressedMemory,
    CompressedMemoryLLM,
    CompressedMemoryRetriever,
    MemoryCompressor,
    MemoryEmbeddings,
    format_memories,
    memory_documents,
)
from tests.conftest import TEXT

QUESTION = "When does the ferry sail?"
FERRY = "The ferry sails twice a day in winter."
# LangChain's own for retrieval; the question stands in front of what it is about.
RAG_PROMPT = (
    "Use the following pieces of retrieved context to answer the question.\n"
    "Question: {question} \nContext: {context} \nAnswer:"
)


@pytest.fixture
def library(make_library, corpus):
    library = make_library()
    library.add(corpus)
    return library


@pytest.fixture
def memories(make_library):
    """A library that keeps what a document compressor makes."""
    return make_library("memories")


@pytest.fixture
def embeddings(embedder):
    return MemoryEmbeddings(embedder)


@pytest.fixture
def texts(embeddings):
    """A vector store of texts, as any application has it."""
    store = InMemoryVectorStore(embeddings)
    lines = TEXT.splitlines()
    store.add_documents([Document(id=str(n), page_content=line, metadata={"line": n}) for n, line in enumerate(lines)])
    return store


@pytest.fixture
def retriever(library):
    return CompressedMemoryRetriever(library=library, k=2)


@pytest.fixture
def references(library):
    """The retriever for chains that write a document's content into their prompts."""
    return CompressedMemoryRetriever(library=library, k=2, content="memory")


@pytest.fixture
def chat(library):
    return ChatCompressedMemory(library=library, max_tokens=8)


@pytest.fixture
def llm(library):
    return CompressedMemoryLLM(library=library, max_tokens=8)


def join(documents):
    """How LangChain's tutorials put documents into a prompt."""
    return "\n\n".join(document.page_content for document in documents)


def slots(message):
    return message.usage_metadata["input_token_details"]["memory_slots"]


# What a document's content is.


def test_text_that_is_copied_where_a_memory_could_be_read_is_noted_once(library, retriever, references, llm, caplog):
    prompt = PromptTemplate.from_template("{context}\n\n{question}")

    def ask(found):
        chain = {"context": found, "question": RunnablePassthrough()} | prompt | llm
        caplog.clear()
        chain.invoke(QUESTION)
        return [record.message for record in caplog.records if "text of chunks that have memories" in record.message]

    assert ask(retriever | format_memories) == []
    assert ask(references | join) == []
    llm.invoke("Something else altogether, which is long enough to be the text of a chunk of the library, and is not.")
    assert len(ask(retriever | join)) == 1
    assert ask(retriever | join) == []


def test_the_content_is_the_text_or_the_reference(retriever, references):
    plain, referring = retriever.invoke(QUESTION), references.invoke(QUESTION)
    assert [document.page_content for document in referring] == [document.metadata["memory"] for document in plain]
    assert [document.metadata.pop("text") for document in referring] == [document.page_content for document in plain]
    assert [document.metadata for document in referring] == [document.metadata for document in plain]
    assert [document.id for document in referring] == [document.id for document in plain]
    assert format_memories(referring) == format_memories(plain)
    assert (references | join).invoke(QUESTION) == "\n\n".join(document.metadata["memory"] for document in plain)
    with pytest.raises(ValueError, match="content"):
        CompressedMemoryRetriever(library=references.library, content="texts")


def test_a_compressor_turns_contents_into_references_and_back(library, references, retriever):
    plain, referring = retriever.invoke(QUESTION), references.invoke(QUESTION)
    assert MemoryCompressor(library=library, content="memory").compress(plain) == referring
    assert MemoryCompressor(library=library).compress(referring) == plain
    assert library.info()["documents"] == 3  # nothing was compressed for it
    # Metadata of the same name are a document's own while its text is its content.
    own = [document.model_copy(update={"metadata": {**document.metadata, "text": "mine"}}) for document in plain]
    assert MemoryCompressor(library=library).compress(own) == own


# Chains.


def test_the_first_chain_of_the_tutorials(library, references, chat, prompts):
    """``format_docs`` as everybody writes it."""
    template = ChatPromptTemplate.from_template("Context: {context}\n\nQuestion: {question}")
    chain = {"context": references | join, "question": RunnablePassthrough()} | template | chat | StrOutputParser()
    answer = chain.invoke(QUESTION)
    assert prompts == [f"Context: <4>\n\n<4>Question: \n\nQuestion: {QUESTION}\nAnswer:"]
    assert "".join(chain.stream(QUESTION)) == answer
    assert chain.batch([QUESTION] * 2) == [answer] * 2
    assert asyncio.run(chain.ainvoke(QUESTION)) == answer


def test_the_hub_s_prompt_has_its_question_asked(library, references, chat, llm, prompts):
    """In a prompt format that has a place for sources, the question is not left behind them."""
    template = ChatPromptTemplate.from_template(RAG_PROMPT)
    chain = {"context": references | format_memories, "question": RunnablePassthrough()} | template | chat
    assert slots(chain.invoke(QUESTION)) == 8
    head = "Use the following pieces of retrieved context to answer the question.\n"
    assert prompts == [f"<4><4>Question: {head}Question: {QUESTION} \nContext:  \nAnswer:\nAnswer:"]
    prompts.clear()
    (references | format_memories | (lambda memory: RAG_PROMPT.format(question=QUESTION, context=memory)) | llm).invoke(
        QUESTION
    )
    assert prompts == [f"{head}Question: {QUESTION} \nContext: <4><4> \nAnswer:"]  # an LLM's prompt stays as it is


@pytest.mark.parametrize("tail", ["", "\n", "\nAnswer:", "\n\nYour short answer:\n"])
def test_a_question_in_front_of_what_it_refers_to(retriever, chat, prompts, tail):
    context = format_memories(retriever.invoke(QUESTION))
    chat.invoke(f"{QUESTION}\n\nContext: {context}{tail}")
    assert prompts == [f"<4><4>Question: {QUESTION}\n\nContext: {tail}\nAnswer:"]


def test_sources_beside_the_answer(retriever, chat, prompts):
    template = ChatPromptTemplate.from_messages([("system", "{context}"), ("human", "{question}")])
    answer = RunnablePassthrough.assign(context=lambda given: format_memories(given["context"])) | template | chat
    chain = RunnableParallel(context=retriever, question=RunnablePassthrough()).assign(answer=answer)
    result = chain.invoke(QUESTION)
    assert result["context"][0].page_content == FERRY
    found = [document.metadata["source"] for document in result["context"]]
    assert [source["source"] for source in result["answer"].response_metadata["sources"]] == found
    assert slots(result["answer"]) == 8


async def test_events_of_a_chain(references, chat):
    template = ChatPromptTemplate.from_template("{context} {question}")
    chain = {"context": references | join, "question": RunnablePassthrough()} | template | chat
    events = [event async for event in chain.astream_events(QUESTION, version="v2")]
    names = {event["event"] for event in events}
    assert {"on_retriever_end", "on_chat_model_stream", "on_chat_model_end"} <= names
    (end,) = [event["data"]["output"] for event in events if event["event"] == "on_chat_model_end"]
    assert end.content == (await chain.ainvoke(QUESTION)).content
    assert slots(end) == 8


def test_retries_fallbacks_and_settings(retriever, chat):
    class Down(FakeListChatModel):
        def _call(self, *arguments, **options):
            raise ConnectionError("down")

    context = format_memories(retriever.invoke(QUESTION))
    whole = chat.invoke(f"{context}{QUESTION}")
    assert slots(whole) == 8
    fallback = Down(responses=[""]).with_fallbacks([chat])
    for model in (fallback, chat.with_retry(stop_after_attempt=2), chat.with_config(tags=["here"], callbacks=[])):
        assert model.invoke(f"{context}{QUESTION}").content == whole.content
    assert chat.bind(max_tokens=2).invoke(f"{context}{QUESTION}").usage_metadata["output_tokens"] == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("history", ["text", "memory"])
def test_a_conversation_with_a_history(library, retriever, prompts, history):
    """``RunnableWithMessageHistory``, as in the tutorials on conversations."""
    chat = ChatCompressedMemory(library=library, max_tokens=4, history=history)
    kept = {}
    template = ChatPromptTemplate.from_messages(
        [("system", "{context}"), MessagesPlaceholder("history"), ("human", "{question}")]
    )
    context = (lambda given: given["question"]) | retriever | format_memories
    chain = RunnableWithMessageHistory(
        RunnablePassthrough.assign(context=context) | template | chat,
        lambda name: kept.setdefault(name, InMemoryChatMessageHistory()),
        input_messages_key="question",
        history_messages_key="history",
    )
    session = {"configurable": {"session_id": "one"}}
    first = chain.invoke({"question": QUESTION}, config=session)
    second = chain.invoke({"question": "And in summer?"}, config=session)
    assert [message.type for message in kept["one"].messages] == ["human", "ai"] * 2
    assert slots(first) == 8
    assert slots(second) > 8 if history == "memory" else slots(second) == 8
    assert (QUESTION in prompts[-1]) == (history == "text")
    assert "memory:" not in "".join(prompts)


def test_messages_are_trimmed_by_what_is_read(library, retriever, chat):
    """A reference counts as its memory's slots, not as its letters."""
    context = format_memories(retriever.invoke(QUESTION))
    text = f"Read {context} now."
    assert chat.get_num_tokens(text) == CompressedMemoryLLM(library=library).get_num_tokens(text)
    assert chat.get_num_tokens(text) == chat.get_num_tokens("Read ") + 8 + chat.get_num_tokens(" now.")
    messages = [HumanMessage(f"{context} one"), AIMessage("yes"), HumanMessage("two")]
    budget = sum(chat.get_num_tokens_from_messages([message]) for message in messages)
    assert trim_messages(messages, max_tokens=budget, token_counter=chat) == messages
    kept = trim_messages(messages, max_tokens=budget - 1, token_counter=chat, start_on="human")
    assert kept == messages[2:]


# Retrievers and compressors of langchain-classic.


def test_stuffed_documents(references, retriever, chat, prompts):
    chains = pytest.importorskip("langchain_classic.chains")
    combine = pytest.importorskip("langchain_classic.chains.combine_documents")
    template = ChatPromptTemplate.from_messages([("system", "Know {context}"), ("human", "{input}")])
    stuff = combine.create_stuff_documents_chain(chat, template)
    result = chains.create_retrieval_chain(references, stuff).invoke({"input": QUESTION})
    assert prompts == [f"Know <4>\n\n<4>\n\nQuestion: {QUESTION}\nAnswer:"]
    assert result["context"][0].metadata["text"] == FERRY
    # The same, with the chunk's text as a document's content.
    in_memory = combine.create_stuff_documents_chain(
        chat, template, document_prompt=PromptTemplate.from_template("{memory}")
    )
    again = chains.create_retrieval_chain(retriever, in_memory).invoke({"input": QUESTION})
    assert again["answer"] == result["answer"]
    assert prompts[1] == prompts[0]


def test_a_retriever_that_knows_the_history(references, library, chat, prompts):
    chains = pytest.importorskip("langchain_classic.chains")
    combine = pytest.importorskip("langchain_classic.chains.combine_documents")
    rephrase = ChatPromptTemplate.from_messages(
        [("system", "Rephrase."), MessagesPlaceholder("chat_history"), ("human", "{input}")]
    )
    answer = ChatPromptTemplate.from_messages(
        [("system", "Know {context}"), MessagesPlaceholder("chat_history"), ("human", "{input}")]
    )
    chain = chains.create_retrieval_chain(
        chains.create_history_aware_retriever(chat, references, rephrase),
        combine.create_stuff_documents_chain(chat, answer),
    )
    history = [HumanMessage("Is there a ferry?"), AIMessage("Yes.")]
    chain.invoke({"input": QUESTION, "chat_history": history})
    assert len(prompts) == 2
    assert "<" not in prompts[0]
    assert prompts[1].startswith("Know <4>\n\n<4>\n\nQuestion: Is there a ferry?\nAnswer:Yes.")


def test_the_oldest_chain(references, llm, prompts):
    chains = pytest.importorskip("langchain_classic.chains")
    result = chains.RetrievalQA.from_chain_type(llm, retriever=references).invoke(QUESTION)
    assert result["result"]
    assert "\n\n<4>\n\n<4>\n\nQuestion: " in prompts[0]


def test_several_queries(library, retriever, chat, prompts):
    retrievers = pytest.importorskip("langchain_classic.retrievers")
    found = retrievers.MultiQueryRetriever.from_llm(retriever=retriever, llm=chat, include_original=True)
    context = format_memories(found.invoke(QUESTION))
    assert format_memories(retriever.invoke(QUESTION))[:60] in context
    assert slots(chat.invoke(f"{context}{QUESTION}")) == 4 * context.count("[[memory:")


def test_contextual_compression_of_any_retriever(memories, texts, prompts):
    chains = pytest.importorskip("langchain_classic.chains")
    combine = pytest.importorskip("langchain_classic.chains.combine_documents")
    retrievers = pytest.importorskip("langchain_classic.retrievers")
    retriever = retrievers.ContextualCompressionRetriever(
        base_compressor=MemoryCompressor(library=memories, content="memory"),
        base_retriever=texts.as_retriever(search_kwargs={"k": 2}),
    )
    chat = ChatCompressedMemory(library=memories, max_tokens=8)
    template = ChatPromptTemplate.from_messages([("system", "{context}"), ("human", "{input}")])
    chain = chains.create_retrieval_chain(retriever, combine.create_stuff_documents_chain(chat, template))
    result = chain.invoke({"input": QUESTION})
    assert memories.info()["documents"] == 2
    assert result["context"][0].metadata["text"] in TEXT
    assert prompts[0].count("<4>") == memories.info()["chunks"]
    assert "memory:" not in prompts[0]


def test_behind_splitters_and_filters(memories, texts, embeddings):
    compressors = pytest.importorskip("langchain_classic.retrievers.document_compressors")
    splitters = pytest.importorskip("langchain_text_splitters")
    pipeline = compressors.DocumentCompressorPipeline(
        transformers=[
            splitters.RecursiveCharacterTextSplitter(chunk_size=40, chunk_overlap=0),
            compressors.EmbeddingsFilter(embeddings=embeddings, k=2),
            MemoryCompressor(library=memories),
        ]
    )
    documents = pipeline.compress_documents(texts.similarity_search(QUESTION, k=2), QUESTION)
    assert len(documents) == memories.info()["documents"] == 2
    assert all(len(document.page_content) <= 40 for document in documents)
    chat = ChatCompressedMemory(library=memories, max_tokens=4)
    assert slots(chat.invoke(format_memories(documents) + QUESTION)) == 4 * memories.info()["chunks"]


def test_what_was_split_or_rewritten_has_a_memory_of_its_own(library, retriever):
    """A piece still carries the reference of the whole; it is another text."""
    splitters = pytest.importorskip("langchain_text_splitters")
    pieces = splitters.CharacterTextSplitter(separator=" ", chunk_size=20, chunk_overlap=0).split_documents(
        retriever.invoke(QUESTION)
    )
    assert len(pieces) > 2
    assert format_memories(pieces).count("[[memory:") == 2  # unless compressed anew, the wholes, each of them once
    made = MemoryCompressor(library=library).compress(pieces)
    assert len({document.metadata["memory"] for document in made}) == len(pieces)
    assert library.info()["documents"] == 3 + len(pieces)


def test_long_texts_keep_their_memories(memories, compressor):
    """A text of several chunks is known again by all of them."""
    compressor_of_documents = MemoryCompressor(library=memories)
    (document,) = compressor_of_documents.compress([Document(page_content=f"\n {TEXT}\n")])
    assert document.metadata["memory"].count("[[memory:") > 3
    chunks = memories.info()["chunks"]
    assert compressor_of_documents.compress([document]) == [document]
    assert memories.info()["chunks"] == chunks
    for text in (TEXT[:-40], TEXT[40:], TEXT.replace("ferry", "plane"), ""):
        changed = document.model_copy(update={"page_content": text})
        (made,) = compressor_of_documents.compress([changed])
        assert made.metadata["memory"] != document.metadata["memory"]


def test_retrievers_joined(library, embeddings, retriever, chat):
    retrievers = pytest.importorskip("langchain_classic.retrievers")
    store = InMemoryVectorStore(embeddings)
    store.add_documents(list(memory_documents(library)))
    both = retrievers.EnsembleRetriever(
        retrievers=[retriever, store.as_retriever(search_kwargs={"k": 2})], weights=[0.5, 0.5]
    )
    documents = both.invoke(QUESTION)
    assert documents[0].page_content == FERRY
    assert len(documents) == len({document.page_content for document in documents})
    message = chat.invoke(format_memories(documents) + QUESTION)
    assert slots(message) == 4 * len(documents)


def test_an_extractor_that_reads_memories(references, chat, prompts):
    retrievers = pytest.importorskip("langchain_classic.retrievers")
    compressors = pytest.importorskip("langchain_classic.retrievers.document_compressors")
    retriever = retrievers.ContextualCompressionRetriever(
        base_compressor=compressors.LLMChainExtractor.from_llm(chat), base_retriever=references
    )
    retriever.invoke(QUESTION)
    assert len(prompts) == 2
    assert all("<4>" in prompt and "memory:" not in prompt for prompt in prompts)


# Stores.


@pytest.fixture(params=["faiss", "chroma"])
def make_store(request, tmp_path, embeddings):
    """Make a store of documents, and open it again as another process would."""
    if request.param == "faiss":
        pytest.importorskip("langchain_community")
        from langchain_community.vectorstores import FAISS

        def make(documents):
            FAISS.from_documents(documents, embeddings).save_local(str(tmp_path / "faiss"))
            return FAISS.load_local(str(tmp_path / "faiss"), embeddings, allow_dangerous_deserialization=True)

    else:
        chroma = pytest.importorskip("langchain_chroma")

        def make(documents):
            folder = str(tmp_path / "chroma")
            chroma.Chroma.from_documents(documents, embeddings, persist_directory=folder)
            return chroma.Chroma(persist_directory=folder, embedding_function=embeddings)

    return make


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_library_in_another_store(library, make_store, retriever, chat):
    library.add(Source.from_text("Mixed metadata.", "mixed", {"tags": ["a"], "year": 2025, "none": None, "ok": True}))
    store = make_store(list(memory_documents(library)))
    found = store.as_retriever(search_kwargs={"k": 1}).invoke(QUESTION)
    assert found[0].metadata["memory"] == retriever.invoke(QUESTION)[0].metadata["memory"]
    library_s = library.compressor.generate([*library.memories(library.search(QUESTION, k=1)), QUESTION])
    assert CompressedMemoryLLM(library=library).invoke(format_memories(found) + QUESTION) == library_s
    # In a chain that joins contents by itself.
    context = store.as_retriever(search_kwargs={"k": 2}) | MemoryCompressor(library=library, content="memory").compress
    assert slots((context | join | chat).invoke(QUESTION)) == 8


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_store_of_texts(memories, make_store):
    store = make_store([Document(page_content=line, metadata={"line": n}) for n, line in enumerate(TEXT.splitlines())])
    context = store.as_retriever(search_kwargs={"k": 2}) | MemoryCompressor(library=memories).compress | format_memories
    assert slots((context | ChatCompressedMemory(library=memories, max_tokens=4)).invoke(QUESTION)) == (
        4 * memories.info()["chunks"]
    )


def test_an_index_is_kept_up_to_date(library, embeddings):
    """LangChain's indexing API: what is the same is skipped, what is gone is deleted."""
    store, kept = InMemoryVectorStore(embeddings), InMemoryRecordManager("memories")
    kept.create_schema()
    how = {"cleanup": "full", "source_id_key": "source", "key_encoder": "sha256"}
    assert index(list(memory_documents(library)), kept, store, **how)["num_added"] == 3
    assert index(list(memory_documents(library)), kept, store, **how)["num_skipped"] == 3
    gone = store.similarity_search(QUESTION, k=1)[0]
    library.remove(gone.metadata["source"])
    assert index(list(memory_documents(library)), kept, store, **how)["num_deleted"] == 1
    assert gone.metadata["memory"] not in format_memories(store.similarity_search(QUESTION, k=3))


def test_small_pieces_find_whole_documents(memories, embeddings):
    retrievers = pytest.importorskip("langchain_classic.retrievers")
    storage = pytest.importorskip("langchain_classic.storage")
    splitters = pytest.importorskip("langchain_text_splitters")
    retriever = retrievers.ParentDocumentRetriever(
        vectorstore=InMemoryVectorStore(embeddings),
        docstore=storage.InMemoryStore(),
        child_splitter=splitters.RecursiveCharacterTextSplitter(chunk_size=20, chunk_overlap=0),
    )
    retriever.add_documents([Document(page_content=line) for line in TEXT.splitlines()])
    documents = (retriever | MemoryCompressor(library=memories).compress).invoke(QUESTION)
    assert {document.page_content for document in documents} <= set(TEXT.splitlines())
    assert memories.info()["documents"] == len(documents)


# Agents and graphs.


def test_tools_are_refused_as_langchain_expects(retriever, chat):
    tool = create_retriever_tool(retriever, "search", "Searches the library.")
    # LangChain takes a class that overrides bind_tools for one that calls tools: its suites, for example.
    assert type(chat).bind_tools is BaseChatModel.bind_tools
    agents = pytest.importorskip("langchain.agents")
    agent = agents.create_agent(chat, tools=[tool])
    with pytest.raises(NotImplementedError):
        agent.invoke({"messages": [HumanMessage(QUESTION)]})


def test_the_retriever_as_a_tool(retriever, references, library):
    assert create_retriever_tool(retriever, "search", "x").invoke({"query": QUESTION}).startswith(FERRY)
    handed = create_retriever_tool(references, "search", "x").invoke({"query": QUESTION})
    memories = library.memories(library.search(QUESTION, k=2))
    expected = library.compressor.generate([memories[0], "\n\n", memories[1], QUESTION], max_new_tokens=8)
    assert CompressedMemoryLLM(library=library, max_tokens=8).invoke(handed + QUESTION) == expected


def test_an_agent_in_two_steps(retriever, chat, prompts):
    """What the tutorials call a RAG chain: middleware searches, the model is called once."""
    agents = pytest.importorskip("langchain.agents")
    middleware = pytest.importorskip("langchain.agents.middleware")

    @middleware.dynamic_prompt
    def with_context(request):
        return f"Know {format_memories(retriever.invoke(request.state['messages'][-1].text))}"

    agent = agents.create_agent(chat, tools=[], middleware=[with_context])
    message = agent.invoke({"messages": [HumanMessage(QUESTION)]})["messages"][-1]
    assert slots(message) == 8
    assert prompts == [f"Know <4><4>\n\nQuestion: {QUESTION}\nAnswer:"]


def test_an_agent_that_keeps_its_sources(references, chat, prompts):
    """The tutorial's other one: the message itself is rewritten, what it refers to at its end."""
    agents = pytest.importorskip("langchain.agents")
    middleware = pytest.importorskip("langchain.agents.middleware")

    class State(middleware.AgentState):
        context: list[Document]

    class Search(middleware.AgentMiddleware[State]):
        state_schema = State

        def before_model(self, state, runtime):
            last = state["messages"][-1]
            found = references.invoke(last.text)
            told = f"{last.text}\n\nUse the following context to answer the query:\n{join(found)}"
            return {"messages": [last.model_copy(update={"content": told})], "context": found}

    agent = agents.create_agent(chat, tools=[], middleware=[Search()])
    result = agent.invoke({"messages": [HumanMessage(QUESTION)]})
    assert result["context"][0].metadata["text"] == FERRY
    assert slots(result["messages"][-1]) == 8
    assert prompts[0].startswith(f"<4><4>Question: {QUESTION}\n\nUse the following context")


def test_a_graph_keeps_references_in_its_checkpoints(library, retriever, chat, prompts):
    """LangGraph's retrieve and generate, with a thread that is gone on with."""
    graph = pytest.importorskip("langgraph.graph")
    memory = pytest.importorskip("langgraph.checkpoint.memory")

    class State(graph.MessagesState):
        context: list[Document]

    def retrieve(state):
        return {"context": retriever.invoke(state["messages"][-1].text)}

    def generate(state):
        system = ("system", f"Know {format_memories(state['context'])}")
        return {"messages": [chat.invoke([system, *state["messages"]])]}

    builder = graph.StateGraph(State).add_sequence([retrieve, generate]).add_edge(graph.START, "retrieve")
    app = builder.compile(checkpointer=memory.InMemorySaver())
    thread = {"configurable": {"thread_id": "one"}}
    app.invoke({"messages": [HumanMessage(QUESTION)]}, thread)
    state = app.invoke({"messages": [HumanMessage("Who built the lighthouse?")]}, thread)
    assert len(state["messages"]) == 4
    assert slots(state["messages"][-1]) == 8
    assert prompts[1].startswith(f"Know <4><4>\n\nQuestion: {QUESTION}\nAnswer:")
    kept = app.get_state(thread).values["context"]
    assert format_memories(kept) == format_memories(retriever.invoke("Who built the lighthouse?"))
