"""Documents sent to a server: compressed in the background, listed, removed; names and contents nobody can trust."""

from __future__ import annotations

import asyncio
import io
import threading
import zipfile

import pytest

pytest.importorskip("fastapi")

from ctxdocs import Library
from ctxdocs.integrations.server.errors import RequestError
from ctxdocs.integrations.server.names import safe_name

from .server_samples import client_of, small_library, with_client

TEXT = "The heron colony on Pell Island was counted in May: 31 nests.\n"


@pytest.fixture
def library(compressor, embedder, tmp_path):
    return small_library(tmp_path, compressor, embedder)


def form(name, content):
    return {"file": (name, content if isinstance(content, bytes) else content.encode(), "application/octet-stream")}


async def uploaded(client, name, content):
    """Upload a document, and wait until something has become of it."""
    response = await client.post("/v1/documents", files=form(name, content))
    assert response.status_code == 202, response.text
    return await over(client, response.json()["id"])


async def over(client, upload_id):
    for _ in range(5000):
        state = (await client.get(f"/v1/documents/{upload_id}")).json()
        if state["status"] not in ("waiting", "compressing"):
            return state
        await asyncio.sleep(0.01)
    raise AssertionError(state)


def test_an_uploaded_document_is_compressed_found_listed_and_removed(library):
    async def use(client):
        state = await uploaded(client, "herons.md", TEXT * 20)
        assert (state["status"], state["error"], state["progress"]) == ("done", None, 1.0)
        assert state["chunks"] > 1
        body = {"query": "heron colony nests", "k": 1}
        found = (await client.post("/v1/search", json=body)).json()["data"][0]
        assert found["document"] == "upload/herons.md"
        listed = (await client.get("/v1/documents")).json()
        assert [document["name"] for document in listed["data"]][-1] == "herons.md"
        assert listed["library"]["documents"] == 4
        (document,) = (each for each in listed["data"] if each["name"] == "herons.md")
        assert document["chunks"] == state["chunks"]
        assert (await client.get(f"/v1/documents/{document['id']}")).json() == document
        deleted = await client.delete(f"/v1/documents/{document['id']}")
        assert deleted.json()["deleted"] is True
        assert (await client.get(f"/v1/documents/{document['id']}")).status_code == 404
        again = (await client.post("/v1/search", json=body)).json()["data"][0]
        assert again["document"] != "upload/herons.md"

    with_client(library, use)
    assert list((library.path / "uploads").iterdir()) == []


def test_uploaded_memories_are_those_of_the_library_itself(library, make_library):
    from ctxdocs.corpus import Document

    with_client(library, lambda client: uploaded(client, "herons.txt", TEXT * 30))
    other = make_library("other")
    other.add(Document.from_text(TEXT * 30, uri="upload/herons.txt"))
    mine, theirs = (
        each.store.memories(each.store.chunks(each.store.chunk_ids(["upload/herons.txt"]).tolist()))
        for each in (library, other)
    )
    assert len(mine) == len(theirs) > 8
    for one, another in zip(mine, theirs, strict=True):
        assert (one.vectors - another.vectors).abs().max() < 1e-4


def test_the_same_name_replaces_and_the_same_content_is_left_alone(library):
    async def use(client):
        first = await uploaded(client, "note.txt", TEXT)
        same = await uploaded(client, "note.txt", TEXT)
        assert same["chunks"] == first["chunks"]
        await uploaded(client, "note.txt", "Something else altogether.")
        listed = (await client.get("/v1/documents")).json()
        assert sum(document["name"] == "note.txt" for document in listed["data"]) == 1

    with_client(library, use)
    assert "upload/note.txt" in library.store.digests()


def test_answers_are_written_while_a_document_is_compressed(library):
    async def use(client):
        chat = {"model": "tiny", "messages": [{"role": "user", "content": "ferry"}], "max_tokens": 4, "k": 1}
        response = await client.post("/v1/documents", files=form("long.txt", TEXT * 100))
        answers = 0
        while not client.state.uploads.get(response.json()["id"]).is_over:
            assert (await client.post("/v1/chat/completions", json=chat)).status_code == 200
            answers += 1
        return answers, await over(client, response.json()["id"])

    answers, state = with_client(library, use)
    assert state["status"] == "done"
    assert answers > 3


def test_an_upload_waits_while_another_process_writes(library):
    async def use(client):
        with library.store.writer():
            response = await client.post("/v1/documents", files=form("herons.txt", TEXT))
            await asyncio.sleep(0.3)
            during = (await client.get(f"/v1/documents/{response.json()['id']}")).json()["status"]
        return during, (await over(client, response.json()["id"]))["status"]

    assert with_client(library, use) == ("compressing", "done")


def test_an_upload_that_is_given_up_leaves_nothing(library):
    async def use(client):
        response = await client.post("/v1/documents", files=form("long.txt", TEXT * 1000))
        upload_id = response.json()["id"]
        assert (await client.delete(f"/v1/documents/{upload_id}")).status_code == 200
        return await over(client, upload_id)

    assert with_client(library, use)["status"] == "cancelled"
    assert "upload/long.txt" not in library.store.digests()
    assert list((library.path / "uploads").iterdir()) == []


