"""The LlamaIndex LLM, retriever, synthesizer and query engine over a library of a tiny model."""

from __future__ import annotations

import asyncio
import copy
import subprocess
import sys
import time

import pytest

pytest.importorskip("llama_index.core")

from llama_index.core import PromptTemplate
from llama_index.core.base.llms.types import ChatMessage, ImageBlock, MessageRole
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import get_response_synthesizer
from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode
from llama_index.core.vector_stores import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters
from pydantic import Field, ValidationError

from ctxdocs.corpus import Document
from ctxdocs.errors import ContextTooLong, FingerprintMismatch, InputError, LibraryError
from ctxdocs.integrations.llama_index import (
    CompressedMemoryLLM,
    CompressedMemoryQueryEngine,
    CompressedMemoryRetriever,
    CompressedMemorySynthesizer,
)
from ctxdocs.library import Library
from ctxdocs.sharing import shared_model
from tests.conftest import TEXT, FakeEmbedder, tiny_autocompressor

QUESTION = "When does the ferry sail?"
LINES = TEXT.splitlines()
CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def library(make_library, corpus):
    library = make_library()
    library.add(corpus)
    return library


@pytest.fixture
def llm(library):
    return CompressedMemoryLLM(library=library, max_tokens=8)


@pytest.fixture
def retriever(library):
    return CompressedMemoryRetriever(library, k=2)


@pytest.fixture
def engine(library):
    return CompressedMemoryQueryEngine.from_library(library, k=2, max_tokens=8)


def references(nodes):
    return "".join(node.get_content(MetadataMode.LLM) for node in nodes)


# The LLM.


def test_with_k_it_answers_as_the_library_does(library, llm):
    answer = library.ask(QUESTION, k=2, max_new_tokens=8)
    response = llm.complete(QUESTION, k=2)
    assert response.text == answer.text != ""
    assert CompressedMemoryLLM(library=library, k=2, max_new_tokens=8).complete(QUESTION).text == answer.text
    assert llm.chat([ChatMessage(QUESTION)], k=2).message.content == answer.text
    assert [source["source"] for source in response.raw["sources"]] == [hit.document for hit in answer.sources]
    assert response.raw["usage"]["memory_slots"] == answer.memory_slots == 8
    assert response.raw["usage"]["prompt_tokens"] == answer.memory_slots + answer.prompt_tokens
    assert response.raw["finish_reason"] == answer.finish_reason
    assert response.additional_kwargs == response.raw["usage"]


def test_references_become_memories_at_their_places(library, llm, retriever):
    memories = library.memories(library.search(QUESTION, k=2))
    one, other = (node.get_content(MetadataMode.LLM) for node in retriever.retrieve(QUESTION))
    expected = library.compressor.generate(["One: ", memories[1], " Two: ", memories[0], " End"], max_new_tokens=8)
    response = llm.complete(f"One: {other} Two: {one} End")
    assert response.text == expected
    assert response.raw["usage"]["memory_slots"] == 8


def test_messages_stand_in_the_models_format(library, llm):
    messages = [
        ChatMessage("Be brief.", role="system"),
        ChatMessage("Hi?", role="user"),
        ChatMessage("Yes.", role="model"),
        ChatMessage("Why?", role="user"),
    ]
    expected = "Be brief.\n\nQuestion: Hi?\nAnswer:Yes.\n\nQuestion: Why?\nAnswer:"
    compressor = library.compressor
    answer = compressor.generate(expected, max_new_tokens=8, stop=compressor.prompt_format.stop)
    response = llm.chat(messages)
    assert response.message.content == answer.strip()
    assert response.message.role == MessageRole.ASSISTANT
    assert llm.complete("Why?", framing="turn").text == llm.chat([ChatMessage("Why?")]).message.content
    assert llm.chat(messages, history="memory").raw["usage"]["memory_slots"] > 0


def test_streams_add_up(llm):
    whole = llm.complete(QUESTION, k=2)
    responses = list(llm.stream_complete(QUESTION, k=2))
    assert "".join(response.delta for response in responses) == responses[-1].text == whole.text
    assert len(responses) > 3
    assert responses[-1].raw == whole.raw
    assert all(response.raw is None for response in responses[:-1])
    replies = list(llm.stream_chat([ChatMessage(QUESTION)], k=2))
    assert replies[-1].message.content == "".join(reply.delta for reply in replies) == whole.text
    assert replies[-1].raw == whole.raw
    written = llm.complete("as it stands").text
    assert "".join(response.delta for response in llm.stream_complete("as it stands")) == written


