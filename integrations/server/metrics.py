"""What is counted, in the text form that Prometheus reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from ctxdocs.integrations.server.batching import Engine
    from ctxdocs.integrations.server.jobs import Job
    from ctxdocs.library import Library

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0)


class Metrics:
    """Counters of one server.

    Parameters
    ----------
    engine : Engine
        Whose queue is measured.
    library : Library
        Whose documents are counted.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, engine: Engine, library: Library) -> None:
        self._registry = registry = CollectorRegistry()
        self._library = library
        self._requests = Counter(
            "ctxdocs_requests", "Responses by path and status.", ["path", "status"], registry=registry
        )
        self._answers = Counter(
            "ctxdocs_answers", "Answers written to their end.", ["mode", "reason"], registry=registry
        )
        self._tokens = Counter("ctxdocs_tokens", "Tokens read and written.", ["kind"], registry=registry)
        self._slots = Counter("ctxdocs_memory_slots", "Memory slots read.", registry=registry)
        self._first = Histogram(
            "ctxdocs_time_to_first_token_seconds", "From arrival.", ["mode"], buckets=_SECONDS, registry=registry
        )
        self._seconds = Histogram(
            "ctxdocs_answer_seconds", "From arrival to the last token.", ["mode"], buckets=_SECONDS, registry=registry
        )
        waiting = Gauge("ctxdocs_waiting", "Requests that wait.", registry=registry)
        waiting.set_function(lambda: engine.waiting)
        running = Gauge("ctxdocs_running", "Answers that are being written.", registry=registry)
        running.set_function(lambda: engine.running)
        self._documents = Gauge("ctxdocs_library_documents", "Documents in the library.", registry=registry)
        self._chunks = Gauge("ctxdocs_library_chunks", "Chunks in the library.", registry=registry)

    def responded(self, path: str, status: int) -> None:
        """Count a response; ``path`` is its endpoint's, without what varies."""
        self._requests.labels(path, str(status)).inc()

    def count(self, job: Job) -> None:
        """Count an answer that was written to its end."""
        written, mode = job.written, job.question.reading.mode
        self._answers.labels(mode, written.finish_reason).inc()
        self._tokens.labels("prompt").inc(written.prompt_tokens)
        self._tokens.labels("completion").inc(written.completion_tokens)
        self._slots.inc(written.memory_slots)
        self._first.labels(mode).observe(written.time_to_first_token)
        self._seconds.labels(mode).observe(written.seconds)

    def text(self) -> bytes:
        """Return everything as Prometheus reads it."""
        counts = self._library.store.counts()
        self._documents.set(counts.documents)
        self._chunks.set(counts.chunks)
        return generate_latest(self._registry)


class Counted:
    """Counts responses.

    Parameters
    ----------
    app : ASGI application
        Responds.
    metrics : Metrics
        Counts.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and count its response."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 500

        async def noted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            # Paths that no endpoint has are somebody's invention: they are counted as one.
            self.metrics.responded(getattr(scope.get("route"), "path", "other"), status)
