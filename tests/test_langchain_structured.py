"""LangChain's structured output over a library of a tiny model: held to the schema, and parsed."""

from __future__ import annotations

import asyncio
from typing import Literal

import jsonschema
import pytest

pytest.importorskip("langchain_core")
pytest.importorskip("llguidance")

from langchain_core.exceptions import OutputParserException
from langchain_core.output_parsers import JsonOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough
from pydantic import BaseModel, Field
from typing_extensions import TypedDict

from ctxdocs.errors import InputError
from ctxdocs.integrations.formats import closed
from ctxdocs.integrations.langchain import (
    ChatCompressedMemory,
    CompressedMemoryLLM,
    CompressedMemoryRetriever,
    format_memories,
)

QUESTION = "When does the ferry sail?"


class Sailing(BaseModel):
    """When a ferry sails."""

    season: Literal["winter", "summer"]
    times: int = Field(ge=0, le=20)
    port: str = Field(max_length=5)


class Route(BaseModel):
    """A journey of several legs."""

    name: str = Field(max_length=4)
    legs: list[Route] = Field(default_factory=list, max_length=1)


class Gauge(TypedDict):
    """A tide gauge."""

    every: Literal[6, 12]


@pytest.fixture
def chat(make_library, corpus):
    library = make_library()
    library.add(corpus)
    return ChatCompressedMemory(library=library, max_tokens=200, k=2)


@pytest.mark.parametrize("method", ["json_schema", "json_mode"])
def test_a_pydantic_class_is_answered_with_its_objects(chat, method):
    model = chat.with_structured_output(Sailing, method=method)
    answer = model.invoke(QUESTION)
    assert isinstance(answer, Sailing)
    assert list(model.stream(QUESTION))[-1] == answer
    assert asyncio.run(model.ainvoke(QUESTION)) == answer
    assert model.batch([QUESTION, QUESTION]) == [answer, answer]


def test_other_schemas_are_answered_with_dicts(chat):
    schema = Sailing.model_json_schema()
    answer = chat.with_structured_output(schema).invoke(QUESTION)
    jsonschema.validate(answer, schema)
    assert list(answer) == ["season", "times", "port"]  # no properties that the schema does not name
    pieces = list(chat.with_structured_output(schema).stream(QUESTION))
    assert pieces[-1] == answer
    assert len(pieces) > 3
    assert chat.with_structured_output(Gauge).invoke(QUESTION)["every"] in (6, 12)
    untitled = {"type": "object", "properties": {"n": {"const": 1}}, "required": ["n"]}
    assert chat.with_structured_output(untitled).invoke(QUESTION) == {"n": 1}
    function = {"name": "sail", "description": "Sail.", "parameters": untitled}
    assert chat.with_structured_output(function).invoke(QUESTION) == {"n": 1}


def test_a_class_that_refers_to_itself(chat):
    assert isinstance(chat.with_structured_output(Route, temperature=5.0, seed=0).invoke(QUESTION), Route)


def test_in_a_chain_with_memories(chat):
    prompt = ChatPromptTemplate.from_messages([("system", "Use this: {context}"), ("human", "{question}")])
    retriever = CompressedMemoryRetriever(library=chat.library, k=2)
    inputs = {"context": retriever | format_memories, "question": RunnablePassthrough()}
    chain = inputs | prompt | chat.with_structured_output(Sailing, include_raw=True)
    answer = chain.invoke(QUESTION)
    assert isinstance(answer["parsed"], Sailing)
    assert answer["parsing_error"] is None
    assert answer["raw"].usage_metadata["input_token_details"]["memory_slots"] == 8


def test_an_answer_that_is_cut_off_is_no_answer(chat):
    model = chat.with_structured_output(Sailing.model_json_schema(), max_tokens=6)
    with pytest.raises(OutputParserException, match="max_tokens"):
        model.invoke(QUESTION)
    with pytest.raises(OutputParserException, match="max_tokens"):
        asyncio.run(model.ainvoke(QUESTION))
    with pytest.raises(OutputParserException, match="max_tokens"):
        list(model.stream(QUESTION))
    told = chat.with_structured_output(Sailing, include_raw=True, max_tokens=6).invoke(QUESTION)
    assert told["parsed"] is None
    assert isinstance(told["parsing_error"], OutputParserException)
    assert told["raw"].content.startswith('{"season')


def test_formats_of_one_call(chat):
    schema = {"type": "object", "properties": {"n": {"const": 1}}, "required": ["n"]}
    strict = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    assert chat.invoke(QUESTION, response_format=strict).content == '{"n": 1}'
    model = chat.bind(response_format={"type": "json_object"}, max_tokens=12) | JsonOutputParser()
    assert isinstance(model.invoke(QUESTION), dict)  # LangChain's parser completes what is cut off
    text = {"type": "text"}
    free = chat.invoke(QUESTION, response_format=text, max_tokens=6).content
    assert free == chat.invoke(QUESTION, max_tokens=6).content
    llm = CompressedMemoryLLM(library=chat.library, max_tokens=200)
    assert llm.invoke(QUESTION, schema={"enum": ["a"]}) == '"a"'
    with pytest.raises(InputError, match="both"):
        chat.invoke(QUESTION, response_format=strict, schema=schema)
    with pytest.raises(InputError, match="yaml"):
        chat.invoke(QUESTION, response_format={"type": "yaml"})
    with pytest.raises(InputError, match="no schema"):
        chat.invoke(QUESTION, response_format={"type": "json_schema", "json_schema": {"name": "n"}})


def test_what_cannot_be_says_so(chat):
    with pytest.warns(UserWarning, match="json_schema"):
        assert isinstance(chat.with_structured_output(Sailing, method="function_calling").invoke(QUESTION), Sailing)
    with pytest.raises(InputError, match="unknown method"):
        chat.with_structured_output(Sailing, method="grammar")
    with pytest.raises(InputError, match="no schema"):
        chat.with_structured_output(None)
    with pytest.raises(InputError, match="uniqueItems"):
        chat.with_structured_output({"type": "array", "uniqueItems": True}).invoke(QUESTION)
    with pytest.raises(InputError, match="unknown option 'colour'"):
        chat.with_structured_output(Sailing, colour="red").invoke(QUESTION)


def test_schemas_are_closed_where_they_do_not_say_otherwise():
    one, open_ = {"properties": {"a": {}}}, {"properties": {"a": {}}, "additionalProperties": {"properties": {"b": {}}}}
    shut = {**one, "additionalProperties": False}
    assert closed(one) == shut
    assert closed({"$defs": {"properties": one}, "anyOf": [one, True], "items": one}) == {
        "$defs": {"properties": shut},
        "anyOf": [shut, True],
        "items": shut,
    }
    assert closed(open_)["additionalProperties"] == {"properties": {"b": {}}, "additionalProperties": False}
    for left in ({"allOf": [one]}, {**one, "required": ["b"]}, {"enum": [one]}, {"type": "object"}, {}):
        assert closed(left) == left
    deep: dict = {}
    for _ in range(3000):
        deep = {"items": deep}
    with pytest.raises(InputError, match="deeply"):
        closed(deep)
