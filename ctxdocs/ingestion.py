"""Documents into a library: reading, computing and writing overlap, and memory use does not grow with the corpus.

A thread reads files and cuts them into chunks, this thread embeds and compresses them a window at a time, another one
writes finished windows to disk. Queues between them are bounded, so the slowest stage sets the pace.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ctxdocs.corpus import Chunk, Chunker, Document, SourceFile, file_digest, load_document
from ctxdocs.errors import DocumentError
from ctxdocs.prefetching import Prefetch

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ctxdocs.cache import Writer
    from ctxdocs.compressors.base import Compressor
    from ctxdocs.embedding import Embedder
    from ctxdocs.memory import Memory

# A window is what is compressed and committed together, in chunks. It grows while windows are quick (seconds) and
# shrinks while they are slow, so that a large model on a slow machine still commits every half minute; and its
# memories, which a key/value method makes large, are held in bounds (bytes).
_FIRST_WINDOW, _LARGEST_WINDOW = 32, 1024
_QUICK, _SLOW = 5.0, 30.0
_WINDOW_BYTES = 256 * 2**20
_QUEUED_EVENTS = 1024
_QUEUED_WRITES = 1


@dataclass
class AddReport:
    """What adding documents did.

    Parameters
    ----------
    documents : int
        Documents compressed in this run, replaced ones included.
    chunks, source_tokens, memory_slots : int
        What they came to.
    compression_ratio : float
        ``source_tokens / memory_slots``; 0 when nothing was compressed.
    bytes : int
        Bytes of the memories as stored.
    seconds, tokens_per_second : float
        Wall time of the run, and source tokens over it.
    unchanged, replaced, removed : int
        Documents found as they were, compressed anew because they changed, and dropped because they are gone.
    failed : list of dict
        ``{"path", "reason"}`` of every document that could not be read.
    """

    documents: int = 0
    chunks: int = 0
    source_tokens: int = 0
    memory_slots: int = 0
    compression_ratio: float = 0.0
    bytes: int = 0
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    unchanged: int = 0
    replaced: int = 0
    removed: int = 0
    failed: list[dict[str, str]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-able values."""
        return asdict(self)

    def close(self, seconds: float) -> None:
        """Fill in what follows from the counts."""
        self.seconds = seconds
        self.compression_ratio = self.source_tokens / self.memory_slots if self.memory_slots else 0.0
        self.tokens_per_second = self.source_tokens / seconds if seconds else 0.0


@dataclass
class AddProgress:
    """How far adding has come; handed to the progress callback, which must not keep it.

    Parameters
    ----------
    total : int
        Documents to look at.
    seen : int
        Documents read, or found unchanged, or failed.
    report : AddReport
        Counts so far; its times are not filled in yet.
    """

    total: int
    seen: int
    report: AddReport


@dataclass(eq=False)
class _Window:
    """Chunks on their way through the stages, with the documents that begin and end among them."""

    begun: list[Document] = field(default_factory=list)
    chunks: list[tuple[Document, Chunk]] = field(default_factory=list)
    finished: list[Document] = field(default_factory=list)


