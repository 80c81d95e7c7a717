"""Connections of bounded number, whose requests have to arrive in time.

The server underneath bounds how long a connection may be idle between requests, and nothing bounds how slowly the head
of a request comes in: a client that sends a byte now and then would hold its connection for ever. Bodies are bounded in
:mod:`ctxdocs.integrations.server.guarding`, where more is known of them.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from ctxdocs.integrations.server.errors import RequestError

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from ctxdocs.integrations.server.settings import Settings


class BoundedConnection(H11Protocol):
    """A connection that is closed when a request's head does not arrive within ``head_seconds``.

    One that is opened beside ``most`` others is told to come again, and closed.
    """

    head_seconds = 15.0
    most = 1024

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        super().connection_made(transport)
        if len(self.connections) > self.most:
            self.app = _crowded
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        """Take what arrived, and wait for the rest of a head that has begun."""
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._wait_for_head()
        else:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing more."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait_for_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_seconds, self._too_late)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _too_late(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self.transport.close()


async def _crowded(scope: Scope, receive: Receive, send: Send) -> None:
    headers = {"Retry-After": "1", "Connection": "close"}
    error = RequestError(
        503, "too many connections are open; try again in 1 s", "too_many_connections", headers=headers
    )
    await error.response()(scope, receive, send)


def bounded(settings: Settings) -> type[BoundedConnection]:
    """Return the kind of connection that keeps to a server's limits."""

    class Bounded(BoundedConnection):
        head_seconds = settings.head_seconds
        most = settings.connections

    return Bounded
