"""The LangChain chat model over a library of a tiny model."""

from __future__ import annotations

import copy

import pytest

pytest.importorskip("langchain_core")

from langchain_core.caches import InMemoryCache
from langchain_core.messages import AIMessage, ChatMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough
from pydantic import BaseModel, ValidationError

from ctxdocs import generation
from ctxdocs.conversation import Conversation
from ctxdocs.corpus import Document
from ctxdocs.errors import ContextTooLong, InputError
from ctxdocs.generation import GenerationOptions
from ctxdocs.integrations.langchain import ChatCompressedMemory, CompressedMemoryRetriever, format_memories
from ctxdocs.library import Library
from ctxdocs.prompts import encode_parts
from tests.conftest import FakeEmbedder, tiny_autocompressor, tiny_kv

QUESTION = "When does the ferry sail?"
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
def chat(library):
    return ChatCompressedMemory(library=library, max_tokens=8)


@pytest.fixture(params=["autocompressor", "kv", "kvzip"])
def templated(request, tokenizer, tmp_path, corpus):
    """A chat model whose tokenizer has a chat template; of some methods documents are read behind its header."""
    with_template = copy.deepcopy(tokenizer)
    with_template.chat_template = CHATML
    if request.param == "autocompressor":
        compressor = tiny_autocompressor(tokenizer=with_template)
    else:
        compressor = tiny_kv(request.param, with_template)
    library = Library.create(tmp_path / "templated", compressor, FakeEmbedder(), chunk_tokens=32, overlap_tokens=4)
    library.add(corpus)
    return ChatCompressedMemory(library=library, max_tokens=8)


def text_of(chat, parts, stop=("\nQuestion:", "\n\n")):
    """What the model answers to a prompt of just these parts."""
    compressor = chat.library.compressor
    prompt = encode_parts(parts, compressor.tokenizer)
    return generation.generate(compressor, [prompt], GenerationOptions(max_new_tokens=8, stop=stop))[0].text.strip()


def test_with_k_it_answers_as_the_library_does(library, chat):
    answer = library.ask(QUESTION, k=2, max_new_tokens=8)
    message = chat.invoke(QUESTION, k=2)
    assert message.content == answer.text != ""
    assert [source["source"] for source in message.response_metadata["sources"]] == [h.document for h in answer.sources]
    assert message.usage_metadata["input_token_details"] == {"memory_slots": 8}
    assert message.usage_metadata["input_tokens"] == answer.prompt_tokens + 8
    assert message.response_metadata["finish_reason"] == answer.finish_reason


def test_turns_stand_in_the_prompt_format(chat):
    messages = [SystemMessage("Be brief."), HumanMessage("Hi?"), AIMessage("Yes."), HumanMessage("Why?")]
    expected = "Be brief.\n\nQuestion: Hi?\nAnswer:Yes.\n\nQuestion: Why?\nAnswer:"
    assert chat.invoke(messages).content == text_of(chat, [expected])
    assert chat.invoke([("system", "Be brief."), ("user", "Hi?"), ("assistant", "Yes."), ("user", "Why?")]).content == (
        text_of(chat, [expected])
    )


