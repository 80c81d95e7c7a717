"""A library: documents compressed once, found again by a query, and read by a language model as memories.

This file joins the corpus, the embedder, the compressor and the store; each of them is exchangeable.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from ctxdocs.answers import Answer, Hit, Mode
from ctxdocs.cache import Store
from ctxdocs.corpus import Chunker, Document, SourceFile, find_files
from ctxdocs.embedding import Embedder, load_embedder
from ctxdocs.errors import InputError, LibraryError
from ctxdocs.ingestion import AddProgress, AddReport, Ingestion, changed
from ctxdocs.opening import open_compressor, open_embedder
from ctxdocs.reranking import question_likelihoods
from ctxdocs.retrieval import reciprocal_rank_fusion

if TYPE_CHECKING:
    from ctxdocs.cache import StoredChunk, Writer
    from ctxdocs.compressors.base import Compressor
    from ctxdocs.memory import Memory
    from ctxdocs.prompts import Prompt

Retrieval: TypeAlias = Literal["hybrid", "dense", "lexical"]
Rerank: TypeAlias = Literal["none", "likelihood"]

DEFAULT_CHUNK_TOKENS = 256
DEFAULT_OVERLAP_TOKENS = 32


class Library:
    """Documents as memories on disk, with their index.

    Use :meth:`create` and :meth:`open`; the compressor and the embedder are loaded when they are first needed.
    """

    def __init__(
        self, store: Store, load_compressor: Callable[[], Compressor], load_embedder: Callable[[], Embedder]
    ) -> None:
        self.store = store
        self._load_compressor = load_compressor
        self._load_embedder = load_embedder

    @classmethod
    def create(
        cls,
        path: str | Path,
        compressor: Compressor | str | Path | None = None,
        embedder: object | str | None = None,
        *,
        chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
        overlap_tokens: int = DEFAULT_OVERLAP_TOKENS,
        codec: str = "exact",
        index: str = "Flat",
    ) -> Library:
        """Create an empty library.

        Parameters
        ----------
        path : str or path
            A folder that does not exist, or is empty.
        compressor : Compressor or str or path, optional
            What compresses and reads; a name or path is given to ``load_compressor``. Default: the bundled model.
        embedder : object or str, optional
            A sentence-transformers name, or an embedding object of sentence-transformers, LangChain or LlamaIndex.
            Default: all-MiniLM-L6-v2.
        chunk_tokens, overlap_tokens : int
            Length of the chunks documents are cut into, and how much neighbours share, in the compressor's tokens.
        codec : str
            How memories are stored; ``"exact"`` keeps every bit.
        index : str
            A FAISS ``index_factory`` string.

        Raises
        ------
        LibraryError
            If something is at ``path`` already.
        CheckpointError
            If the compressor cannot be loaded.
        """
        from ctxdocs.checkpoints import load_compressor
        from ctxdocs.compressors.base import Compressor

        loaded = compressor if isinstance(compressor, Compressor) else load_compressor(compressor)
        chosen = load_embedder(embedder)
        if loaded.tokenizer is None:
            raise InputError(
                "a library needs a compressor with a tokenizer", "put the tokenizer's files beside its weights"
            )
        Chunker(loaded.tokenizer, chunk_tokens, overlap_tokens)  # checks the numbers before anything is written
        store = Store.create(
            Path(path),
            compressor={
                "fingerprint": loaded.fingerprint,
                "method": loaded.method,
                "chosen_by_default": loaded.chosen_by_default,
                "name_or_path": loaded.name_or_path,
                "dtype": str(loaded.backbone.dtype).removeprefix("torch."),
                "settings": {**loaded.run_settings, **loaded.base_places},
            },
            embedder={"name": chosen.name, "dimension": chosen.dimension},
            codec=codec,
            index=index,
            settings={"chunk_tokens": chunk_tokens, "overlap_tokens": overlap_tokens},
        )
        return cls(store, lambda: loaded, lambda: chosen)

    @classmethod
    def open(
        cls,
        path: str | Path,
        compressor: Compressor | str | Path | None = None,
        embedder: object | str | None = None,
        *,
        device: str = "auto",
    ) -> Library:
        """Open a library.

        Parameters
        ----------
        path : str or path
            The library's folder.
        compressor : Compressor or str or path, optional
            Where the compressor is, if not where it was when the library was made.
        embedder : object or str, optional
            The embedder, if it is an object that no name brings back.
        device : str
            Where to load the compressor and the embedder.

        Raises
        ------
        LibraryError
            If there is no library, or it is damaged or of a newer format.
        FingerprintMismatch
            If the compressor is another one than the library's; raised when it is first needed.
        """
        store = Store.open(Path(path))
        return cls(
            store, lambda: open_compressor(store, compressor, device), lambda: open_embedder(store, embedder, device)
        )

    @functools.cached_property
    def compressor(self) -> Compressor:
        """The compressor of the library's memories; loaded when first asked for."""
        return self._load_compressor()

    @functools.cached_property
    def embedder(self) -> Embedder:
        """The embedder of the library's index; loaded when first asked for."""
        return self._load_embedder()

    @property
    def path(self) -> Path:
        """The library's folder."""
        return self.store.path

    # Writing.

    def add(
        self,
        sources: str | Path | Document | Iterable[str | Path | Document],
        *,
        missing: Literal["keep", "drop"] = "keep",
        on_progress: Callable[[AddProgress], None] | None = None,
    ) -> AddReport:
        """Compress documents into the library; what is there already and unchanged is left alone.

        Parameters
        ----------
        sources : path, Document, or several
            Files, folders (searched for the known formats), and documents made in Python.
        missing : {"keep", "drop"}
            What to do with documents of the given folders whose files are gone.
        on_progress : callable, optional
            Called with an :class:`AddProgress` while the work goes on.

        Returns
        -------
        AddReport
            Counts, times, and the documents that could not be read.

        Raises
        ------
        InputError
            If a path does not exist.
        LibraryError
            If another process is writing.
        StorageError
            If the disk is full; what was committed before stays.
        """
        start = time.perf_counter()
        given = [sources] if isinstance(sources, (str, Path, Document)) else list(sources)
        paths = [Path(source) for source in given if not isinstance(source, Document)]
        found: list[SourceFile | Document] = list(find_files(paths)) if paths else []
        found += _distinct([source for source in given if isinstance(source, Document)])
        with self.store.writer() as writer:
            known = self.store.digests()
            todo = changed(found, known)
            unchanged = len(found) - len(todo)
            if todo:
                report = self._ingestion(writer, known, unchanged, on_progress).run(todo)
            else:  # no model is needed, so none is loaded
                report = AddReport(unchanged=unchanged)
            if missing == "drop":
                report.removed = writer.remove(_vanished(known, paths, {source.uri for source in found}))
        report.close(time.perf_counter() - start)
        return report

    def remove(self, documents: str | Path | Iterable[str | Path]) -> int:
        """Remove documents by uri or path; return how many there were. ``compact`` gives their space back.

        A folder's path stands for every document in it.

        Raises
        ------
        LibraryError
            If one of them is not in the library; then nothing is removed.
        """
        names = [documents] if isinstance(documents, (str, Path)) else list(documents)
        known = self.store.digests()
        gone: set[str] = set()
        for name in names:
            path = Path(name).expanduser().resolve().as_posix()
            matches = {uri for uri in known if uri in (str(name), path) or uri.startswith(path + "/")}
            if not matches:
                raise LibraryError(
                    f"{name} is not in the library {self.path}", "ctxdocs info --documents lists what is"
                )
            gone |= matches
        with self.store.writer() as writer:
            return writer.remove(sorted(gone))

    def compact(self) -> int:
        """Rewrite shards that hold memories of removed documents; return the bytes given back."""
        with self.store.writer() as writer:
            return writer.compact()

    # Reading.

    def search(
        self,
        query: str,
        k: int = 4,
        *,
        retrieval: Retrieval = "hybrid",
        rerank: Rerank = "none",
        documents: Iterable[str] | None = None,
    ) -> list[Hit]:
        """Return the ``k`` best chunks for a query, best first; fewer when the library holds fewer.

        Parameters
        ----------
        query : str
            A question or keywords.
        k : int
            How many.
        retrieval : {"hybrid", "dense", "lexical"}
            Embeddings and BM25 fused by reciprocal rank, or one of them alone.
        rerank : {"none", "likelihood"}
            Rank the best of them anew, by how likely the compressor finds the query behind each one's memory
            (:mod:`ctxdocs.reranking`). A hit's score is then the mean log-probability of the query's tokens.
        documents : iterable of str, optional
            Uris of the only documents to look into; those that are not in the library hold nothing.

        Raises
        ------
        InputError
            If ``k`` is below 1, the query is blank, or a choice is unknown.
        LibraryError
            If the library is empty.
        """
        return self.search_many([query], k, retrieval=retrieval, rerank=rerank, documents=documents)[0]

    def search_many(
        self,
        queries: Sequence[str],
        k: int = 4,
        *,
        retrieval: Retrieval = "hybrid",
        rerank: Rerank = "none",
        documents: Iterable[str] | None = None,
    ) -> list[list[Hit]]:
        """Like :meth:`search` for several queries, embedded in one batch."""
        if k < 1:
            raise InputError(f"k must be at least 1, got {k}")
        if any(not query.strip() for query in queries):
            raise InputError("the query is empty", "ask something")
        if retrieval not in ("hybrid", "dense", "lexical"):
            raise InputError(f"unknown retrieval {retrieval!r}", "choose hybrid, dense or lexical")
        if rerank not in ("none", "likelihood"):
            raise InputError(f"unknown rerank {rerank!r}", "choose none or likelihood")
        if self.store.is_empty():
            raise LibraryError(
                f"the library {self.path} is empty", "run: ctxdocs compress PATH --library " + str(self.path)
            )
        allowed = None if documents is None else self.store.chunk_ids(documents).tolist()
        pool = k if retrieval != "hybrid" and rerank == "none" else max(4 * k, 32)
        rankings: list[list[list[tuple[int, float]]]] = [[] for _ in queries]
        if retrieval != "lexical":
            ids, scores = self.store.nearest(
                np.asarray(self.embedder.embed_queries(list(queries))), pool, allowed=allowed
            )
            for ranking, row_ids, row_scores in zip(rankings, ids.tolist(), scores.tolist(), strict=True):
                ranking.append([(i, s) for i, s in zip(row_ids, row_scores, strict=True) if i >= 0])
        if retrieval != "dense":
            for ranking, query in zip(rankings, queries, strict=True):
                ranking.append(self.store.matching(query, pool, allowed=allowed))
        if rerank == "none":
            return [self._hits(ranking, k) for ranking in rankings]
        return self._reranked(queries, [self._hits(ranking, pool) for ranking in rankings], k)

    def memories(self, hits: Sequence[Hit]) -> list[Memory]:
        """Return the memories of found chunks, mapped from disk, in this order."""
        return self.store.memories(self.store.chunks([hit.id for hit in hits]))

    def blend(self, prompt: Prompt, chunks: Sequence[Hit | StoredChunk], share: float) -> Prompt:
        """Return a prompt whose memories know of each other (:mod:`ctxdocs.compressors.blending`).

        :meth:`ask` does this with its own prompts, where ``blend`` is given.

        Parameters
        ----------
        prompt : Prompt
            Parts, 1-D token ids or memories.
        chunks : sequence of Hit or StoredChunk
            Those whose memories stand in the prompt, in this order.
        share : float
            Of which part of the chunks' tokens keys and values are computed again, from 0 to 1.

        Raises
        ------
        InputError
            If the share is out of range, the library's memories are not exact, or the prompt holds others.
        """
        from ctxdocs.compressors.blending import blended
        from ctxdocs.prompts import encode_text

        tokenizer, most = self.compressor.tokenizer, self.store.manifest.settings["chunk_tokens"]
        # As they were cut when the documents were added.
        documents = [encode_text(tokenizer, chunk.text)[:most] for chunk in chunks]  # type: ignore[arg-type]
        return blended(self.compressor, prompt, documents, share)

    def ask(self, question: str, k: int = 4, mode: Mode = "memory", max_new_tokens: int = 64, **options: Any) -> Answer:
        """Answer a question from the library.

        Parameters
        ----------
        question : str
            The question.
        k : int
            Chunks to read.
        mode : {"memory", "text", "none"}
            Read the chunks' memories, their raw text, or nothing: the same model each time, so that what compression
            costs and saves can be seen.
        max_new_tokens : int
            Upper bound of the answer's tokens.
        **options
            ``retrieval``, ``rerank`` and ``documents`` of :meth:`search`; the other fields of
            :class:`ctxdocs.generation.GenerationOptions`, of which ``schema``, a JSON schema, makes the answer JSON
            that keeps to it; and ``blend``, from 0 (default) to 1: of so large a share of the chunks' tokens keys and
            values are computed again, so that exact memories know of each other
            (:mod:`ctxdocs.compressors.blending`).

        Returns
        -------
        Answer
            The text, its sources, and what reading them took.
        """
        return self.ask_many([question], k, mode, max_new_tokens, **options)[0]

    def ask_many(
        self, questions: Sequence[str], k: int = 4, mode: Mode = "memory", max_new_tokens: int = 64, **options: Any
    ) -> list[Answer]:
        """Like :meth:`ask` for several questions, read and answered as one batch."""
        from ctxdocs import generation

        self.load(mode)
        start = time.perf_counter()
        prompts, answers, chosen = self._prepare(questions, k, mode, max_new_tokens, options)
        retrieved = time.perf_counter() - start
        for answer, result in zip(answers, generation.generate(self.compressor, prompts, chosen), strict=True):
            answer.fill(result, retrieved)
        return answers

    def stream(
        self, question: str, k: int = 4, mode: Mode = "memory", max_new_tokens: int = 64, **options: Any
    ) -> AnswerStream:
        """Like :meth:`ask`, as an iterator over pieces of the answer; afterwards its ``answer`` is complete."""
        return AnswerStream(self, question, k, mode, max_new_tokens, options)

    def load(self, mode: Mode = "memory") -> None:
        """Load what answering in a mode needs, if that is not done yet; no answer's times include it."""
        _ = self.compressor
        if mode != "none":
            _ = self.embedder

    def info(self) -> dict[str, Any]:
        """Return what the library is and holds, as JSON-able values; loads no model."""
        manifest = self.store.manifest
        return {
            "library": str(self.path),
            **asdict(self.store.counts()),
            "compressor": manifest.compressor,
            "embedder": manifest.embedder,
            "codec": manifest.codec,
            "index": manifest.index,
            **manifest.settings,
        }

    def _ingestion(
        self, writer: Writer, known: dict[str, str], unchanged: int, on_progress: Callable[[AddProgress], None] | None
    ) -> Ingestion:
        settings = self.store.manifest.settings
        chunker = Chunker(self.compressor.tokenizer, settings["chunk_tokens"], settings["overlap_tokens"])
        return Ingestion(writer, self.compressor, self.embedder, chunker, known, unchanged, on_progress)

    def _hits(self, rankings: list[list[tuple[int, float]]], k: int) -> list[Hit]:
        ranked = rankings[0] if len(rankings) == 1 else reciprocal_rank_fusion(rankings)
        scores = dict(ranked[:k])
        return [Hit.of(chunk, scores[chunk.id]) for chunk in self.store.chunks(list(scores))]

    def _reranked(self, queries: Sequence[str], found: list[list[Hit]], k: int) -> list[list[Hit]]:
        """Return the ``k`` hits of every query behind whose memories it is likeliest."""
        chunks = [self.store.chunks([hit.id for hit in hits]) for hits in found]
        scores = question_likelihoods(self.compressor, queries, [self.store.memories(some) for some in chunks])
        best = []
        for hits, some, values in zip(found, chunks, scores, strict=True):
            by_chunk = {chunk.id: value for chunk, value in zip(some, values, strict=True)}  # but those removed since
            scored = [replace(hit, score=by_chunk[hit.id]) for hit in hits if hit.id in by_chunk]
            best.append(sorted(scored, key=lambda hit: -hit.score)[:k])
        return best

    def _prepare(
        self, questions: Sequence[str], k: int, mode: Mode, max_new_tokens: int, options: dict[str, Any]
    ) -> tuple[list[Prompt], list[Answer], Any]:
        """Retrieve for every question and lay out its prompt."""
        from ctxdocs.generation import GenerationOptions

        if mode not in ("memory", "text", "none"):
            raise InputError(f"unknown mode {mode!r}", "choose memory, text or none")
        options = dict(options)
        how = {name: options.pop(name) for name in ("retrieval", "rerank", "documents") if name in options}
        share = options.pop("blend", None)
        if share is not None and mode != "memory":
            raise InputError(f"blend is for memories, and mode={mode!r} reads none", "leave blend out")
        compressor: Any = self.compressor
        options.setdefault("stop", compressor.prompt_format.stop)
        try:
            chosen = GenerationOptions(max_new_tokens=max_new_tokens, **options)
        except TypeError as error:
            raise InputError(f"unknown option: {error}") from error
        if mode == "none":
            found: list[list[Hit]] = [[] for _ in questions]
        else:
            found = self.search_many(questions, k, **how)
        prompts = []
        for question, hits in zip(questions, found, strict=True):
            sources: list[Any] = [hit.text for hit in hits]
            if mode == "memory":
                sources = self.memories(hits)
            prompt = compressor.prompt_format.build(question, sources, compressor.tokenizer, compressor.prefix_ids)
            prompts.append(prompt if share is None else self.blend(prompt, hits, share))
        return prompts, [Answer(sources=hits, mode=mode) for hits in found], chosen


