"""Errors in the shape that OpenAI's clients know, with their status codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from ctxdocs.errors import ContextTooLong, CtxdocsError, InputError, LibraryError, StorageError

_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class RequestError(HTTPException):
    """A request that is not answered as asked.

    Parameters
    ----------
    status : int
        The response's status code.
    message : str
        What is wrong and what to do.
    code : str, optional
        A word that programs can go by.
    param : str, optional
        The field that is to blame.
    headers : mapping, optional
        More headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.code = code
        self.param = param

    def body(self) -> dict[str, Any]:
        """Return the JSON body."""
        status = self.status_code
        kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the response."""
        return JSONResponse(self.body(), self.status_code, self.headers)


def busy(what: str, seconds: int) -> RequestError:
    """Return the error of a server that has enough to do, and when to come again."""
    return RequestError(429, f"{what}; try again in {seconds} s", "queue_full", headers={"Retry-After": str(seconds)})


def closing() -> RequestError:
    """Return the error of a server that is shutting down."""
    return RequestError(503, "the server is shutting down", "shutting_down", headers={"Retry-After": "10"})


def of_exception(error: BaseException, library: str = "") -> RequestError:
    """Return what a client is told of an error; nothing of what is inside the server, but for errors of its input.

    ``library`` is the library's folder, which is left out of messages.
    """
    if isinstance(error, RequestError):
        return error
    if not isinstance(error, CtxdocsError):
        return RequestError(500, "the server failed to answer; its log says why", "internal_error")
    message = str(error)
    if library:
        message = message.replace(library, "the server's folder")
    if isinstance(error, ContextTooLong):
        return RequestError(400, message, "context_length_exceeded", "messages")
    if isinstance(error, InputError):
        return RequestError(400, message, "invalid_value")
    if isinstance(error, StorageError):
        return RequestError(507, message, "storage")
    if isinstance(error, LibraryError):
        return RequestError(409, message, "library")
    return RequestError(500, message, "internal_error")
