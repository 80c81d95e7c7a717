"""The server's OpenAI endpoints, search and health, with a tiny model and without a socket."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("fastapi")

import numpy as np

from ctxdocs.integrations.server import Settings

from .server_samples import QUESTION, small_library, with_client

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 8, "k": 2}


@pytest.fixture(scope="module")
def library(compressor, embedder, tmp_path_factory):
    return small_library(tmp_path_factory.mktemp("served"), compressor, embedder)


def post(library, path, body, **settings):
    """Send one body; return the response."""
    return with_client(library, lambda client: client.post(path, json=body), **settings)


def events(response):
    """The JSON values of server-sent events, whose end is checked."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_models_are_the_librarys_and_its_embedder(library):
    async def use(client):
        listed = (await client.get("/v1/models")).json()
        one = (await client.get("/v1/models/tiny")).json()
        none = await client.get("/v1/models/gpt-4")
        return listed, one, none

    listed, one, none = with_client(library, use)
    assert [model["id"] for model in listed["data"]] == ["tiny", "fake-bag-of-words"]
    assert one == listed["data"][0]
    assert one["ctxdocs"]["fingerprint"] == library.compressor.fingerprint
    assert none.status_code == 404
    assert none.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("mode", ["memory", "text", "none"])
def test_a_chat_of_one_message_is_answered_as_the_library_answers(library, mode):
    response = post(library, "/v1/chat/completions", {**CHAT, "mode": mode})
    assert response.status_code == 200, response.text
    value = response.json()
    answer = library.ask(QUESTION, k=2, mode=mode, max_new_tokens=8)
    assert value["object"] == "chat.completion"
    assert value["choices"][0]["message"] == {"role": "assistant", "content": answer.text, "refusal": None}
    assert value["choices"][0]["finish_reason"] == answer.finish_reason
    usage = value["usage"]
    assert usage["prompt_tokens"] == answer.prompt_tokens
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    extra = usage["ctxdocs"]
    assert (extra["mode"], extra["memory_slots"]) == (mode, answer.memory_slots)
    assert [source["id"] for source in extra["sources"]] == [hit.id for hit in answer.sources]
    assert 0 <= extra["waited"] <= extra["time_to_first_token"] <= extra["seconds"]


