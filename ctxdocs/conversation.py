"""A conversation whose history is compressed memory, alone or over a library.

Alone, a session reads every turn and compresses what its window no longer holds. Over a library each question is
answered behind the memory of the conversation so far and the memories that a search found for it; the session then
reads the turn without what was found, so that the history stays a history of the conversation.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ctxdocs import generation
from ctxdocs.answers import Answer
from ctxdocs.chat_format import ChatFormat
from ctxdocs.errors import CheckpointError, InputError
from ctxdocs.prompts import Piece, assemble, begins_with, begun, encode_pieces, with_bos

if TYPE_CHECKING:
    from ctxdocs.compressors.base import Compressor
    from ctxdocs.generation import Generation, GenerationOptions
    from ctxdocs.library import Library
    from ctxdocs.memory import Memory


class Conversation:
    """Questions and answers, with a history that takes a bounded or slowly growing number of slots.

    Parameters
    ----------
    compressor : Compressor
        Reads, answers and compresses.
    library : Library, optional
        Searched for every question; one of the same compressor.
    k : int
        Chunks to read of the library.
    system : str, optional
        What the model is told before the first turn; kept with a conversation that is saved.
    **options
        Fields of :class:`ctxdocs.generation.GenerationOptions`.

    Attributes
    ----------
    turns : list of dict
        ``{"question", "answer"}`` of every turn so far.
    """

    def __init__(
        self,
        compressor: Compressor,
        library: Library | None = None,
        *,
        k: int = 4,
        system: str | None = None,
        **options: Any,
    ) -> None:
        self.library = library
        self.k = k
        self._given = compressor
        self._begin(system)
        options.setdefault("stop", self.format.turn.stop)
        try:
            self.options: GenerationOptions = generation.GenerationOptions(**options)
        except TypeError as error:
            raise InputError(f"unknown option: {error}") from error
        self.session = self.compressor.session()

    def _begin(self, system: str | None) -> None:
        self.format = ChatFormat.of(self._given, system)
        self.compressor = self._given.opened(self.format.opening)
        self.system = system

    @property
    def turns(self) -> list[dict[str, str]]:
        """Questions and answers so far, kept with the session."""
        return self.session.note.setdefault("turns", [])

    def ask(self, question: str) -> Generator[str, None, Answer]:
        """Answer a question, yielding text as it is decided.

        An answer that is abandoned becomes part of the history as far as it came.

        Returns
        -------
        Answer
            The return value of the generator: text, sources, and what reading took.

        Raises
        ------
        InputError
            If the question is blank, or does not fit the model's positions; the history is as it was.
        """
        if not question.strip():
            raise InputError("the question is empty", "ask something")
        return self._from_library(self.library, question) if self.library else self._from_session(question)

    def memory(self) -> Memory | None:
        """Return the conversation so far as one memory; None before the first turn."""
        return self.session.memory() if self.session.tokens_seen else None

    def reset(self) -> None:
        """Forget the conversation."""
        self.session.reset()
        self.session.note.clear()

    def save(self, path: str | Path) -> None:
        """Write the conversation to a file; see :meth:`ctxdocs.compressors.sessions.Session.save`."""
        if self.system:
            self.session.note["system"] = self.system
        self.session.save(path)

    def load(self, path: str | Path) -> None:
        """Go on with a conversation that was saved, behind its own system text; on an error the running one stays."""
        session = self.compressor.load_session(path)
        system = session.note.get("system")
        if not isinstance(session.note.get("turns", []), list) or not isinstance(system, str | None):
            raise CheckpointError(f"{path} holds no conversation")
        if system != self.system:
            self._begin(system)
            session = self.compressor.load_session(path)
        self.session = session

    def _from_session(self, question: str) -> Generator[str, None, Answer]:
        start = time.perf_counter()
        ids = self._encoded(question, [])
        with torch.no_grad():
            self.session.feed(ids)
        pieces = self.session.stream(**vars(self.options))
        answer = yield from self._collected(question, pieces, Answer(), time.perf_counter() - start)
        answer.prompt_tokens = len(ids)
        return answer

    def _from_library(self, library: Library, question: str) -> Generator[str, None, Answer]:
        start = time.perf_counter()
        tokenizer: Any = self.compressor.tokenizer
        hits = library.search(question, self.k)
        history = self.memory()
        sources, prefix = library.memories(hits), self.compressor.prefix_ids
        if history is None:
            prompt = self.format.first_turn.build(question, sources, tokenizer, prefix)
        else:
            prompt = begun(assemble([history, *self._pieces(question, sources)], tokenizer), tokenizer, prefix)
        pieces = generation.stream(self.compressor, prompt, self.options)
        answer = Answer(sources=hits)
        try:
            return (yield from self._collected(question, pieces, answer, time.perf_counter() - start))
        finally:
            with torch.no_grad():
                self.session.feed(self._encoded(question, [Piece(answer.text, trusted=False)]))

    def _collected(
        self, question: str, pieces: Generator[str, None, Generation], answer: Answer, before: float
    ) -> Generator[str, None, Answer]:
        """Pass pieces on, and take note of the turn, however far it comes; ``before`` are seconds spent until now."""
        try:
            while True:
                try:
                    piece = next(pieces)
                except StopIteration as end:
                    answer.fill(end.value, before)
                    return answer
                answer.text += piece
                yield piece
        finally:
            pieces.close()
            answer.text = answer.text.strip()
            self.turns.append({"question": question, "answer": answer.text})

    def _pieces(self, question: str, sources: Sequence[Memory]) -> list[Memory | Piece]:
        return [
            Piece(self.format.between if self.session.tokens_seen else self.format.opening),
            *self.format.turn.pieces(question, sources),
        ]

    def _encoded(self, question: str, rest: Sequence[Piece]) -> Tensor:
        """Return the ids of a turn's text, as the session is fed them."""
        tokenizer: Any = self.compressor.tokenizer
        pieces: list[Any] = [*self._pieces(question, []), *rest]
        ids = encode_pieces(tokenizer, pieces)
        if self.session.tokens_seen:
            return ids
        prefix = self.compressor.prefix_ids
        if prefix is None:
            return ids if self.format.turn.bos == "template" else torch.cat(with_bos([ids], tokenizer))  # type: ignore[arg-type]
        # The session begins with the prefix by itself.
        if begins_with(ids, prefix):
            return ids[len(prefix) :]
        opening_is_prefix = begins_with(encode_pieces(tokenizer, pieces[:1]), prefix)
        return encode_pieces(tokenizer, pieces[1:]) if opening_is_prefix else ids