class AnswerStream(Iterator[str]):
    """Pieces of an answer as they are decided; ``answer`` is complete once they are all taken."""

    def __init__(
        self, library: Library, question: str, k: int, mode: Mode, max_new_tokens: int, options: dict[str, Any]
    ) -> None:
        from ctxdocs import generation

        library.load(mode)
        start = time.perf_counter()
        prompts, answers, chosen = library._prepare([question], k, mode, max_new_tokens, options)
        self.answer = answers[0]
        self._retrieved = time.perf_counter() - start
        self._pieces = generation.stream(library.compressor, prompts[0], chosen)

    def __iter__(self) -> AnswerStream:
        return self

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration as end:
            if end.value is not None:
                self.answer.fill(end.value, self._retrieved)
            raise


def _distinct(documents: list[Document]) -> list[Document]:
    """Refuse two documents of one uri: only one of them could stay."""
    seen: set[str] = set()
    for document in documents:
        if document.uri in seen:
            raise InputError(f"two documents are named {document.uri!r}", "give every document a uri of its own")
        seen.add(document.uri)
    return documents


def _vanished(known: dict[str, str], paths: list[Path], found: set[str]) -> list[str]:
    """Documents below the given folders whose files were not found."""
    folders = [path.expanduser().resolve().as_posix() + "/" for path in paths if path.expanduser().is_dir()]
    return [uri for uri in known if uri not in found and any(uri.startswith(folder) for folder in folders)]