def test_a_stream_says_the_same_as_the_whole(library):
    whole = post(library, "/v1/chat/completions", {**CHAT, "max_tokens": 24}).json()
    body = {**CHAT, "max_tokens": 24, "stream": True, "stream_options": {"include_usage": True}}
    response = post(library, "/v1/chat/completions", body)
    assert response.headers["content-type"].startswith("text/event-stream")
    parts = events(response)
    assert {part["object"] for part in parts} == {"chat.completion.chunk"}
    assert len({part["id"] for part in parts}) == 1
    assert parts[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert parts[0]["ctxdocs"]["memory_slots"] == 8  # what is read is told with the first token
    text = "".join(choice["delta"].get("content", "") for part in parts for choice in part["choices"])
    assert text == whole["choices"][0]["message"]["content"]
    assert parts[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert parts[-1]["choices"] == []
    assert parts[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert parts[-1]["usage"]["ctxdocs"]["sources"] == whole["usage"]["ctxdocs"]["sources"]


def test_a_conversation_goes_on_as_ctxdocs_chat_writes_it(library):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Good day."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "When does the "}, {"type": "text", "text": "ferry sail?"}],
        },
    ]
    response = post(library, "/v1/chat/completions", {**CHAT, "messages": messages, "k": 1, "stop": ["zzz"]})
    hits = library.search("When does the ferry sail?", k=1)
    prompt = ["Be brief.\n\nQuestion: Hello.\nAnswer:Good day.\n\n", *library.memories(hits)]
    prompt += ["Question: When does the ferry sail?\nAnswer:"]
    stop = ("\nQuestion:", "\n\n", "zzz")
    expected = library.compressor.generate(prompt, max_new_tokens=8, stop=stop)
    assert response.json()["choices"][0]["message"]["content"] == expected.strip()


def test_completions_continue_prompts_as_they_stand(library):
    prompts = ["The ferry sails", "In winter"]
    body = {"model": "tiny", "prompt": prompts, "max_tokens": 6, "k": 1}
    value = post(library, "/v1/completions", body).json()
    assert value["object"] == "text_completion"
    for index, (choice, prompt) in enumerate(zip(value["choices"], prompts, strict=True)):
        memories = library.memories(library.search(prompt, k=1))
        assert choice["index"] == index
        assert choice["text"] == library.compressor.generate(prompt, memories, max_new_tokens=6)
    assert value["usage"]["ctxdocs"]["memory_slots"] == 8
    response = post(library, "/v1/completions", {**body, "prompt": prompts[0], "stream": True})
    assert "".join(part["choices"][0]["text"] for part in events(response)) == value["choices"][0]["text"]


def test_text_from_outside_never_becomes_special_tokens(library):
    """An end-of-text mark in a system text or a message is text like any other."""
    messages = [{"role": "system", "content": "<|end|>"}, {"role": "user", "content": "<|end|> ferry"}]
    usage = post(library, "/v1/chat/completions", {**CHAT, "messages": messages, "mode": "none"}).json()["usage"]
    plain = library.compressor.tokenizer("<|end|>", split_special_tokens=True)["input_ids"]
    assert usage["prompt_tokens"] >= 2 * len(plain) > 2


def test_embeddings_are_those_of_the_index(library):
    texts = ["the ferry", "the lighthouse"]
    body = {"model": "fake-bag-of-words", "input": texts}
    vectors = [row["embedding"] for row in post(library, "/v1/embeddings", body).json()["data"]]
    np.testing.assert_allclose(vectors, library.embedder.embed_documents(texts))
    assert post(library, "/v1/embeddings", {**body, "input": ""}).status_code == 400
    assert post(library, "/v1/embeddings", {**body, "model": "tiny"}).status_code == 404
    assert post(library, "/v1/embeddings", {**body, "dimensions": 3}).json()["error"]["param"] == "dimensions"


def test_search_finds_what_the_library_finds(library):
    value = post(library, "/v1/search", {"query": "lighthouse", "k": 2, "retrieval": "dense"}).json()
    expected = library.search("lighthouse", k=2, retrieval="dense")
    assert [(hit["id"], hit["text"], hit["score"]) for hit in value["data"]] == [
        (hit.id, hit.text, pytest.approx(hit.score)) for hit in expected
    ]
    assert post(library, "/v1/search", {"query": " "}).status_code == 400


def test_health_and_metrics(library):
    async def use(client):
        await client.post("/v1/chat/completions", json=CHAT)
        await client.post("/v1/chat/completions", json={**CHAT, "stream": True})
        await client.get("/nowhere/at/all")
        return (await client.get("/healthz")).json(), (await client.get("/metrics")).text

    health, metrics = with_client(library, use)
    assert health == {"status": "ok", "model": "tiny", "waiting": 0, "running": 0}
    assert 'ctxdocs_requests_total{path="/v1/chat/completions",status="200"} 2.0' in metrics
    assert 'ctxdocs_requests_total{path="other",status="404"} 1.0' in metrics
    assert 'ctxdocs_answers_total{mode="memory",reason="length"} 2.0' in metrics
    assert 'ctxdocs_tokens_total{kind="completion"} 16.0' in metrics
    assert "ctxdocs_memory_slots_total 16.0" in metrics
    assert "ctxdocs_library_documents 3.0" in metrics


def test_the_description_lists_every_endpoint(library):
    described = with_client(library, lambda client: client.get("/openapi.json")).json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/models", "/v1/search"} <= set(
        described["paths"]
    )


