"""Objects of pydantic classes from the LlamaIndex LLM over a library of a tiny model."""

from __future__ import annotations

import asyncio
from typing import Literal

import pytest

pytest.importorskip("llama_index.core")
pytest.importorskip("llguidance")

from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.query_engine import RetrieverQueryEngine
from pydantic import BaseModel, Field

from ctxdocs.errors import InputError
from ctxdocs.integrations.llama_index import CompressedMemoryLLM, CompressedMemoryRetriever

PROMPT = PromptTemplate("When does the {what} sail?")


class Sailing(BaseModel):
    """When a ferry sails."""

    season: Literal["winter", "summer"]
    times: int = Field(ge=0, le=20)


@pytest.fixture
def llm(make_library, corpus):
    library = make_library()
    library.add(corpus)
    return CompressedMemoryLLM(library=library, max_tokens=200)


def test_structured_predict_and_its_other_forms(llm):
    answer = llm.structured_predict(Sailing, PROMPT, what="ferry")
    assert isinstance(answer, Sailing)
    assert asyncio.run(llm.astructured_predict(Sailing, PROMPT, what="ferry")) == answer

    async def last():
        async for part in await llm.astream_structured_predict(Sailing, PROMPT, what="ferry"):
            found = part
        return found

    streamed = list(llm.stream_structured_predict(Sailing, PROMPT, what="ferry"))[-1]
    assert streamed.model_dump() == asyncio.run(last()).model_dump() == answer.model_dump()


def test_a_structured_llm(llm):
    structured = llm.as_structured_llm(Sailing)
    reply = structured.chat([ChatMessage(role="user", content="When does the ferry sail?")])
    assert isinstance(reply.raw, Sailing)
    assert isinstance(structured.complete("When does the ferry sail?").raw, Sailing)
    engine = RetrieverQueryEngine.from_args(CompressedMemoryRetriever(llm.library, k=2), llm=structured)
    assert Sailing.model_validate_json(str(engine.query("When does the ferry sail?")))


def test_a_schema_for_one_call(llm):
    assert llm.complete("Where?", schema={"enum": ["pier"]}).text == '"pier"'
    reply = llm.chat([ChatMessage(role="user", content="Where?")], schema={"enum": ["pier"]})
    assert (reply.message.content, reply.raw["finish_reason"]) == ('"pier"', "stop")
    with pytest.raises(InputError, match="objct"):
        llm.complete("Where?", schema={"type": "objct"})
    with pytest.raises(ValueError, match="json"):
        llm.structured_predict(Sailing, PROMPT, {"max_tokens": 4}, what="ferry")
