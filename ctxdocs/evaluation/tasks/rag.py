"""Questions asked of a library that holds the contexts of all of them: retrieval and reading, end to end."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctxdocs.answers import Answer
from ctxdocs.corpus import Document
from ctxdocs.datasets import record_id
from ctxdocs.evaluation.reading import ContextReader
from ctxdocs.evaluation.task import Example, Metric, Result, Task
from ctxdocs.evaluation.tasks.qa import ANSWER_METRICS, cluster_of, graded
from ctxdocs.library import Library


class RetrievalAugmented(Task):
    """Answer questions from a library of all contexts: what is retrieved is read, right or wrong."""

    name = "rag"
    needs = "questions"
    metrics = (*ANSWER_METRICS, Metric("recall", "context retrieved"))
    readings = ("memory", "text", "none")

    @dataclass(frozen=True)
    class Options(Task.Options):
        """What can be set: contexts in the library, its chunks, and how it is asked.

        ``embedder`` is a sentence-transformers name, or an embedding object; by default all-MiniLM-L6-v2.
        """

        pool: int = 1000
        k: int = 4
        chunk_tokens: int = 256
        overlap_tokens: int = 32
        retrieval: str = "hybrid"
        rerank: str = "none"
        max_new_tokens: int = 32
        embedder: Any = None

    def __init__(self, data: Any, **options: Any) -> None:
        super().__init__(data, **options)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._libraries: dict[tuple[str, Any], Library] = {}
        self._contexts: list[str] = []

    def examples(self, reader: ContextReader, seed: int, limit: int) -> list[Example]:
        """Take questions; the contexts of all that are drawn from go into the library."""
        questions = list(itertools.islice(self.data.questions(seed), self.options.pool))
        places: dict[str, int] = {}
        found: dict[str, Example] = {}
        for question in questions:
            numbers = [places.setdefault(context, len(places)) for context in question.contexts]
            if not question.answers or not question.relevant:
                self.left_out["questions that their contexts do not answer"] += 1
                continue
            name, cluster = record_id(question), cluster_of(question)
            right = {_uri(numbers[index]) for index in question.relevant}
            if len(found) < limit:
                found[name] = Example(
                    name, (), question.question, question.answers, cluster=cluster, extra={"uris": right}
                )
        self._contexts = list(places)
        return list(found.values())

    def run(self, reader: ContextReader, examples: Sequence[Example]) -> list[Result]:
        """Ask the library; its compressing counts in full for the first batch that needs it."""
        library = self._library(reader)
        mode: Any = reader.reading.how
        options = {"retrieval": self.options.retrieval, "rerank": self.options.rerank} if mode != "none" else {}
        with reader.timed("read"):
            answers = library.ask_many(
                [example.question for example in examples], self.options.k, mode, self.options.max_new_tokens, **options
            )
        results = []
        for answer, example in zip(answers, examples, strict=True):
            metrics = graded(answer.text, example.answers)
            if mode != "none":
                metrics["recall"] = float(any(hit.document in example.extra["uris"] for hit in answer.sources))
            results.append(Result(metrics, self._costs(reader, library, answer), answer.text))
        return results

    def close(self) -> None:
        """Remove the libraries."""
        self._libraries.clear()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _costs(self, reader: ContextReader, library: Library, answer: Answer) -> dict[str, int]:
        tokens = sum(hit.tokens for hit in answer.sources)
        if answer.mode != "memory":
            return {"context_tokens": tokens, "slots": tokens, "bytes": tokens * reader.bytes_per_token}
        memories = library.store.memories(library.store.chunks([hit.id for hit in answer.sources]))
        nbytes = sum(memory.nbytes for memory in memories)
        return {"context_tokens": tokens, "slots": answer.memory_slots, "bytes": nbytes}

    def _library(self, reader: ContextReader) -> Library:
        """Return the library at the reading's ratio; text and nothing are read from any."""
        fingerprint = reader.compressor.fingerprint
        built = [library for (owner, _), library in self._libraries.items() if owner == fingerprint]
        if built and not reader.reading.is_memory:
            return built[0]
        key = (fingerprint, reader.reading.ratio)
        if key not in self._libraries:
            self._folder = self._folder or tempfile.TemporaryDirectory(prefix="ctxdocs-eval-")
            library = Library.create(
                Path(self._folder.name) / f"library-{len(self._libraries)}",
                reader.compressor,
                self.options.embedder,
                chunk_tokens=self.options.chunk_tokens,
                overlap_tokens=self.options.overlap_tokens,
            )
            start = time.perf_counter()
            with reader.configured():
                library.add([Document.from_text(text, _uri(number)) for number, text in enumerate(self._contexts)])
            if reader.reading.is_memory:
                reader.seconds["compress"] += time.perf_counter() - start
            self._libraries[key] = library
        return self._libraries[key]


def _uri(number: int) -> str:
    return f"context-{number}"
