"""A server as LangChain's and LlamaIndex's OpenAI classes use it."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("fastapi")

from pydantic import BaseModel, Field

from .server_samples import QUESTION, running, small_library


class Sailing(BaseModel):
    """How often a ferry sails."""

    times: int = Field(ge=0, le=20)


@pytest.fixture(scope="module")
def library(compressor, embedder, tmp_path_factory):
    return small_library(tmp_path_factory.mktemp("served"), compressor, embedder)


@pytest.fixture(scope="module")
def url(library):
    with running(library) as (url, _):
        yield f"{url}/v1"


def test_langchain(library, url):
    pytest.importorskip("langchain_openai")
    from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
    from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

    own = {"k": 2}
    chat = ChatOpenAI(base_url=url, api_key="none", model="tiny", max_tokens=8, temperature=0, extra_body=own)
    answer = library.ask(QUESTION, k=2, max_new_tokens=8).text
    message = chat.invoke(QUESTION)
    assert message.content == answer
    assert message.usage_metadata["output_tokens"] == message.response_metadata["token_usage"]["completion_tokens"]
    assert message.response_metadata["token_usage"]["ctxdocs"]["memory_slots"] == 8
    assert "".join(part.content for part in chat.stream(QUESTION)) == answer
    assert [each.content for each in chat.batch([QUESTION, QUESTION])] == [answer, answer]
    assert asyncio.run(chat.ainvoke(QUESTION)).content == answer
    talk = [SystemMessage("Be brief."), HumanMessage("Hello."), AIMessage("Hi."), HumanMessage(QUESTION)]
    assert chat.invoke(talk).usage_metadata["input_tokens"] > message.usage_metadata["input_tokens"]

    held = ChatOpenAI(base_url=url, api_key="none", model="tiny", max_tokens=200, temperature=0, extra_body=own)
    assert isinstance(held.with_structured_output(Sailing).invoke(QUESTION), Sailing)

    plain = OpenAI(base_url=url, api_key="none", model="tiny", max_tokens=6, temperature=0, extra_body=own)
    memories = library.memories(library.search("The ferry", k=2))
    expected = library.compressor.generate("The ferry", memories, max_new_tokens=6)
    assert plain.invoke("The ferry") == "".join(plain.stream("The ferry")) == expected

    vectors = OpenAIEmbeddings(
        base_url=url, api_key="none", model="fake-bag-of-words", check_embedding_ctx_length=False
    ).embed_documents(["the ferry", "the lighthouse"])
    assert vectors[0] == library.embedder.embed_documents(["the ferry"])[0].tolist()


def test_llama_index(library, url):
    pytest.importorskip("llama_index.llms.openai_like")
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    shared = {"api_base": url, "api_key": "none", "model": "tiny", "max_tokens": 8, "temperature": 0}
    chat = OpenAILike(**shared, is_chat_model=True, additional_kwargs={"extra_body": {"k": 2}})
    answer = library.ask(QUESTION, k=2, max_new_tokens=8).text
    assert chat.chat([ChatMessage(role="user", content=QUESTION)]).message.content == answer
    assert chat.complete(QUESTION).text == answer
    assert list(chat.stream_chat([ChatMessage(role="user", content=QUESTION)]))[-1].message.content == answer

    plain = OpenAILike(**shared, is_chat_model=False, additional_kwargs={"extra_body": {"k": 2}})
    memories = library.memories(library.search("The ferry", k=2))
    assert plain.complete("The ferry").text == library.compressor.generate("The ferry", memories, max_new_tokens=8)