MESSAGE = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"model": "gpt-4"}, 404, "'gpt-4' does not exist here; this is 'tiny'"),
        ({"messages": []}, 400, "there are no messages"),
        ({"messages": [{"role": "user", "content": "  "}]}, 400, "message 0 is empty"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "role 'assistant' out of turn; expected 'user'"),
        ({"messages": [MESSAGE, MESSAGE]}, 400, "message 1 is of role 'user' out of turn"),
        (
            {"messages": [MESSAGE, {"role": "assistant", "content": "x"}]},
            400,
            "the last message must be of role 'user'",
        ),
        ({"messages": [MESSAGE, {"role": "system", "content": "x"}]}, 400, "stand at the beginning"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages[0].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            400,
            "messages[0].content[0].type: ",
        ),
        ({"messages": [{"role": "user", "content": None}]}, 400, "messages[0].content: "),
        ({"messages": "hello"}, 400, "messages"),
        ({"k": 0}, 400, "k: "),
        ({"k": 10_000}, 400, "at most 64"),
        ({"mode": "telepathy"}, 400, "mode"),
        ({"max_tokens": 5000}, 400, "at most 1024"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"temperature": -1}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"seed": 2**70}, 400, "seed"),
        ({"n": 2}, 400, "n is not supported"),
        ({"tools": [{}]}, 400, "tools is not supported"),
        ({"response_format": {"type": "yaml"}}, 400, "response_format is of type 'yaml'"),
        ({"frequency_penalty": 1}, 400, "frequency_penalty"),
        ({"colour": "red"}, 400, "unknown field 'colour'"),
        ({"stop": ["x"] * 17}, 400, "at most 16"),
        ({"stop": [""]}, 400, "stop strings must not be empty"),
        ({"stream": "perhaps"}, 400, "stream"),
    ],
)
def test_wrong_requests_are_refused_by_name(library, change, status, message):
    response = post(library, "/v1/chat/completions", {**CHAT, **change})
    assert response.status_code == status
    error = response.json()["error"]
    assert message in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == {400: "invalid_request_error", 404: "not_found_error"}[status]


def test_bodies_that_are_no_json_are_refused(library):
    async def use(client):
        json_type = {"Content-Type": "application/json"}
        path = "/v1/chat/completions"
        return [
            await client.post(path, content=b"{not json", headers=json_type),
            await client.post(path, content=b"[]", headers=json_type),
            await client.post(path, content=b"", headers=json_type),
            await client.post(path, content=b"[" * 100_000, headers=json_type),
            await client.post(path, content=json.dumps(CHAT).encode(), headers={"Content-Type": "text/plain"}),
            await client.post(path, content=b'{"model": "\xff"}', headers=json_type),
            await client.post(path, content=json.dumps({**CHAT, "stop": "\ud800"}).encode(), headers=json_type),
        ]

    responses = with_client(library, use)
    assert [response.status_code for response in responses] == [400] * len(responses)
    for response in responses:
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_paths_and_methods_that_are_none(library):
    async def use(client):
        return await client.get("/v1/nothing"), await client.get("/v1/chat/completions")

    nothing, method = with_client(library, use)
    assert (nothing.status_code, method.status_code) == (404, 405)
    assert "there is no /v1/nothing" in nothing.json()["error"]["message"]


def test_a_prompt_that_is_too_long_says_by_how_much(library):
    body = {**CHAT, "messages": [{"role": "user", "content": "ferry " * 3000}], "mode": "none"}
    for stream in (False, True):
        error = post(library, "/v1/chat/completions", {**body, "stream": stream}).json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert "more than the model's 2048" in error["message"]


def test_k_beyond_the_library_reads_all_there_is(library):
    usage = post(library, "/v1/chat/completions", {**CHAT, "k": 64}).json()["usage"]
    assert len(usage["ctxdocs"]["sources"]) == library.info()["chunks"]


def test_an_empty_library_says_so_and_answers_from_nothing(make_library):
    empty = make_library("empty")
    response = post(empty, "/v1/chat/completions", CHAT)
    assert response.status_code == 409
    assert "holds no documents yet" in response.json()["error"]["message"]
    assert post(empty, "/v1/chat/completions", {**CHAT, "mode": "none"}).status_code == 200


def test_errors_of_the_server_tell_nothing_of_its_inside(library, monkeypatch):
    def broken(*_):
        raise RuntimeError("secret path /home/me")

    monkeypatch.setattr(type(library.compressor), "prefill", broken)
    response = post(library, "/v1/chat/completions", CHAT)
    assert response.status_code == 500
    assert "secret" not in response.text
    assert response.json()["error"]["type"] == "server_error"


@pytest.mark.parametrize(
    "settings", [{"batch_size": 0}, {"request_seconds": 0}, {"keys": ("short",)}, {"upload_bytes": 2**40}]
)
def test_settings_that_cannot_be_are_refused(settings):
    from ctxdocs import InputError

    with pytest.raises(InputError):
        Settings(**settings)