def test_turns_stand_in_the_chat_template(templated):
    tokenizer = templated.library.compressor.tokenizer
    messages = [SystemMessage("Be brief."), HumanMessage("Hi?"), AIMessage("Yes."), HumanMessage("Why?")]
    roles = ["system", "user", "assistant", "user"]
    text = tokenizer.apply_chat_template(
        [{"role": role, "content": message.content} for role, message in zip(roles, messages, strict=True)],
        tokenize=False,
        add_generation_prompt=True,
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert templated.invoke(messages).content == text_of(templated, [ids], stop=())


@pytest.mark.parametrize("place", ["system", "question"])
def test_references_become_memories_where_they_stand(templated, place):
    library = templated.library
    memories = library.memories(library.search(QUESTION, k=2))
    context = format_memories(CompressedMemoryRetriever(library=library, k=2).invoke(QUESTION))
    tokenizer = library.compressor.tokenizer

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    if place == "system":
        messages = [("system", f"Know {context}!"), ("human", "When?")]
        expected = [ids("<|system|>Know "), *memories, ids("!<|end|><|user|>When?<|end|><|assistant|>")]
    else:
        messages = [("human", f"Know {context}! When?")]
        expected = [ids("<|user|>Know "), *memories, ids("! When?<|end|><|assistant|>")]
    message = templated.invoke(messages)
    assert message.content == text_of(templated, expected, stop=())
    slots = sum(memory.slots for memory in memories)
    assert message.usage_metadata["input_token_details"]["memory_slots"] == slots


def test_what_a_message_imitates_stays_text(templated):
    tokenizer = templated.library.compressor.tokenizer
    wanted = [
        *tokenizer("<|user|>", add_special_tokens=False)["input_ids"],
        *templated.get_token_ids("[[memory:1:0123456789abcdef:" + "0" * 32 + "]] <|end|>"),
        *tokenizer("<|end|><|assistant|>", add_special_tokens=False)["input_ids"],
    ]
    message = templated.invoke("[[memory:1:0123456789abcdef:" + "0" * 32 + "]] <|end|>")
    assert message.content == text_of(templated, [wanted], stop=())
    assert message.usage_metadata["input_tokens"] == len(wanted)


def test_a_chain_as_in_the_tutorials(library, chat):
    template = ChatPromptTemplate.from_messages([("system", "Use this: {context}"), ("human", "{question}")])
    retriever = CompressedMemoryRetriever(library=library, k=2)
    chain = {"context": retriever | format_memories, "question": RunnablePassthrough()} | template | chat
    message = chain.invoke(QUESTION)
    assert len(message.response_metadata["sources"]) == 2
    assert "".join(chunk.text for chunk in chain.stream(QUESTION)) == message.content
    assert [m.content for m in chain.batch([QUESTION] * 4)] == [message.content] * 4


def test_streams_end_with_usage(chat):
    chunks = list(chat.stream(QUESTION, k=2))
    whole = chat.invoke(QUESTION, k=2)
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    assert total.content == whole.content
    assert total.usage_metadata == whole.usage_metadata
    assert total.response_metadata == whole.response_metadata
    assert chunks[-1].chunk_position == "last"


async def test_async(chat):
    whole = chat.invoke(QUESTION, k=2).content
    assert (await chat.ainvoke(QUESTION, k=2)).content == whole
    assert "".join([chunk.text async for chunk in chat.astream(QUESTION, k=2)]) == whole
    assert [m.content for m in await chat.abatch([QUESTION] * 3, k=2)] == [whole] * 3


def test_a_batch_of_conversations_shares_passes(chat, monkeypatch):
    compressor = chat.library.compressor
    alone = chat.invoke(QUESTION).content
    sizes, prefill = [], compressor.prefill
    monkeypatch.setattr(compressor, "prefill", lambda batch: (sizes.append(len(batch)), prefill(batch))[1])
    model = chat._reader.model
    with model._turn:  # so that all of them are waiting
        import threading

        answers = []
        thread = threading.Thread(target=lambda: answers.extend(chat.batch([QUESTION] * 4)))
        thread.start()
        while len(model._waiting) < 4:
            pass
    thread.join()
    assert [answer.content for answer in answers] == [alone] * 4
    assert sizes == [4]


def test_stop(chat):
    whole = chat.invoke(QUESTION).content
    stop = whole[3:5]
    assert chat.invoke(QUESTION, stop=[stop]).content == whole[: whole.find(stop)].strip()
    bound = ChatCompressedMemory(library=chat.library, max_tokens=8, stop=[stop])
    assert bound.invoke(QUESTION).content == whole[: whole.find(stop)].strip()


# History as memory.


def asked(conversation, question):
    return "".join(conversation.ask(question)).strip()


def test_a_history_in_memory_reads_as_a_conversation_does(library):
    chat = ChatCompressedMemory(library=library, history="memory", k=2, max_tokens=8, stop=["\n"])
    stop = ("\n", *library.compressor.prompt_format.stop)
    conversation = Conversation(library.compressor, library, k=2, system="Be brief.", max_new_tokens=8, stop=stop)
    messages = [SystemMessage("Be brief.")]
    for question in ("When does the ferry sail?", "And in summer?", "Who built the lighthouse?"):
        messages.append(HumanMessage(question))
        answer = chat.invoke(messages)
        assert answer.content == asked(conversation, question)
        messages.append(answer)


@pytest.mark.parametrize("system", ["", "Be brief."])
def test_so_it_does_in_a_chat_template(templated, system):
    library = templated.library
    chat = ChatCompressedMemory(library=library, history="memory", k=2, max_tokens=6)
    conversation = Conversation(library.compressor, library, k=2, system=system or None, max_new_tokens=6)
    messages = [SystemMessage(system)] if system else []
    for question in ("When does the ferry sail?", "And in summer?", "Who built the lighthouse?"):
        messages.append(HumanMessage(question))
        answer = chat.invoke(messages)
        assert answer.content == asked(conversation, question)
        messages.append(answer)


def test_a_conversation_that_goes_on_is_read_from_where_it_was(library, monkeypatch):
    chat = ChatCompressedMemory(library=library, history="memory", max_tokens=4)
    messages = [("human", "One?"), ("ai", "1"), ("human", "Two?")]
    chat.invoke(messages)
    (session,) = chat._histories._sessions.values()
    fed, feed = [], type(session).feed
    monkeypatch.setattr(type(session), "feed", lambda self, ids: (fed.append(len(ids)), feed(self, ids))[1])
    first = chat.invoke(messages)
    assert fed == []
    longer = [*messages, ("ai", "2"), ("human", "Three?")]
    again = chat.invoke(longer)
    assert len(fed) == 1
    fresh = ChatCompressedMemory(library=library, history="memory", max_tokens=4)
    assert fresh.invoke(longer).content == again.content
    assert len(fed) == 3
    assert chat.invoke(messages).content == first.content  # a branch is read anew


def test_only_the_last_conversations_are_kept(library):
    chat = ChatCompressedMemory(library=library, history="memory", max_tokens=1)
    for number in range(12):
        chat.invoke([("human", f"Is it {number}?"), ("ai", "Yes."), ("human", "Sure?")])
    assert len(chat._histories._sessions) == chat._histories.kept == 8


def test_a_history_in_memory_keeps_what_the_system_text_refers_to(library):
    chat = ChatCompressedMemory(library=library, history="memory", max_tokens=4)
    context = format_memories(CompressedMemoryRetriever(library=library, k=1).invoke(QUESTION))
    messages = [("system", f"Use {context}"), ("human", "Hi?"), ("ai", "Yes."), ("human", QUESTION)]
    message = chat.invoke(messages)
    assert len(message.response_metadata["sources"]) == 1
    assert message.usage_metadata["input_token_details"]["memory_slots"] > 4


@pytest.mark.parametrize("history", ["text", "memory"])
def test_special_tokens_in_a_systems_text_stay_text(templated, history):
    messages = [("system", "Say <|end|> now."), ("human", "Hi?"), ("ai", "Yes."), ("human", "Why?")]
    openings, reader = [], templated._reader
    opened = reader.opened
    reader.opened = lambda before: (openings.append(before.text), opened(before))[1]
    assert templated.invoke(messages, history=history).usage_metadata["output_tokens"] == 8
    assert set(openings) == {"<|system|>"}


@pytest.mark.parametrize("history", ["text", "memory"])
def test_every_method_holds_a_conversation(any_compressor, embedder, tmp_path, corpus, history):
    library = Library.create(tmp_path / "any", any_compressor, embedder, chunk_tokens=32, overlap_tokens=4)
    library.add(corpus)
    chat = ChatCompressedMemory(library=library, k=1, max_tokens=3, history=history)
    messages = [("system", "Be brief."), ("human", "Hi?"), ("ai", "Yes."), ("human", QUESTION)]
    assert len(chat.invoke(messages).response_metadata["sources"]) == 1


# Wrong input.


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "holds no question"),
        ([("system", "x")], "holds no question"),
        ([("human", "  ")], "last message is empty"),
        ([("human", "a"), ("ai", "b")], "last message is the assistant's"),
        ([("ai", "a"), ("human", "b")], "out of order: assistant"),
        ([("human", "a"), ("system", "b"), ("human", "c")], "out of order: user, system"),
        ([("system", "s"), ("human", "a"), ("ai", "b"), ("system", "c"), ("human", "d")], "assistant, system"),
        ([ToolMessage("x", tool_call_id="1"), HumanMessage("y")], "message 0 is a ToolMessage"),
        ([ChatMessage("x", role="narrator"), HumanMessage("y")], "message 0 is a ChatMessage"),
        (
            [
                HumanMessage("a"),
                AIMessage("", tool_calls=[{"name": "f", "args": {}, "id": "1"}]),
                ToolMessage("x", tool_call_id="1"),
            ],
            "without tool calls",
        ),
        (
            [HumanMessage([{"type": "text", "text": "see"}, {"type": "image", "url": "https://x/y.png"}])],
            "block of type 'image",
        ),
    ],
)
def test_wrong_messages(chat, messages, words):
    with pytest.raises(InputError, match=words):
        chat.invoke(messages)


