"""Noticing that a client has left while its answer is being made."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import Request

from ctxdocs.integrations.server.errors import RequestError


@asynccontextmanager
async def while_connected(request: Request) -> AsyncIterator[None]:
    """Interrupt the block when the client leaves.

    Raises
    ------
    RequestError
        If it has left; nobody sees it, but the log.
    """
    this = asyncio.current_task()
    has_left = False

    async def watch() -> None:
        nonlocal has_left
        while (await request.receive())["type"] != "http.disconnect":
            pass
        has_left = True
        if this is not None:
            this.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if not has_left:
            raise
        if this is not None and hasattr(this, "uncancel"):
            this.uncancel()
        raise RequestError(499, "the client closed the connection", "client_closed") from None
    finally:
        watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watcher