class Ingestion:
    """One run of adding documents.

    Parameters
    ----------
    writer : Writer
        Of the library's store.
    compressor : Compressor
        Makes the memories.
    embedder : Embedder
        Makes the vectors for retrieval.
    chunker : Chunker
        Cuts texts; its tokenizer is the compressor's.
    known : mapping of str to str
        Digest of every document in the library by uri.
    unchanged : int
        Documents that need no work; counted in the report and in the progress.
    on_progress : callable, optional
        Called with an :class:`AddProgress` in this thread.
    """

    def __init__(
        self,
        writer: Writer,
        compressor: Compressor,
        embedder: Embedder,
        chunker: Chunker,
        known: Mapping[str, str],
        unchanged: int = 0,
        on_progress: Callable[[AddProgress], None] | None = None,
    ) -> None:
        self.writer = writer
        self.compressor = compressor
        self.embedder = embedder
        self.chunker = chunker
        self.known = known
        self.on_progress = on_progress
        self.report = AddReport(unchanged=unchanged)
        self.seen = self.total = unchanged
        self._window_size = _FIRST_WINDOW
        self._document_ids: dict[int, int] = {}

    def run(self, sources: list[SourceFile | Document]) -> AddReport:
        """Add ``sources``, those that are there already in place of the old ones; return the report without times.

        Interrupted (Ctrl-C, an error), it first lets the windows that are computed reach the disk.
        """
        self.total = self.seen + len(sources)
        pending: deque[Future[int]] = deque()
        with (
            ThreadPoolExecutor(max_workers=1, thread_name_prefix="ctxdocs-write") as pool,
            Prefetch(self._read(sources), _QUEUED_EVENTS) as events,
        ):
            for window in self._windows(events):
                start = time.perf_counter()
                vectors, memories = self._compute(window)
                while len(pending) >= _QUEUED_WRITES:
                    self.report.bytes += pending.popleft().result()
                pending.append(pool.submit(self._write, window, vectors, memories))
                self._count(window, memories)
                self._show()
                self._resize_window(time.perf_counter() - start, memories)
            while pending:
                self.report.bytes += pending.popleft().result()
        return self.report

    def _read(self, sources: Iterable[SourceFile | Document]) -> Iterator[tuple[str, Any]]:
        """Yield, document by document: ("begin", document), ("chunk", (document, chunk)) ..., ("end", document)."""
        for source in sources:
            try:
                document = source if isinstance(source, Document) else load_document(source)
                yield "begin", document
                for chunk in self.chunker(document.text):
                    yield "chunk", (document, chunk)
                yield "end", document
            except DocumentError as error:
                yield "failed", {"path": source.uri, "reason": str(error)}

    def _windows(self, events: Iterable[tuple[str, Any]]) -> Iterator[_Window]:
        window = _Window()
        for kind, value in events:
            if kind == "chunk":
                window.chunks.append(value)
                if len(window.chunks) >= self._window_size:
                    yield window
                    window = _Window()
            elif kind == "begin":
                window.begun.append(value)
            else:
                self.seen += 1
                if kind == "end":
                    window.finished.append(value)
                else:
                    self.report.failed.append(value)
                self._show()
        if window.chunks or window.finished:
            yield window

    def _compute(self, window: _Window) -> tuple[NDArray[np.float32] | list[Any], list[Memory]]:
        if not window.chunks:  # the last chunks of its documents went with the window before
            return [], []
        vectors = self.embedder.embed_documents([chunk.text for _, chunk in window.chunks])
        return vectors, self.compressor.compress_ids([chunk.ids for _, chunk in window.chunks])

    def _resize_window(self, seconds: float, memories: list[Memory]) -> None:
        if seconds < _QUICK:
            self._window_size = min(2 * self._window_size, _LARGEST_WINDOW)
        elif seconds > _SLOW:
            self._window_size = self._window_size // 2
        largest = max((memory.nbytes for memory in memories), default=0)
        self._window_size = max(1, min(self._window_size, _WINDOW_BYTES // max(largest, 1)))

    def _write(self, window: _Window, vectors: Any, memories: list[Memory]) -> int:
        from ctxdocs.cache import NewChunk

        for document in window.begun:
            self._document_ids[id(document)] = self.writer.begin(document.uri, document.sha256, document.metadata)
        chunks = [
            NewChunk(
                document_id=self._document_ids[id(document)],
                ordinal=chunk.ordinal,
                start=chunk.start,
                end=chunk.end,
                text=chunk.text,
                tokens=len(chunk.ids),
                embedding=vector,
                memory=memory,
            )
            for (document, chunk), vector, memory in zip(window.chunks, vectors, memories, strict=True)
        ]
        return self.writer.write(chunks, [self._document_ids.pop(id(document)) for document in window.finished])

    def _count(self, window: _Window, memories: list[Memory]) -> None:
        report = self.report
        report.chunks += len(memories)
        report.source_tokens += sum(memory.source_tokens for memory in memories)
        report.memory_slots += sum(memory.slots for memory in memories)
        report.documents += len(window.finished)
        report.replaced += sum(document.uri in self.known for document in window.finished)

    def _show(self) -> None:
        if self.on_progress is not None:
            self.on_progress(AddProgress(self.total, self.seen, self.report))


def changed(sources: Iterable[SourceFile | Document], known: Mapping[str, str]) -> list[SourceFile | Document]:
    """Return the sources that a library does not hold as they are; files are compared by digest, without parsing."""
    return [source for source in sources if source.uri not in known or known[source.uri] != _digest(source)]


def _digest(source: SourceFile | Document) -> str | None:
    if isinstance(source, Document):
        return source.sha256
    try:
        return file_digest(source.path)
    except DocumentError:  # loading it will say what is wrong
        return None
