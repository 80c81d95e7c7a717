"""Connections whose requests have to arrive in time.

The server underneath bounds how long a connection may be idle between requests, and nothing bounds how slowly the head
of a request comes in: a client that sends a byte now and then would hold its connection for ever. Bodies are bounded in
:mod:`ctxdocs.integrations.server.guarding`, where more is known of them.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


class TimelyConnection(H11Protocol):
    """A connection that is closed when a request's head does not arrive within ``head_seconds``."""

    head_seconds = 15.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        super().connection_made(transport)
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


def timely(head_seconds: float) -> type[TimelyConnection]:
    """Return the kind of connection that waits so long for a head."""

    class Timely(TimelyConnection):
        pass

    Timely.head_seconds = head_seconds
    return Timely
