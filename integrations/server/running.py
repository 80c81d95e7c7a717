"""Running the application: where it listens, who may reach it, and how it ends."""

from __future__ import annotations

import ipaddress
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

from ctxdocs.errors import CtxdocsError, InputError
from ctxdocs.integrations.server.app import create_app
from ctxdocs.integrations.server.connections import bounded
from ctxdocs.integrations.server.settings import Settings

if TYPE_CHECKING:
    from ctxdocs.library import Library

_END_SECONDS = 60


class Server(uvicorn.Server):
    """A server that takes nothing new once it has been told to end, and writes begun answers to their end."""

    @property
    def model_name(self) -> str:
        """What clients call the model."""
        app: Any = self.config.app
        return app.state.ctxdocs.model_name

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end; told a second time, end at once."""
        self.force_exit = self.should_exit
        self.end()

    def end(self) -> None:
        """Take nothing new; :meth:`run` returns when what has been begun is done."""
        app: Any = self.config.app
        app.state.ctxdocs.engine.refuse()
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """End by signals. Being told to end is how a server ends, and no failure: they are not raised again."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {each: signal.signal(each, self.handle_exit) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)


def make_server(library: Library, settings: Settings) -> Server:
    """Return a server that is ready to run on a socket (:func:`listen`)."""
    config = uvicorn.Config(
        create_app(library, settings),
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        http=bounded(settings),
        timeout_keep_alive=15,
        timeout_graceful_shutdown=_END_SECONDS,
    )
    return Server(config)


def listen(host: str, port: int, settings: Settings) -> socket.socket:
    """Return a socket that listens at an address.

    Raises
    ------
    InputError
        If everybody in the network could read the library and write to it.
    CtxdocsError
        If there is no such address, or something else listens there.
    """
    if not (is_loopback(host) or settings.keys or "*" in settings.hosts):
        raise InputError(
            f"{host} can be reached from other machines, and there is no API key",
            "set CTXDOCS_API_KEYS or --api-keys FILE; or say --no-key if everybody who reaches it may use it",
        )
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
        except OSError:
            listening.close()
            raise
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CtxdocsError(f"cannot listen on {host}:{port} ({reason})", "choose another --port or --host") from error
    return listening


def serve(library: Library, settings: Settings | None = None, *, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve a library until the process is told to end (SIGINT, SIGTERM); then finish what has been begun.

    Raises
    ------
    InputError, CtxdocsError
        As :func:`listen`.
    """
    settings = settings or Settings()
    with listen(host, port, settings) as listening:
        make_server(library, settings).run([listening])


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
