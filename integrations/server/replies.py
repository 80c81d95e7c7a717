"""Answers in the shape of OpenAI's API: whole, or as server-sent events."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from starlette.responses import StreamingResponse

from ctxdocs.integrations.server.errors import RequestError, of_exception

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from ctxdocs.integrations.server.jobs import Job, Written

_log = logging.getLogger(__name__)

_TAKING_SECONDS = 30
_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


@dataclass
class Reply:
    """One response: its kind, and what is the same in all its parts."""

    kind: Literal["chat", "text"]
    model: str
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, jobs: Sequence[Job]) -> dict[str, Any]:
        """Return the response of jobs that are done."""
        choices = [self._choice(index, job.written) for index, job in enumerate(jobs)]
        return {**self._head("whole"), "choices": choices, "usage": usage(jobs)}

    def stream(self, job: Job, *, include_usage: bool) -> EventStream:
        """Return the response of a job that has started."""
        return EventStream(self._events(job, include_usage), job)

    async def _events(self, job: Job, include_usage: bool) -> AsyncIterator[str]:
        more = {"usage": None} if include_usage else {}

        def event(delta: str | None, reason: str | None = None, **extra: Any) -> str:
            return _event({**self._head("part"), "choices": [self._part(delta, reason)], **more, **extra})

        try:
            about: dict[str, Any] = {"ctxdocs": _about([job])} if include_usage else {}
            if self.kind == "chat" or about:
                yield event("", **about)
            async for piece in job.pieces():
                yield event(piece)
            yield event(None, job.written.finish_reason)
            if include_usage:
                yield _event({**self._head("part"), "choices": [], "usage": usage([job])})
        except RequestError as error:
            yield _event(error.body())
        except Exception as error:  # the response has begun: what went wrong can only be said in it
            yield _event(of_exception(error).body())
        yield "data: [DONE]\n\n"

    def _head(self, which: Literal["whole", "part"]) -> dict[str, Any]:
        if self.kind == "text":
            name, prefix = "text_completion", "cmpl"
        else:
            name, prefix = ("chat.completion" if which == "whole" else "chat.completion.chunk"), "chatcmpl"
        return {"id": f"{prefix}-{self.id}", "object": name, "created": self.created, "model": self.model}

    def _choice(self, index: int, written: Written) -> dict[str, Any]:
        ends = {"index": index, "finish_reason": written.finish_reason, "logprobs": None}
        if self.kind == "text":
            return {**ends, "text": written.text}
        return {**ends, "message": {"role": "assistant", "content": written.text, "refusal": None}}

    def _part(self, delta: str | None, reason: str | None) -> dict[str, Any]:
        ends = {"index": 0, "finish_reason": reason, "logprobs": None}
        if self.kind == "text":
            return {**ends, "text": delta or ""}
        if delta is None:
            return {**ends, "delta": {}}
        role = {"role": "assistant"} if delta == "" else {}
        return {**ends, "delta": {**role, "content": delta}}


class EventStream(StreamingResponse):
    """Server-sent events of a job, which is given up when the client leaves."""

    def __init__(self, events: AsyncIterator[str], job: Job) -> None:
        super().__init__(events, media_type="text/event-stream", headers=_HEADERS)
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; a client that does not take them in time loses its connection."""
        try:
            await asyncio.wait_for(super().__call__(scope, receive, send), self._job.seconds + _TAKING_SECONDS)
        except asyncio.TimeoutError:
            _log.warning("a client did not take its answer; its connection is closed")
        finally:
            self._job.cancel()


def usage(jobs: Sequence[Job]) -> dict[str, Any]:
    """Return what answers took: OpenAI's counts, of text tokens, and in ``ctxdocs`` what they do not know."""
    answers = [job.written for job in jobs]
    prompt = sum(answer.prompt_tokens for answer in answers)
    completion = sum(answer.completion_tokens for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "ctxdocs": _about(jobs),
    }


def _about(jobs: Sequence[Job]) -> dict[str, Any]:
    answers = [job.written for job in jobs]
    return {
        "mode": jobs[0].question.reading.mode,
        "prompt_tokens": sum(answer.prompt_tokens for answer in answers),
        "memory_slots": sum(answer.memory_slots for answer in answers),
        "source_tokens": sum(hit.tokens for answer in answers for hit in answer.sources),
        "waited": max(answer.waited for answer in answers),
        "time_to_first_token": max(answer.time_to_first_token for answer in answers),
        "seconds": max(answer.seconds for answer in answers),
        "sources": [
            {"choice": index, **hit.to_dict()} for index, answer in enumerate(answers) for hit in answer.sources
        ],
    }


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n"
