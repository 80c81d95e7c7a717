"""The endpoints of OpenAI's API: models, chat completions, completions, embeddings."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from ctxdocs.integrations.server.disconnecting import while_connected
from ctxdocs.integrations.server.errors import RequestError
from ctxdocs.integrations.server.jobs import Job
from ctxdocs.integrations.server.replies import Reply
from ctxdocs.integrations.server.requests import chat_question, generation_options, text_questions
from ctxdocs.integrations.server.schemas import ChatRequest, CompletionRequest, EmbeddingRequest

if TYPE_CHECKING:
    from ctxdocs.integrations.server.state import State

router = APIRouter(prefix="/v1", tags=["OpenAI"])


@router.get("/models")
def models(request: Request) -> dict[str, Any]:
    """List the library's model and its embedder."""
    return {"object": "list", "data": _models(request.app.state.ctxdocs)}


@router.get("/models/{name:path}")
def model(request: Request, name: str) -> dict[str, Any]:
    """Describe a model."""
    for known in _models(request.app.state.ctxdocs):
        if known["id"] == name:
            return known
    raise _no_model(name)


@router.post("/chat/completions")
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """Answer the last message of a conversation, reading what the library holds about it."""
    state: State = request.app.state.ctxdocs
    _check_model(body.model, state.model_name)
    options = generation_options(body, state.settings)
    question = chat_question(body, state.settings)
    delivery = "pieces" if body.stream else "whole"
    job = Job(question, options, state.settings.request_seconds, delivery)  # type: ignore[arg-type]
    return await _answered(request, [job], Reply("chat", state.model_name), body)


@router.post("/completions")
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Continue prompts as they stand, behind what the library holds about each of them."""
    state: State = request.app.state.ctxdocs
    _check_model(body.model, state.model_name)
    options = generation_options(body, state.settings)
    questions = text_questions(body, state.settings)
    if body.stream and len(questions) > 1:
        raise RequestError(400, "one prompt at a time is streamed", "unsupported_value", "stream")
    delivery: Any = "pieces" if body.stream else "whole"
    jobs = [Job(question, options, state.settings.request_seconds, delivery) for question in questions]
    return await _answered(request, jobs, Reply("text", state.model_name), body)


@router.post("/embeddings")
async def embeddings(request: Request, body: EmbeddingRequest) -> dict[str, Any]:
    """Embed texts as the library's index does."""
    state: State = request.app.state.ctxdocs
    embedder = state.library.embedder
    _check_model(body.model, embedder.name)
    texts = [body.input] if isinstance(body.input, str) else body.input
    if not texts or any(not text.strip() for text in texts):
        raise RequestError(400, "there is nothing to embed: a text is empty", "invalid_value", "input")
    if len(texts) > state.settings.max_prompts:
        most = state.settings.max_prompts
        raise RequestError(400, f"{len(texts)} texts; at most {most} go into a request", "invalid_value", "input")
    if body.dimensions not in (None, embedder.dimension):
        message = f"the embedder's vectors have {embedder.dimension} dimensions"
        raise RequestError(400, message, "unsupported_value", "dimensions")
    embed = embedder.embed_queries if body.input_type == "query" else embedder.embed_documents
    vectors = await asyncio.wrap_future(state.engine.call(lambda: embed(texts)))
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(vector, body.encoding_format)}
        for index, vector in enumerate(vectors)
    ]
    return {"object": "list", "data": data, "model": embedder.name, "usage": {"prompt_tokens": 0, "total_tokens": 0}}


async def _answered(
    request: Request, jobs: Sequence[Job], reply: Reply, body: ChatRequest | CompletionRequest
) -> Response:
    state: State = request.app.state.ctxdocs
    state.engine.submit(jobs)
    try:
        async with while_connected(request):
            if body.stream:
                await jobs[0].started()
            else:
                for job in jobs:
                    await job.whole()
    except BaseException:
        for job in jobs:
            job.cancel()
        raise
    if body.stream:
        return reply.stream(jobs[0], include_usage=body.include_usage)
    return JSONResponse(reply.whole(jobs))


def _models(state: State) -> list[dict[str, Any]]:
    compressor, embedder = state.library.store.manifest.compressor, state.library.store.manifest.embedder
    shared = {"object": "model", "created": state.started, "owned_by": "ctxdocs"}
    settings = state.settings
    about = {
        "kind": "answers",
        "checkpoint": PurePath(compressor["name_or_path"] or "").name,
        "method": compressor["method"],
        "fingerprint": compressor["fingerprint"],
        "access": settings.access,
        "max_new_tokens": settings.max_new_tokens,
        "max_sources": settings.max_sources,
    }
    vectors = {"kind": "embeddings", "dimension": embedder["dimension"]}
    return [
        {"id": state.model_name, **shared, "ctxdocs": about},
        {"id": embedder["name"], **shared, "ctxdocs": vectors},
    ]


def _check_model(asked: str, known: str) -> None:
    if asked != known:
        raise _no_model(asked, known)


def _no_model(name: str, known: str | None = None) -> RequestError:
    hint = f"; this is {known!r}" if known else "; see /v1/models"
    return RequestError(404, f"the model {name!r} does not exist here{hint}", "model_not_found", "model")


def _encoded(vector: np.ndarray, form: str) -> list[float] | str:
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()