async def test_async(llm):
    whole = llm.complete(QUESTION, k=2)
    assert await llm.acomplete(QUESTION, k=2) == whole
    assert [r.text async for r in await llm.astream_complete(QUESTION, k=2)][-1] == whole.text
    messages = [ChatMessage(QUESTION)]
    assert (await llm.achat(messages, k=2)).message.content == whole.text
    assert "".join([r.delta async for r in await llm.astream_chat(messages, k=2)]) == whole.text


async def test_calls_that_wait_for_one_another_are_one_batch(library, llm, monkeypatch):
    alone = [llm.complete(line).text for line in LINES]
    model, sizes, prefill = shared_model(library), [], library.compressor.prefill

    def counted(batch):
        sizes.append(len(batch))
        while len(sizes) == 1 and len(model._waiting) < 2:
            time.sleep(0.001)
        return prefill(batch)

    monkeypatch.setattr(library.compressor, "prefill", counted)
    responses = await asyncio.gather(*[llm.acomplete(line) for line in LINES])
    assert [response.text for response in responses] == alone
    assert sizes == [1, 2]


async def test_the_loop_goes_on_while_the_model_works(llm, monkeypatch):
    ticks, done = 0, asyncio.Event()

    async def tick():
        nonlocal ticks
        while not done.is_set():
            ticks += 1
            await asyncio.sleep(0)

    ticking = asyncio.create_task(tick())
    await llm.acomplete(QUESTION, k=2)
    done.set()
    await ticking
    assert ticks > 2


async def test_an_abandoned_stream_ends(llm):
    stream = await llm.astream_complete(QUESTION, max_tokens=64)
    await anext(stream)
    await stream.aclose()
    assert (await llm.acomplete(QUESTION)).text == llm.complete(QUESTION).text


def test_contents_are_read_in_front_of_the_question(library, llm, retriever):
    memories = library.compressor.compress(LINES[:1])
    stored = library.memories(library.search(QUESTION, k=1))
    prompt = library.compressor.prompt_format.build("Why?", [*memories, *stored], library.compressor.tokenizer)
    stop = library.compressor.prompt_format.stop
    expected = library.compressor.generate(prompt, max_new_tokens=8, stop=stop).strip()
    contents = [LINES[0], references(retriever.retrieve(QUESTION)[:1]), "  "]
    library.store.manifest.settings["chunk_tokens"] = 256
    revision = library.store.revision()
    assert llm.complete("Why?", contents=contents).text == expected
    assert llm.chat([ChatMessage("Why?")], contents=contents).message.content == expected
    assert "".join(response.delta for response in llm.stream_complete("Why?", contents=contents)) == expected
    assert library.store.revision() == revision
    assert llm.complete("Why?", contents=[]).raw["usage"]["memory_slots"] == 0


def test_contents_longer_than_a_chunk_have_several_memories(library, llm):
    raw = llm.complete("Why?", contents=[TEXT, TEXT]).raw
    assert raw["usage"]["memory_slots"] >= 2 * 4 * 4
    assert raw["sources"] == []


def test_contents_may_stand_beside_what_the_question_refers_to(llm, retriever):
    question = f"Look: {references(retriever.retrieve(QUESTION)[:1])} Why?"
    assert llm.chat([ChatMessage(question)], contents=[LINES[0][:40]]).raw["usage"]["memory_slots"] == 8


def test_a_forged_reference_stays_text_and_reads_nothing(library, llm, retriever):
    genuine = references(retriever.retrieve(QUESTION)[:1])
    forged = f"{genuine[:-3]}{'0' if genuine[-3] != '0' else '1'}]]"
    response = llm.complete(f"Tell me {forged}")
    assert response.raw["usage"]["memory_slots"] == 0
    assert response.raw["sources"] == []
    assert response.text == library.compressor.generate(f"Tell me {forged}", max_new_tokens=8)


