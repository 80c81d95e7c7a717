"""The server's page: what it may load, and, in a real browser, what people do with it."""

from __future__ import annotations

import re
import shutil
from contextlib import contextmanager

import pytest

pytest.importorskip("fastapi")

from .server_samples import QUESTION, running, small_library, with_client

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HOSTILE = "<img src=x onerror=top.x=1>"


@pytest.fixture
def library(compressor, embedder, tmp_path):
    return small_library(tmp_path, compressor, embedder)


def test_the_page_loads_nothing_from_elsewhere_and_runs_nothing_inline(library):
    async def use(client):
        pages = [await client.get(path) for path in ("/", "/docs")]
        names = {name for page in pages for name in re.findall(r'(?:src|href)="(/static/[^"]+)"', page.text)}
        return pages, [await client.get(name) for name in names], await client.get("/static/..%2fpage.py")

    pages, files, outside = with_client(library, use, keys=("correct-horse",))
    for page in pages:
        assert page.status_code == 200
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert "unsafe" not in page.headers["content-security-policy"]
        assert not re.search(r"<script(?![^>]*src)|<style| on[a-z]+=|style=|https?://(?!www\.w3\.org)", page.text)
    assert len(files) == 3
    for file in files:
        assert file.status_code == 200
        assert "innerHTML" not in file.text
        assert not re.search(r"https?://(?!www\.w3\.org)", file.text)
    assert outside.status_code == 404


@contextmanager
def page_of(url, **options):
    """A page in a headless browser; fails at the end if anything went wrong in it or was loaded from elsewhere."""
    sync_api = pytest.importorskip("playwright.sync_api")
    browser_path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser_path is None:
        pytest.skip("there is no browser")
    problems = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_context(**options).new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        # That the server refused something is noted there too; what the page makes of it, the tests look at.
        page.on("console", lambda said: None if "Failed to load" in said.text else problems.append(said.text))
        page.on("request", lambda request: problems.append(request.url) if not is_own(request.url, url) else None)
        page.goto(url)
        yield page
        browser.close()
    assert problems == []


def is_own(requested, url):
    return requested.startswith((url.removesuffix("/docs"), "data:"))


@pytest.mark.parametrize("width", [390, 1100])
def test_asking_shows_two_answers_what_they_took_and_their_sources(library, width):
    with running(library) as (url, _), page_of(url, viewport={"width": width, "height": 844}) as page:
        page.wait_for_selector("#totals dd")
        page.keyboard.type(QUESTION)  # the question has the focus
        page.keyboard.press("Enter")
        page.wait_for_selector("#stop", state="visible")
        page.wait_for_selector("#send", state="visible")
        memory, text = (page.locator(f'.pane[data-mode="{mode}"]') for mode in ("memory", "text"))
        for pane, mode in ((memory, "memory"), (text, "text")):
            answer = library.ask(QUESTION, k=4, mode=mode, max_new_tokens=64)
            assert pane.locator(".answer").inner_text().split() == answer.text.split()
            assert f"{answer.prompt_tokens} token" in pane.locator(".prompt").inner_text()
            assert re.fullmatch(r"\d+\.\d+ s", pane.locator(".first").inner_text())
        assert f"{answer_slots(library)} slots" in memory.locator(".prompt").inner_text()
        assert page.locator("#sources li").count() == 3
        page.locator("#sources summary").first.click()
        assert page.locator("#sources .text").first.is_visible()
        assert page.locator("#picture .tile").count() == 3
        assert page.locator("#picture .read").count() == 3
        page.locator("summary", has_text="All documents").click()
        assert page.locator("#documents tr").count() == 3
        assert page.evaluate("document.documentElement.scrollWidth") == width


def answer_slots(library):
    return sum(hit.slots for hit in library.search(QUESTION, k=4))


def test_documents_are_dropped_compressed_shown_and_removed(library, tmp_path):
    name = "<b>heron.txt"
    path = tmp_path / name
    path.write_text(HOSTILE, encoding="utf-8")
    (tmp_path / "program.exe").write_bytes(b"MZ")
    with running(library) as (url, _), page_of(url) as page:
        page.set_input_files("#file", [path, tmp_path / "program.exe"])
        page.wait_for_selector("#uploads li:has-text('in the library')")
        page.wait_for_selector("#uploads .problem:has-text('is not read')")
        dropped = page.evaluate_handle(
            """() => { const data = new DataTransfer();
            data.items.add(new File(["Terns nest elsewhere."], "tern.md")); return data; }"""
        )
        page.dispatch_event("#drop", "drop", {"dataTransfer": dropped})
        page.wait_for_selector("#uploads li:has-text('tern.md'):has-text('in the library')")
        page.fill("#question", "onerror")
        page.press("#question", "Enter")
        page.wait_for_selector("#stop", state="visible")
        page.wait_for_selector("#send", state="visible")
        for summary in page.locator("#sources summary").all():
            summary.click()
        assert HOSTILE in "".join(page.locator("#sources .text").all_inner_texts())
        assert page.evaluate("top.x") is None
        assert page.locator("main img, main b").count() == 0
        page.locator("summary", has_text="All documents").click()
        page.on("dialog", lambda dialog: dialog.accept())
        page.get_by_role("button", name=f"Remove {name}").click()
        page.locator("#documents tr", has_text=name).wait_for(state="detached")
        assert page.locator("#documents tr").count() == 4
    assert "upload/tern.md" in library.store.digests()
    assert f"upload/{name}" not in library.store.digests()


def test_a_key_is_asked_for_and_an_answer_can_be_stopped(library, monkeypatch):
    import time

    step = type(library.compressor).step

    def slowly(self, ids, state):
        time.sleep(0.05)
        return step(self, ids, state)

    monkeypatch.setattr(type(library.compressor), "step", slowly)
    monkeypatch.setattr(library.compressor.model.generation_config, "eos_token_id", [399])
    with running(library, keys=("correct-horse",)) as (url, server), page_of(url, color_scheme="dark") as page:
        for key, found in (("wrong-horse", "#key-problem:has-text('not one of')"), ("correct-horse", "#totals dd")):
            page.fill("#key", key)
            page.press("#key", "Enter")
            page.wait_for_selector(found)
        assert page.locator("#key-form").is_hidden()
        assert page.locator("#question").is_visible()
        page.fill("#tokens", "1000")
        page.fill("#question", "ferry")
        page.press("#question", "Enter")
        page.wait_for_selector(".answer.writing")
        page.click("#stop")
        page.wait_for_selector("#send", state="visible")
        engine = server.config.app.state.ctxdocs.engine
        until = time.monotonic() + 20
        while engine.running and time.monotonic() < until:
            time.sleep(0.02)
        assert engine.running == 0


def test_the_endpoints_are_described(library):
    with running(library) as (url, _), page_of(f"{url}/docs") as page:
        page.wait_for_selector(".endpoint")
        assert "/v1/chat/completions" in page.locator("#endpoints").inner_text()
