"""Answers in JSON from the server: ``response_format`` as OpenAI's API has it, and as its client asks for it."""

from __future__ import annotations

import asyncio
import json
from typing import Literal

import jsonschema
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("llguidance")

from pydantic import BaseModel, Field

from .server_samples import QUESTION, running, small_library, with_client

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 200, "k": 2}
PATH = "/v1/chat/completions"


class Sailing(BaseModel):
    """When a ferry sails."""

    season: Literal["winter", "summer"]
    times: int = Field(ge=0, le=20)


SCHEMA = Sailing.model_json_schema()


def asked(schema, **more):
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **more}}


@pytest.fixture(scope="module")
def library(compressor, embedder, tmp_path_factory):
    return small_library(tmp_path_factory.mktemp("served"), compressor, embedder)


def post(library, change):
    return with_client(library, lambda client: client.post(PATH, json={**CHAT, **change}))


def test_an_answer_keeps_to_the_schema_whole_or_streamed(library):
    response = post(library, {"response_format": asked(SCHEMA, strict=True)})
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    text = choice["message"]["content"]
    assert choice["finish_reason"] == "stop"
    jsonschema.validate(json.loads(text), {**SCHEMA, "additionalProperties": False})
    streamed = post(library, {"response_format": asked(SCHEMA, strict=True), "stream": True})
    events = [json.loads(line[6:]) for line in streamed.text.split("\n\n") if line and line != "data: [DONE]"]
    assert "".join(choice["delta"].get("content", "") for event in events for choice in event["choices"]) == text
    assert library.ask(QUESTION, k=2, max_new_tokens=200, schema={**SCHEMA, "additionalProperties": False}).text == text


def test_any_object_and_text(library):
    response = post(library, {"response_format": {"type": "json_object"}, "max_tokens": 40})
    (choice,) = response.json()["choices"]
    assert choice["message"]["content"].startswith("{")
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(choice["message"]["content"]), dict)
    text = post(library, {"response_format": {"type": "text"}, "max_tokens": 8}).json()
    assert text["choices"][0]["message"]["content"] == library.ask(QUESTION, k=2, max_new_tokens=8).text


def test_requests_with_schemas_and_without_are_answered_in_one_batch(library):
    formats = [None, asked(SCHEMA), asked({"enum": ["pier"]}), None]
    bodies = [{**CHAT, "max_tokens": 24, "response_format": each} for each in formats]

    async def use(client):
        prefill, sizes = library.compressor.prefill, []
        library.compressor.prefill = lambda prompts: (sizes.append(len(prompts)), prefill(prompts))[1]
        try:
            return await asyncio.gather(*(client.post(PATH, json=body) for body in bodies)), sizes
        finally:
            del library.compressor.prefill

    responses, sizes = with_client(library, use, gather_seconds=2.0, batch_size=4)
    texts = [response.json()["choices"][0]["message"]["content"] for response in responses]
    assert sizes == [4]
    assert texts[0] == texts[3] == library.ask(QUESTION, k=2, max_new_tokens=24).text
    assert texts[1] == library.ask(QUESTION, k=2, max_new_tokens=24, schema=SCHEMA).text
    assert texts[2] == '"pier"'


@pytest.mark.parametrize(
    ("response_format", "message"),
    [
        ({"type": "yaml"}, "yaml"),
        ({}, "None"),
        ({"type": "json_schema"}, "no schema"),
        ({"type": "json_schema", "json_schema": {"name": "answer"}}, "no schema"),
        (asked({"type": "objct"}), "objct"),
        (asked({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (asked({"$ref": "file:///etc/passwd"}), "not present"),
        (asked({"enum": ["x" * 70_000]}), "bytes"),
        (asked({"properties": {f"p{number}": {} for number in range(2500)}}), "too big"),
        (asked(json.loads('{"items":' * 150 + "{}" + "}" * 150)), "recursion"),
        (asked(json.loads('{"items":' * 900 + "{}" + "}" * 900), strict=True), "recursion"),
    ],
)
def test_formats_that_cannot_be_are_refused_in_openais_shape(library, response_format, message):
    response = post(library, {"response_format": response_format})
    assert response.status_code == 400
    error = response.json()["error"]
    assert message in error["message"]
    assert (error["type"], error["param"]) == ("invalid_request_error", "response_format")


def test_the_openai_client_parses_answers(library):
    openai = pytest.importorskip("openai")
    asked_for = {"model": "tiny", "messages": CHAT["messages"], "response_format": Sailing}
    with running(library) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        completion = client.chat.completions.parse(**asked_for, max_tokens=200)
        assert isinstance(completion.choices[0].message.parsed, Sailing)
        with client.chat.completions.stream(**asked_for, max_tokens=200) as stream:
            assert stream.get_final_completion().choices[0].message.parsed == completion.choices[0].message.parsed
        with pytest.raises(openai.LengthFinishReasonError):
            client.chat.completions.parse(**asked_for, max_tokens=4)
        with pytest.raises(openai.BadRequestError, match="objct"):
            client.chat.completions.create(**{**asked_for, "response_format": asked({"type": "objct"})})