def test_options_of_a_call(llm):
    assert llm.complete("go", max_tokens=2).raw["usage"]["completion_tokens"] == 2
    long = llm.complete("go", max_new_tokens=12, temperature=0).text
    assert llm.complete("go", max_new_tokens=12, stop=[long[3:5]]).text == long[: long.find(long[3:5])]
    drawn = [llm.complete("go", temperature=2.0, seed=seed).text for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    shouting = CompressedMemoryLLM(library=llm.library, max_tokens=8, completion_to_prompt=lambda prompt: prompt + "!")
    assert shouting.complete("go").text == llm.complete("go!").text == shouting.complete("go!", formatted=True).text


def test_what_llama_index_is_told_of_the_model(llm, library):
    assert llm.metadata.context_window == library.compressor.backbone.max_positions
    assert (llm.metadata.num_output, llm.metadata.is_function_calling_model) == (8, False)
    written = llm.to_dict()
    assert written["library"] == str(library.path)
    assert written["class_name"] == "CompressedMemoryLLM"


def test_parameters_are_written_and_read_back(tmp_path, tiny_checkpoint, monkeypatch):
    Library.create(tmp_path / "lib", tiny_checkpoint, FakeEmbedder())
    llm = CompressedMemoryLLM(library=tmp_path / "lib", k=4, seed=0, temperature=0.5, stop=["\n"], history="memory")
    again = CompressedMemoryLLM.from_json(llm.to_json())
    assert again.to_dict() == llm.to_dict()
    assert again.library is llm.library


# The retriever.


def test_nodes_bring_their_memories(library, retriever):
    hits = library.search(QUESTION, k=2)
    found = retriever.retrieve(QUESTION)
    for node, hit in zip(found, hits, strict=True):
        assert (node.text, node.score) == (hit.text, hit.score)
        assert node.get_content(MetadataMode.EMBED) == hit.text
        assert node.get_content(MetadataMode.LLM) == node.metadata["memory"]
        assert node.metadata["memory"].startswith(f"[[memory:{hit.id}:")
        assert node.metadata["source"] == node.node.ref_doc_id == hit.document
        assert (node.metadata["slots"], node.metadata["tokens"]) == (hit.slots, hit.tokens)
        assert node.metadata.items() >= library.store.document(hit.document).metadata.items()
        assert (node.node.start_char_idx, node.node.end_char_idx) == (hit.start, hit.end)
    assert [node.node_id for node in retriever.retrieve(QUESTION)] == [node.node_id for node in found]
    assert asyncio.run(retriever.aretrieve(QUESTION)) == found


@pytest.mark.parametrize("options", [{"retrieval": "dense"}, {"retrieval": "lexical"}, {"rerank": "likelihood"}])
def test_the_librarys_ways_of_searching(library, options):
    found = CompressedMemoryRetriever(library, k=2, **options).retrieve(QUESTION)
    hits = library.search(QUESTION, k=2, **options)
    assert [(node.text, node.score) for node in found] == [(hit.text, hit.score) for hit in hits]


def test_filters_say_which_documents_are_searched(library):
    for number, year in enumerate((2019, 2025)):
        metadata = {"year": year, "kind": "rule", "tags": ["a", str(year)]}
        library.add(Document.from_text(f"Rule {number}.", uri=f"rule/{year}", metadata=metadata))

    def found(filters):
        nodes = CompressedMemoryRetriever(library, k=9, filters=filters).retrieve("rule")
        return sorted(node.metadata["source"].removeprefix("rule/") for node in nodes)

    def where(key, value, operator=FilterOperator.EQ):
        return MetadataFilter(key=key, value=value, operator=operator)

    assert found({"kind": "rule", "year": [2025, 2026]}) == ["2025"]
    assert found(MetadataFilters(filters=[where("kind", "rule")])) == ["2019", "2025"]
    assert found(MetadataFilters(filters=[where("kind", "rule"), where("year", 2020, FilterOperator.GT)])) == ["2025"]
    assert found(MetadataFilters(filters=[where("year", [2019], FilterOperator.IN)])) == ["2019"]
    assert found(MetadataFilters(filters=[where("tags", "2019", FilterOperator.CONTAINS)])) == ["2019"]
    assert found(MetadataFilters(filters=[where("source", "rule/2019")])) == ["2019"]
    either = [where("year", 2019), where("year", 2025)]
    assert found(MetadataFilters(filters=either, condition=FilterCondition.OR)) == ["2019", "2025"]
    assert found(MetadataFilters(filters=either)) == []
    assert len(found(None)) == len(found(MetadataFilters(filters=[]))) == 5
    with pytest.raises(InputError, match=r"filters cannot be applied to rule/2019"):
        found(MetadataFilters(filters=[where("kind", "rule"), where("kind", 3, FilterOperator.GT)]))
    with pytest.raises(InputError, match="filters must be MetadataFilters or a dict, got str"):
        found("year")
    response = CompressedMemoryQueryEngine.from_library(library, filters={"year": 2025}, max_tokens=2).query("rule")
    assert [node.metadata["source"] for node in response.source_nodes] == ["rule/2025"]


def test_k_beyond_the_library_returns_all_there_is(library):
    assert len(CompressedMemoryRetriever(library, k=100).retrieve(QUESTION)) == 3
    assert len(CompressedMemoryQueryEngine.from_library(library, k=100).query(QUESTION).source_nodes) == 3


# Query engines.


def test_a_query_engine_answers_as_the_library_does(library, engine):
    answer = library.ask(QUESTION, k=2, max_new_tokens=8)
    response = engine.query(QUESTION)
    assert str(response) == answer.text != ""
    assert [node.text for node in response.source_nodes] == [hit.text for hit in answer.sources]
    assert set(response.metadata) == {node.node_id for node in response.source_nodes}
    assert str(asyncio.run(engine.aquery(QUESTION))) == answer.text


def test_a_query_engine_streams(library):
    whole = str(CompressedMemoryQueryEngine.from_library(library, k=2, max_tokens=8).query(QUESTION))
    streaming = CompressedMemoryQueryEngine.from_library(library, k=2, max_tokens=8, streaming=True)
    response = streaming.query(QUESTION)
    assert len(response.source_nodes) == 2
    pieces = list(response.response_gen)
    assert "".join(pieces) == whole
    assert len(pieces) > 3

    async def stream():
        response = await streaming.aquery(QUESTION)
        return "".join([piece async for piece in response.async_response_gen()])

    assert asyncio.run(stream()) == whole


def test_llama_indexs_engine_with_our_parts(library, llm, retriever, engine):
    by_library = RetrieverQueryEngine(retriever, CompressedMemorySynthesizer(library, max_tokens=8))
    by_llm = RetrieverQueryEngine(retriever, CompressedMemorySynthesizer(llm=llm))
    assert str(by_library.query(QUESTION)) == str(by_llm.query(QUESTION)) == str(engine.query(QUESTION))
    assert by_llm.get_prompts() == {}


@pytest.mark.parametrize("mode", ["compact", "refine", "tree_summarize", "simple_summarize", "accumulate"])
def test_llama_indexs_synthesizers_read_memories(library, llm, retriever, mode, monkeypatch):
    slots, generate = [], llm._reader.generate

    def counted(requests, options):
        results = generate(requests, options)
        slots.extend(result.memory_slots for result in results)
        return results

    monkeypatch.setattr(llm._reader, "generate", counted)
    engine = RetrieverQueryEngine(retriever, get_response_synthesizer(llm=llm, response_mode=mode))
    response = engine.query(QUESTION)
    assert str(response) != ""
    assert len(response.source_nodes) == 2
    assert sum(slots) == 8


def test_a_prompt_of_the_users_own(library, llm, retriever):
    template = PromptTemplate("{context_str}\nAnswer this: {query_str}")
    synthesizer = get_response_synthesizer(llm=llm, text_qa_template=template)
    nodes = retriever.retrieve(QUESTION)
    context = "\n\n".join(node.metadata["memory"] for node in nodes)
    expected = llm.chat([ChatMessage(f"{context}\nAnswer this: {QUESTION}")]).message.content
    assert str(synthesizer.synthesize(QUESTION, nodes)) == expected


def test_nodes_without_a_memory_are_compressed_on_the_way(library, llm):
    nodes = [NodeWithScore(node=TextNode(text=line, metadata={"page": 3})) for line in LINES[:2]]
    revision = library.store.revision()
    response = CompressedMemorySynthesizer(llm=llm).synthesize("Why?", nodes)
    texts = [f"page: 3\n\n{line}" for line in LINES[:2]]
    assert str(response) == llm.complete("Why?", contents=texts).text
    assert response.source_nodes == nodes
    assert library.store.revision() == revision


def test_without_nodes_the_answer_is_empty(library, llm):
    synthesizer = CompressedMemorySynthesizer(llm=llm, empty_response="Nothing was found.")
    assert str(synthesizer.synthesize(QUESTION, [])) == "Nothing was found."
    streaming = CompressedMemorySynthesizer(llm=llm, streaming=True)
    assert list(streaming.synthesize(QUESTION, []).response_gen) == ["Empty Response"]


def test_a_model_with_a_chat_template(tokenizer, tmp_path, corpus):
    with_template = copy.deepcopy(tokenizer)
    with_template.chat_template = CHATML
    compressor = tiny_autocompressor(tokenizer=with_template)
    library = Library.create(tmp_path / "templated", compressor, FakeEmbedder(), chunk_tokens=32, overlap_tokens=4)
    library.add(corpus)
    answer = library.ask(QUESTION, k=2, max_new_tokens=8)
    engine = CompressedMemoryQueryEngine.from_library(library, k=2, max_tokens=8)
    assert str(engine.query(QUESTION)) == answer.text
    llm = CompressedMemoryLLM(library=library, max_tokens=8)
    one, other = library.memories(answer.sources)
    tokens = [
        with_template(text, add_special_tokens=False)["input_ids"]
        for text in ("<|system|>Know ", "!<|end|><|user|>Why?<|end|><|assistant|>")
    ]
    messages = [
        ChatMessage(f"Know {references(engine.retriever.retrieve(QUESTION))}!", role="system"),
        ChatMessage("Why?"),
    ]
    expected = compressor.generate([tokens[0], one, other, tokens[1]], max_new_tokens=8).strip()
    assert llm.chat(messages).message.content == expected


# LlamaIndex's own machinery.


class Recorder(BaseEventHandler):
    """The names of events, in order."""

    seen: list[str] = Field(default_factory=list)

    def handle(self, event, **kwargs):
        self.seen.append(type(event).__name__)


@pytest.fixture
def events():
    recorder, dispatcher = Recorder(), get_dispatcher()
    dispatcher.add_event_handler(recorder)
    yield recorder.seen
    dispatcher.event_handlers.remove(recorder)


def test_instrumentation(library, engine, events, llm):
    engine.query(QUESTION)
    assert events == [
        "QueryStartEvent",
        "RetrievalStartEvent",
        "RetrievalEndEvent",
        "SynthesizeStartEvent",
        "LLMCompletionStartEvent",
        "LLMCompletionEndEvent",
        "SynthesizeEndEvent",
        "QueryEndEvent",
    ]
    events.clear()
    list(llm.stream_chat([ChatMessage(QUESTION)], k=1))
    assert events[0] == "LLMChatStartEvent"
    assert events[-1] == "LLMChatEndEvent"
    assert events.count("LLMChatInProgressEvent") == len(events) - 2 > 2


def test_tokens_are_counted_by_the_models_own_account(library):
    counter = TokenCountingHandler()
    engine = CompressedMemoryQueryEngine.from_library(
        library, k=2, max_tokens=8, callback_manager=CallbackManager([counter])
    )
    answer = library.ask(QUESTION, k=2, max_new_tokens=8)
    engine.query(QUESTION)
    assert counter.prompt_llm_token_count == answer.prompt_tokens + answer.memory_slots


# Wrong input.


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -1}, "temperature must not be negative"),
        ({"max_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"libary": "x"}, "libary"),
        ({"framing": "nothing"}, "framing"),
        ({"k": 0}, "k must be at least 1"),
    ],
)
def test_wrong_settings_are_refused_where_they_are_given(library, settings, words):
    with pytest.raises((ValidationError, InputError), match=words):
        CompressedMemoryLLM(library=library, **settings)
    with pytest.raises((ValidationError, InputError), match=words):
        CompressedMemoryQueryEngine.from_library(library, **settings)