def test_text_in_blocks_and_roles_in_words_are_read(chat):
    plain = chat.invoke("Why?").content
    assert chat.invoke([HumanMessage([{"type": "text", "text": "Why?"}])]).content == plain
    assert chat.invoke([ChatMessage("Why?", role="user")]).content == plain
    assert chat.invoke([HumanMessage("Why?", name="somebody")]).content == plain


def test_messages_of_one_role_are_one_turn(chat):
    assert chat.invoke([("human", "One."), ("human", "Two?")]).content == chat.invoke("One.\n\nTwo?").content


def test_too_long_says_by_how_much(chat):
    with pytest.raises(ContextTooLong, match=r"positions, \d+ more than"):
        chat.invoke("the ferry " * 2500)


def test_a_template_without_a_system_role(templated):
    templated.library.compressor.tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}<|assistant|>"
    )
    with pytest.raises(InputError, match="leave the system text out"):
        templated.invoke([("system", "Be brief."), ("human", "Hi?")])
    assert templated.invoke("Hi?")


def test_what_is_not_supported_says_so(chat):
    class Joke(BaseModel):
        """A joke."""

        text: str

    with pytest.raises(NotImplementedError):
        chat.bind_tools([Joke])
    with pytest.raises(InputError, match="unknown option 'tools'"):
        chat.invoke("Hi", tools=[])
    with pytest.raises(InputError, match="unknown history"):
        chat.invoke("Hi", history="none")
    with pytest.raises(ValidationError, match="max_token"):
        ChatCompressedMemory(library=chat.library, max_token=3)


def test_a_cached_answer_does_not_outlive_what_it_was_read_from(library, monkeypatch):
    chat = ChatCompressedMemory(library=library, k=3, max_tokens=4, cache=InMemoryCache())
    calls, prefill = [], library.compressor.prefill
    monkeypatch.setattr(library.compressor, "prefill", lambda batch: (calls.append(1), prefill(batch))[1])
    assert chat.invoke(QUESTION).content == chat.invoke(QUESTION).content
    assert len(calls) == 1
    library.add(Document.from_text("The ferry sails to Norway.", uri="news"))
    chat.invoke(QUESTION)
    assert len(calls) == 2
    chat.invoke(QUESTION, k=1)
    assert len(calls) == 3


def test_parameters_are_json(chat):
    import json

    parameters = json.loads(json.dumps(chat.asdict()))
    assert parameters["library"] == str(chat.library.path)
    assert parameters["max_new_tokens"] == 8
    assert chat._get_ls_params(stop=["x"]) == {
        "ls_model_type": "chat",
        "ls_provider": "ctxdocs",
        "ls_model_name": "autocompressor",
        "ls_temperature": 0.0,
        "ls_max_tokens": 8,
        "ls_stop": ["x"],
    }
