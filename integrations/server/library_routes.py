"""Endpoints beside OpenAI's: searching the library, and how the server is."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from ctxdocs.integrations.server.questions import Question
from ctxdocs.integrations.server.requests import reading
from ctxdocs.integrations.server.schemas import SearchRequest

if TYPE_CHECKING:
    from ctxdocs.integrations.server.state import State

router = APIRouter()


@router.post("/v1/search", tags=["Library"])
async def search(request: Request, body: SearchRequest) -> dict[str, Any]:
    """Return the chunks that fit a query best, best first."""
    state: State = request.app.state.ctxdocs
    question = Question(body.query, reading(body, state.settings))
    found = state.engine.call(lambda: state.engine.prompting.found([question])[0])
    hits = await asyncio.wrap_future(found)
    return {"object": "list", "query": body.query, "data": [{"object": "hit", **hit.to_dict()} for hit in hits]}


@router.get("/healthz", tags=["Server"])
def health(request: Request) -> Response:
    """Say whether the server takes requests, and how many it has."""
    state: State = request.app.state.ctxdocs
    engine = state.engine
    status = "closing" if engine.is_closing else "ok"
    values = {"status": status, "model": state.model_name, "waiting": engine.waiting, "running": engine.running}
    return JSONResponse(values, 503 if engine.is_closing else 200)


@router.get("/metrics", tags=["Server"])
def metrics(request: Request) -> Response:
    """Return counters in Prometheus' text form."""
    state: State = request.app.state.ctxdocs
    return Response(state.metrics.text(), media_type=state.metrics.content_type)