@pytest.mark.parametrize("settings", [{"k": 0}, {"retrieval": "x"}, {"rerank": "x"}])
def test_wrong_settings_of_the_retriever(library, settings):
    with pytest.raises(InputError):
        CompressedMemoryRetriever(library, **settings)


def test_wrong_options_of_a_call(llm, engine, retriever):
    for options, words in (
        ({"k": 0}, "k must be at least 1"),
        ({"model": "gpt"}, "unknown option 'model'"),
        ({"framing": "x"}, "unknown framing"),
        ({"k": 1, "retrieval": "x"}, "unknown retrieval"),
        ({"top_p": 2.0}, "top_p"),
        ({"contents": "text"}, "contents come in a list, got str"),
        ({"contents": [3]}, "contents are texts, got int"),
    ):
        with pytest.raises(InputError, match=words):
            llm.complete(QUESTION, **options)
    with pytest.raises(InputError, match="unknown history"):
        llm.chat([ChatMessage("Hi")], history="x")
    for empty in ("", "  "):
        with pytest.raises(InputError, match="query is empty"):
            engine.query(empty)
        with pytest.raises(InputError, match="question is empty"):
            llm.complete(empty, contents=["text"])
        with pytest.raises(InputError, match="the last message is empty"):
            llm.chat([ChatMessage(empty)])
        with pytest.raises(InputError, match="query is empty"):
            llm.complete(empty, k=1)
    with pytest.raises(InputError, match="empty"):
        llm.complete("")


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "holds no question"),
        ([("system", "Be brief.")], "holds no question"),
        ([("user", "Hi"), ("assistant", "Yes")], "the last message is the assistant's"),
        ([("assistant", "Yes"), ("user", "Hi")], "out of order: assistant"),
        ([("user", "Hi"), ("assistant", "Yes"), ("system", "x"), ("user", "Hi")], "out of order: user, assistant, sys"),
        ([("tool", "3"), ("user", "Hi")], "message 0 is one of 'tool'"),
    ],
)
def test_messages_out_of_order(llm, messages, words):
    with pytest.raises(InputError, match=words):
        llm.chat([ChatMessage(text, role=role) for role, text in messages])


