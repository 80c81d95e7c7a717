"""The ASGI application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

import ctxdocs
from ctxdocs.errors import CtxdocsError
from ctxdocs.integrations.server import document_routes, library_routes, openai_routes, page
from ctxdocs.integrations.server.batching import Engine
from ctxdocs.integrations.server.errors import RequestError, of_exception
from ctxdocs.integrations.server.guarding import Guard
from ctxdocs.integrations.server.metrics import Counted, Metrics
from ctxdocs.integrations.server.settings import Settings
from ctxdocs.integrations.server.state import State
from ctxdocs.integrations.server.uploads import Uploads

if TYPE_CHECKING:
    from ctxdocs.library import Library

_ABOUT = """Answers from documents that were compressed once into memories, read by a language model in place of their
text. Endpoints that OpenAI's API has behave as there; `mode` and `k` say what is read of the library."""


def create_app(library: Library, settings: Settings | None = None) -> FastAPI:
    """Return the application that serves a library.

    The library's models are loaded when the application starts; from then on they belong to it, and nothing else in
    the process may use them.

    Parameters
    ----------
    library : Library
        What is served.
    settings : Settings, optional
        Keys and limits.
    """
    settings = settings or Settings()
    engine = Engine(library, settings)
    metrics = Metrics(engine, library)
    engine.on_answered = metrics.count
    state = State(library, settings, engine, metrics, Uploads(library, engine, settings))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(library.load)
        engine.start()
        await asyncio.to_thread(state.uploads.start)
        try:
            yield
        finally:
            engine.refuse()
            await asyncio.to_thread(state.uploads.close)
            await asyncio.to_thread(engine.close)

    app = FastAPI(
        title="ctxdocs",
        version=ctxdocs.__version__,
        description=_ABOUT,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.ctxdocs = state
    app.include_router(openai_routes.router)
    app.include_router(document_routes.router)
    app.include_router(library_routes.router)
    app.include_router(page.router)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(CtxdocsError, _failed)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _failed)
    app.add_middleware(Counted, metrics=metrics)
    app.add_middleware(Guard, settings=settings)
    return app


async def _invalid(request: Request, error: Any) -> Response:
    """Say which field is wrong, and how."""
    errors = error.errors()
    # Of a field that may be one of several things, what came nearest to one of them says most.
    field = _place(errors[0])[:1]
    first = max((each for each in errors if _place(each)[:1] == field), key=lambda each: len(_place(each)))
    place = _place(first)
    kind, message = first["type"], first["msg"]
    if kind == "json_invalid":
        return RequestError(400, f"the body is no JSON: {first['ctx']['error']}", "invalid_json").response()
    if not place and kind in ("model_attributes_type", "dict_type", "missing"):
        text = "the body must be a JSON object, sent as Content-Type: application/json"
        return RequestError(400, text, "invalid_json").response()
    name = "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in place).lstrip(".")
    if kind == "extra_forbidden":
        return RequestError(400, f"unknown field {name!r}", "unknown_parameter", name).response()
    if kind == "missing":
        return RequestError(400, f"the field {name!r} is missing", "missing_required_parameter", name).response()
    return RequestError(400, f"{name}: {message}", "invalid_value", name).response()


def _place(error: Any) -> list[str]:
    """Return where in the body an error is, without the names that pydantic gives to what a field may be."""
    return [str(part) for part in error["loc"][1:] if isinstance(part, int) or part.isidentifier()]


async def _http_error(request: Request, error: Any) -> Response:
    if isinstance(error, RequestError):
        return error.response()
    reasons = {
        404: f"there is no {request.url.path}; /openapi.json lists what there is",
        405: f"{request.method} is not what {request.url.path} takes",
    }
    if error.status_code == 400:  # FastAPI could make nothing of it; errors of fields go another way
        return RequestError(400, "the body cannot be parsed", "invalid_body", headers=error.headers).response()
    message = reasons.get(error.status_code, str(error.detail))
    return RequestError(error.status_code, message, headers=error.headers).response()


async def _failed(request: Request, error: Exception) -> Response:
    return of_exception(error, str(request.app.state.ctxdocs.library.path)).response()