def test_a_server_that_ends_goes_on_with_what_it_took_when_it_starts_again(library, compressor, embedder):
    async def begin():
        async with client_of(library) as client:
            for name in ("long.txt", "next.txt"):
                assert (await client.post("/v1/documents", files=form(name, TEXT * 200))).status_code == 202

    async def go_on(client):
        names = {upload.name for upload in client.state.uploads.all()}
        for upload in client.state.uploads.all():
            assert (await over(client, upload.id))["status"] == "done"
        return names

    asyncio.run(begin())
    left = {path.suffix for path in (library.path / "uploads").iterdir()}
    assert left == {".json", ".txt"}
    (library.path / "uploads" / "up_stray.txt").write_text("never accepted")
    again = Library.open(library.path, compressor, embedder)
    assert "next.txt" in with_client(again, go_on)
    assert {"upload/long.txt", "upload/next.txt"} <= set(again.store.digests())
    assert list((library.path / "uploads").iterdir()) == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ctxdocs-")]


@pytest.mark.parametrize(
    ("name", "content", "status", "message"),
    [
        ("program.exe", b"MZ", 415, "the format of 'program.exe' is not read"),
        ("noname", b"x", 415, "is not read"),
        ("", b"x", 400, ""),
        ("empty.txt", b"", 400, "empty.txt is empty"),
        ("fake.pdf", b"no pdf at all", 415, "fake.pdf is no .pdf file"),
        ("fake.docx", b"no archive", 415, "fake.docx is no .docx file"),
        ("large.txt", b"x" * 20_000, 413, "larger than"),
        ("huge.txt", b"x" * 60_000, 413, "larger than"),
    ],
)
def test_documents_that_cannot_be_are_refused_at_once(library, name, content, status, message):
    send = lambda client: client.post("/v1/documents", files=form(name, content))  # noqa: E731
    response = with_client(library, send, upload_bytes=16_384)
    assert response.status_code == status, response.text
    assert message in response.json()["error"]["message"]
    folder = library.path / "uploads"
    assert not folder.exists() or list(folder.iterdir()) == []


def test_a_word_document_that_expands_beyond_measure_is_refused(library):
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("word/document.xml", b"a" * 20_000_000)
    response = with_client(library, lambda client: client.post("/v1/documents", files=form("b.docx", bomb.getvalue())))
    assert response.status_code == 413
    assert "expands to 20,000,000 bytes" in response.json()["error"]["message"]


def test_what_cannot_be_read_fails_without_saying_where_it_lay(library):
    state = with_client(library, lambda client: uploaded(client, "binary.txt", bytes(range(256)) * 8))
    assert state["status"] == "failed"
    assert state["error"].startswith("binary.txt: binary, not text")
    assert str(library.path) not in state["error"]


def test_a_form_without_a_document_is_refused(library):
    async def use(client):
        return [
            await client.post("/v1/documents", files={"other": ("a.txt", b"x")}),
            await client.post("/v1/documents", data={"file": "no file"}),
            await client.post("/v1/documents", files=[("file", ("a.txt", b"a")), ("file", ("b.txt", b"b"))]),
            await client.post("/v1/documents", json={"file": "x"}),
            await client.get("/v1/documents/doc_999"),
            await client.get("/v1/documents/../../etc/passwd"),
            await client.delete("/v1/documents/up_nothing"),
        ]

    responses = with_client(library, use)
    assert [response.status_code for response in responses] == [400, 400, 400, 400, 404, 404, 404]
    assert all("error" in response.json() for response in responses)


def test_a_read_only_server_changes_nothing(library):
    async def use(client):
        document = (await client.get("/v1/documents")).json()["data"][0]["id"]
        return [
            await client.post("/v1/documents", files=form("a.txt", "x")),
            await client.delete(f"/v1/documents/{document}"),
        ]

    assert [response.status_code for response in with_client(library, use, access="read")] == [403, 403]
    assert library.info()["documents"] == 3


def test_too_many_waiting_uploads_are_sent_away(library):
    async def use(client):
        return [(await client.post("/v1/documents", files=form(f"{n}.txt", TEXT * 100))).status_code for n in range(4)]

    assert 429 in with_client(library, use, pending_uploads=2)


def test_listing_goes_page_by_page(library):
    async def use(client):
        first = (await client.get("/v1/documents?limit=2")).json()
        rest = (await client.get(f"/v1/documents?limit=2&after={first['data'][-1]['id']}")).json()
        return first, rest

    first, rest = with_client(library, use)
    assert (len(first["data"]), first["has_more"]) == (2, True)
    assert (len(rest["data"]), rest["has_more"]) == (1, False)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("report.md", "report.md"),
        ("../../etc/passwd.txt", "passwd.txt"),
        ("..\\..\\windows\\win.txt", "win.txt"),
        ("/absolute/path.PDF", "path.pdf"),
        ("a\x00b\u202etxt.exe.txt", "abtxt.exe.txt"),
        ("  .hidden.md", "hidden.md"),
        ("nul\nline.md", "nulline.md"),
        ("Cafe\u0301.md", "Caf\u00e9.md"),
        ("x" * 300 + ".txt", "x" * 120 + ".txt"),
    ],
)
def test_names_are_made_safe(given, kept):
    assert safe_name(given) == kept


@pytest.mark.parametrize("given", [None, "", "..", "/", ".txt", "...md", "folder/", "a.tx\u202et"[:-1]])
def test_names_that_are_none_are_refused(given):
    with pytest.raises(RequestError):
        safe_name(given)