def test_messages_that_are_no_text(llm):
    with pytest.raises(InputError, match="message 0 holds a ImageBlock"):
        llm.chat([ChatMessage(blocks=[ImageBlock(url="https://example.org/a.png")])])


def test_a_model_that_reads_no_memories(library, llm):
    with pytest.raises(InputError, match="MockLLM reads no memories"):
        CompressedMemorySynthesizer(llm=MockLLM())
    with pytest.raises(InputError, match="neither a library nor"):
        CompressedMemorySynthesizer()
    with pytest.raises(InputError, match="brings its library"):
        CompressedMemorySynthesizer(library, llm)
    with pytest.raises(InputError, match="brings its library"):
        CompressedMemorySynthesizer(llm=llm, max_tokens=3)


def test_a_prompt_that_is_too_long_says_by_how_much(llm):
    with pytest.raises(ContextTooLong, match="more than"):
        llm.complete("the ferry " * 2500)


def test_a_library_that_is_not_there_or_of_another_model(tmp_path, library, tokenizer):
    for make in (CompressedMemoryRetriever, CompressedMemorySynthesizer, CompressedMemoryQueryEngine.from_library):
        with pytest.raises(LibraryError, match="nowhere does not exist"):
            make(tmp_path / "nowhere")
    other = Library.open(library.path, tiny_autocompressor(tokenizer=tokenizer, seed=5), FakeEmbedder())
    with pytest.raises(FingerprintMismatch):
        CompressedMemoryLLM(library=other, k=1).complete(QUESTION)


