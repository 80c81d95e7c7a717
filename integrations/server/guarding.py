"""What every request passes before an endpoint sees it: who asks, how much is sent, and how slowly."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ctxdocs.integrations.server.errors import RequestError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from ctxdocs.integrations.server.settings import Settings

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_NEEDS_KEY = ("/v1", "/metrics")
_UPLOADS = "/v1/documents"
_READS_ONLY = ("GET", "HEAD", "OPTIONS")


class Guard:
    """Refuses requests that no endpoint should see.

    Without keys, requests have to be addressed to a loopback name, so that a web site whose name is made to point here
    reads nothing; and with keys or without, what changes something may not come from a page of another origin.

    Parameters
    ----------
    app : ASGI application
        Sees the others.
    settings : Settings
        Keys, hosts and limits.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.settings = settings
        self._digests = [hashlib.sha256(key.encode()).digest() for key in settings.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with what is wrong."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            self._check_host(headers)
            self._check_origin(scope["method"], headers)
            self._check_key(scope["path"], headers)
            body = _Body(scope, headers, receive, self.settings)
        except RequestError as error:
            await error.response()(scope, receive, send)
            return
        await self.app(scope, body.receive, send)

    def _check_host(self, headers: dict[str, str]) -> None:
        if self._digests or "*" in self.settings.hosts:
            return
        host = urlsplit(f"//{headers.get('host', '')}").hostname or ""
        if host not in _LOOPBACK and host not in self.settings.hosts:
            raise RequestError(403, f"this server does not answer to the name {host!r}", "host_not_allowed")

    def _check_origin(self, method: str, headers: dict[str, str]) -> None:
        origin = headers.get("origin")
        if origin is None or method in _READS_ONLY:
            return
        if urlsplit(origin).netloc != headers.get("host"):
            raise RequestError(403, "pages of another origin may not do this", "origin_not_allowed")

    def _check_key(self, path: str, headers: dict[str, str]) -> None:
        if not self._digests or not path.startswith(_NEEDS_KEY):
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise _unauthorised("an API key is needed: send 'Authorization: Bearer KEY'", "missing_api_key")
        # Digests are of one length, and all are compared: the time it takes says nothing of the keys.
        digest = hashlib.sha256(key.strip().encode()).digest()
        if not sum(hmac.compare_digest(digest, known) for known in self._digests):
            raise _unauthorised("the API key is not one of this server's", "invalid_api_key")


class _Body:
    """A request's body on its way in, of bounded size and time."""

    def __init__(self, scope: Scope, headers: dict[str, str], receive: Receive, settings: Settings) -> None:
        is_upload = scope["path"].rstrip("/") == _UPLOADS
        # A form has a few lines around the document.
        self._most = settings.upload_bytes + 8192 if is_upload else settings.body_bytes
        self._seconds = settings.upload_seconds if is_upload else settings.body_seconds
        self._until = time.monotonic() + self._seconds
        self._receive = receive
        self._bytes = 0
        self._is_complete = False
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._most:
            raise self._too_large()

    async def receive(self) -> Message:
        """Return the next message."""
        if self._is_complete:
            return await self._receive()
        try:
            message: Any = await asyncio.wait_for(self._receive(), max(self._until - time.monotonic(), 0.001))
        except asyncio.TimeoutError:
            text = f"the request took longer than {self._seconds:g} s to arrive"
            raise RequestError(408, text, "request_timeout", headers={"Connection": "close"}) from None
        self._bytes += len(message.get("body", b""))
        self._is_complete = not message.get("more_body", False)
        if self._bytes > self._most:
            raise self._too_large()
        return message

    def _too_large(self) -> RequestError:
        text = f"the request is larger than the {self._most:,} bytes this server takes"
        return RequestError(413, text, "request_too_large", headers={"Connection": "close"})


def _unauthorised(message: str, code: str) -> RequestError:
    return RequestError(401, message, code, headers={"WWW-Authenticate": "Bearer"})
