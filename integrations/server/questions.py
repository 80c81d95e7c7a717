"""What is asked of a library's model, and the prompts made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from ctxdocs.chat_format import ChatFormat
from ctxdocs.errors import LibraryError
from ctxdocs.integrations.server.errors import RequestError
from ctxdocs.prompts import Piece, assemble, begun, encode_pieces

if TYPE_CHECKING:
    from ctxdocs.answers import Hit, Mode
    from ctxdocs.compressors.base import Compressor
    from ctxdocs.library import Library, Rerank, Retrieval
    from ctxdocs.memory import Memory
    from ctxdocs.prompts import Prompt


@dataclass(frozen=True)
class Reading:
    """What is read of the library for a question.

    Parameters
    ----------
    mode : {"memory", "text", "none"}
        The chunks' memories, their raw text, or nothing.
    k : int
        How many chunks.
    retrieval, rerank : str
        As in :meth:`ctxdocs.Library.search`.
    blend : float, optional
        As in :meth:`ctxdocs.Library.blend`.
    """

    mode: Mode = "memory"
    k: int = 4
    retrieval: Retrieval = "hybrid"
    rerank: Rerank = "none"
    blend: float | None = None


@dataclass(frozen=True)
class Question:
    """A question.

    Parameters
    ----------
    text : str
        What the library is searched for: the last message of a conversation, or a prompt.
    reading : Reading
        What is read of the library.
    form : {"chat", "text"}
        Whether it is a turn in the model's chat format, or goes to the model as it stands.
    turns : tuple of (str, str)
        Questions and answers before it.
    system : str
        What the model is told before the first turn.
    """

    text: str
    reading: Reading = Reading()
    form: Literal["chat", "text"] = "chat"
    turns: tuple[tuple[str, str], ...] = ()
    system: str = ""


@dataclass
class Laid:
    """A question as the model is given it: its prompt, the chunks that are read, and what ends an answer."""

    prompt: Prompt
    sources: list[Hit]
    stop: tuple[str, ...]


class Prompting:
    """Searches a library for questions and lays out their prompts; used by one thread."""

    def __init__(self, library: Library) -> None:
        self.library = library

    def found(self, questions: Sequence[Question]) -> list[list[Hit]]:
        """Search for what questions read; those that are searched alike are embedded in one batch."""
        hits: dict[int, list[Hit]] = {i: [] for i in range(len(questions))}
        for reading in dict.fromkeys(question.reading for question in questions if question.reading.mode != "none"):
            rows = [i for i, question in enumerate(questions) if question.reading == reading]
            if self.library.store.is_empty():
                raise RequestError(
                    409, "the library holds no documents yet; add some, or ask with mode 'none'", "empty"
                )
            texts = [questions[i].text for i in rows]
            found = self.library.search_many(texts, reading.k, retrieval=reading.retrieval, rerank=reading.rerank)
            hits.update(zip(rows, found, strict=True))
        return [hits[i] for i in range(len(questions))]

    def lay_out(self, question: Question, hits: list[Hit]) -> Laid:
        """Return the prompt of a question behind the chunks that were found for it.

        Raises
        ------
        InputError
            If the model's chat template has no place for a system text, or memories that are not exact are blended.
        """
        hits, sources = self._sources(question, hits)
        compressor: Any = self.library.compressor
        tokenizer = compressor.tokenizer
        if question.form == "text":
            layout = replace(compressor.prompt_format, template="{sources}{question}", bos="tokenizer")
            prompt = layout.build(question.text, sources, tokenizer, compressor.prefix_ids)
            return Laid(self._blended(prompt, question, hits), hits, ())
        chat = ChatFormat.around(compressor, question.system)
        prompt = _chat_prompt(compressor, chat, question, sources)
        return Laid(self._blended(prompt, question, hits), hits, chat.turn.stop)

    def _blended(self, prompt: Prompt, question: Question, hits: Sequence[Hit]) -> Prompt:
        share = question.reading.blend
        return prompt if share is None else self.library.blend(prompt, hits, share)

    def _sources(self, question: Question, hits: list[Hit]) -> tuple[list[Hit], Sequence[Memory | str]]:
        if question.reading.mode != "memory":
            return hits, [hit.text for hit in hits]
        store = self.library.store
        for _ in range(2):
            # A document may be removed between the search and here.
            chunks = store.chunks([hit.id for hit in hits])
            kept = {chunk.id for chunk in chunks}
            hits = [hit for hit in hits if hit.id in kept]
            try:
                return hits, store.memories(chunks)
            except LibraryError:
                continue
        return hits, self.library.memories(hits)


def _chat_prompt(
    compressor: Compressor, chat: ChatFormat, question: Question, sources: Sequence[Memory | str]
) -> Prompt:
    """Write a conversation as the model's chat format has it, the sources in front of the last question."""
    tokenizer: Any = compressor.tokenizer
    before, after = chat.opening_around(question.system)
    opening = [before, Piece(question.system, trusted=False), after]
    text = "".join(piece.text for piece in opening)
    is_plain = encode_pieces(tokenizer, opening).equal(encode_pieces(tokenizer, [Piece(text)]))
    # Memories that were read behind the chat's header are read behind what this conversation begins with.
    prefix = compressor.opened(text if is_plain else before.text).prefix_ids
    if is_plain and not question.turns:
        return replace(chat, opening=text).first_turn.build(question.text, sources, tokenizer, prefix)
    pieces: list[Memory | Piece] = [*opening]
    for asked, answered in question.turns:
        pieces += [*chat.turn.pieces(asked), Piece(answered, trusted=False), Piece(chat.between)]
    prompt = assemble([*pieces, *chat.turn.pieces(question.text, sources)], tokenizer)
    brings_all = prefix is None and chat.turn.bos == "template"
    return prompt if brings_all else begun(prompt, tokenizer, prefix)