def test_references_to_what_is_gone_or_elsewhere(library, llm, retriever, make_library, corpus):
    nodes = retriever.retrieve(QUESTION)
    other = make_library("other")
    other.add(corpus)
    with pytest.raises(InputError, match="give the retriever and the model the same library"):
        CompressedMemorySynthesizer(other).synthesize(QUESTION, nodes)
    library.remove(corpus)
    with pytest.raises(LibraryError, match="no longer in the library"):
        CompressedMemorySynthesizer(llm=llm).synthesize(QUESTION, nodes)


def test_an_empty_library(make_library):
    empty = make_library("empty")
    with pytest.raises(LibraryError, match="is empty"):
        CompressedMemoryQueryEngine.from_library(empty).query(QUESTION)


def test_every_method_reads_nodes(any_compressor, embedder, tmp_path, corpus):
    library = Library.create(tmp_path / "any", any_compressor, embedder, chunk_tokens=32, overlap_tokens=4)
    library.add(corpus)
    engine = CompressedMemoryQueryEngine.from_library(library, k=2, max_tokens=4)
    assert str(engine.query(QUESTION)) == (library.ask(QUESTION, k=2, max_new_tokens=4).text or "None")


def test_without_llama_index_it_says_what_to_install():
    code = """
import sys
sys.modules["llama_index"] = None
import ctxdocs.integrations.llama_index as package
print(sorted(dir(package)) == sorted(package.__all__))
try:
    package.CompressedMemoryLLM
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "True",
        "MissingDependency CompressedMemoryLLM needs llama-index-core (pip install 'ctxdocs[llama-index]')",
    ]


def test_unknown_names_are_no_attributes():
    import ctxdocs.integrations.llama_index as package

    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = package.Nothing
    assert all(getattr(package, name).__name__ == name for name in package.__all__)
