"""Running the application: where it listens, who may reach it, and how it ends."""

from __future__ import annotations

import ipaddress
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from ctxdocs.errors import InputError
from ctxdocs.integrations.server.app import create_app
from ctxdocs.integrations.server.settings import Settings

if TYPE_CHECKING:
    from ctxdocs.library import Library

_END_SECONDS = 60


class Server(uvicorn.Server):
    """A server that takes nothing new once it has been told to end, and writes begun answers to their end."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end."""
        self.config.app.state.ctxdocs.engine.refuse()  # type: ignore[union-attr]
        super().handle_exit(sig, frame)


def make_server(library: Library, settings: Settings, host: str = "127.0.0.1", port: int = 8000) -> Server:
    """Return a server that is ready to run."""
    config = uvicorn.Config(
        create_app(library, settings),
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        http="h11",
        timeout_keep_alive=15,
        timeout_graceful_shutdown=_END_SECONDS,
    )
    return Server(config)


def serve(library: Library, settings: Settings | None = None, *, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve a library until the process is told to end (SIGINT, SIGTERM); then finish what has been begun."""
    make_server(library, settings or Settings(), host, port).run()


def check_reach(host: str, settings: Settings) -> None:
    """Refuse an address that others reach, unless there are keys or every host name is allowed.

    Raises
    ------
    InputError
        If everybody in the network could read the library and write to it.
    """
    if is_loopback(host) or settings.keys or "*" in settings.hosts:
        return
    raise InputError(
        f"{host} can be reached from other machines, and there is no API key",
        "set CTXDOCS_API_KEYS or --api-keys FILE; or say --no-key if everybody who reaches it may use it",
    )


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
