"""A server of a tiny library: its application in this process, or a real server on a free port."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import asynccontextmanager, contextmanager

import httpx

from ctxdocs import Library
from ctxdocs.corpus import Document
from ctxdocs.integrations.server import Settings, create_app
from ctxdocs.integrations.server.running import listen, make_server

QUESTION = "When was the lighthouse built?"
DOCUMENTS = {
    "lighthouse.md": "# Lighthouse\n\nThe lighthouse was built in 1874.\n",
    "ferry.txt": "The ferry sails twice a day in winter.\n",
    "gauge.rst": "Tide gauge\n==========\n\nIt is read every six hours.\n",
}


def small_library(folder, compressor, embedder):
    """A library of three short documents."""
    library = Library.create(folder / "library", compressor, embedder, chunk_tokens=32, overlap_tokens=4)
    library.add([Document.from_text(text, uri=f"/docs/{name}") for name, text in DOCUMENTS.items()])
    return library


@asynccontextmanager
async def client_of(library, **settings):
    """An HTTP client that talks to a library's application without a socket; ``client.state`` is the server's."""
    app = create_app(library, Settings(name="tiny", **settings))
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
            client.state = app.state.ctxdocs
            yield client


def with_client(library, use, **settings):
    """Run ``use(client)``, a coroutine function, against a library's application."""

    async def run():
        async with client_of(library, **settings) as client:
            return await use(client)

    return asyncio.run(run())


@contextmanager
def running(library, **settings):
    """A real server on a free port; yields its address and the server."""
    limits = Settings(name="tiny", **settings)
    listening = listen("127.0.0.1", 0, limits)
    server = make_server(library, limits)
    thread = threading.Thread(target=server.run, args=([listening],), name="test-server")
    thread.start()
    try:
        until = time.monotonic() + 60
        while not server.started and thread.is_alive() and time.monotonic() < until:
            time.sleep(0.01)
        assert server.started
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", server
    finally:
        server.end()
        thread.join(60)
        assert not thread.is_alive()


def settled(engine, seconds: float = 20.0) -> bool:
    """Whether a server's model has nothing more to do, within some time."""
    until = time.monotonic() + seconds
    while (engine.running or engine.waiting) and time.monotonic() < until:
        time.sleep(0.01)
    return not (engine.running or engine.waiting)
