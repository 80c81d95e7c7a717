"""What the adapters share: how texts with references, questions and conversations become prompts of a library's model.

Nothing here knows a framework.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from ctxdocs.answers import Hit
from ctxdocs.chat_format import ChatFormat
from ctxdocs.errors import InputError
from ctxdocs.generation import Generation, GenerationOptions
from ctxdocs.integrations.contents import Contents
from ctxdocs.integrations.hints import look_for_copies, note_found
from ctxdocs.integrations.searching import Search
from ctxdocs.memory import Memory
from ctxdocs.prompts import Piece, assemble, begun, encode_text, with_bos
from ctxdocs.references import References
from ctxdocs.sharing import SharedModel, one_at_a_time, shared_model

if TYPE_CHECKING:
    from collections.abc import Generator

    from ctxdocs.cache import StoredChunk
    from ctxdocs.compressors.base import Compressor
    from ctxdocs.library import Library
    from ctxdocs.prompts import Prompt

Pieces: TypeAlias = "list[Memory | Piece]"

# What a template has where an answer is to begin: nothing, or a few words with a colon. It asks nothing.
_LABEL = re.compile(r"\s*(?:\w+(?:[ \t]+\w+){0,2}[ \t]*:)?\s*")


@dataclass
class Request:
    """A prompt that is ready to be read.

    Parameters
    ----------
    prompt : Prompt
        Its parts.
    sources : list of Hit or StoredChunk
        The chunks whose memories stand in it, in this order.
    stop : tuple of str
        Strings that end an answer in this prompt's format.
    is_raw : bool
        Whether the prompt stands in no format. Then white space around what follows it may mean something.
    """

    prompt: Prompt
    sources: list[Hit | StoredChunk] = field(default_factory=list)
    stop: tuple[str, ...] = ()
    is_raw: bool = False


class LibraryReader:
    """Lays out prompts for a library's model, and has them answered.

    Parameters
    ----------
    library : Library
        Where references are looked up, and what is searched.
    """

    def __init__(self, library: Library) -> None:
        self.library = library
        self.references = References(library.store)

    @property
    def model(self) -> SharedModel:
        """The library's model; loaded when first asked for."""
        return shared_model(self.library)

    # Searching.

    def search(self, queries: Sequence[str], search: Search) -> list[list[Hit]]:
        """Search the library, one thread at a time."""
        with one_at_a_time(self.library, with_model=search.rerank != "none"):
            found = search.found(self.library, queries)
        note_found(self.library, (hit.text for hits in found for hit in hits))
        return found

    # Laying out prompts.

    def requests(self, texts: Sequence[str], search: Search | None, framing: str = "none") -> list[Request]:
        """Return the prompts of texts.

        Parameters
        ----------
        texts : sequence of str
            Each may refer to memories.
        search : Search, optional
            If given, a text that refers to nothing is a question to the library.
        framing : {"none", "turn"}
            Whether other texts are prompts as they stand, or a turn each in the model's chat format.
        """
        requests = [self.as_written(text) if framing == "none" else self.conversation(text) for text in texts]
        if search:
            alone = [index for index, request in enumerate(requests) if not request.sources]
            asked = self.questions([texts[index] for index in alone], search) if alone else []
            for index, request in zip(alone, asked, strict=True):
                requests[index] = request
        return requests

    def as_written(self, text: str) -> Request:
        """Return a text as its own prompt, every reference replaced by its memory.

        Nothing is added but what the tokenizer or the method begins every prompt with; see ``Compressor.generate``.
        """
        pieces, sources = self._woven(text, ("", ""))
        compressor: Any = self.model.compressor
        if compressor.prefix_ids is None:
            prompt = with_bos(assemble(pieces, compressor.tokenizer), compressor.tokenizer)
        else:
            prompt = compressor._prompt([p.text if isinstance(p, Piece) else p for p in pieces], [])
        return Request(prompt, sources, is_raw=True)

    def questions(self, questions: Sequence[str], search: Search) -> list[Request]:
        """Return the prompts of questions to the library, in the model's prompt format, as ``Library.ask`` does."""
        compressor: Any = self.model.compressor
        layout = compressor.prompt_format
        requests = []
        for question, hits in zip(questions, self.search(questions, search), strict=True):
            memories = self.library.memories(hits)
            prompt = layout.build(question, memories, compressor.tokenizer, compressor.prefix_ids)
            requests.append(Request(prompt, list(hits), layout.stop))
        return requests

    def about(self, question: str, contents: Contents) -> Request:
        """Return the prompt of a question about contents, laid out as those of questions to the library.

        Raises
        ------
        InputError
            If the question is blank.
        """
        if not question.strip():
            raise InputError("the question is empty", "ask something")
        compressor: Any = self.model.compressor
        layout = compressor.prompt_format
        memories, chunks = contents.read(self.library, self.references)
        prompt = layout.build(question, memories, compressor.tokenizer, compressor.prefix_ids)
        return Request(prompt, list(chunks), layout.stop)

    def conversation(
        self,
        question: str,
        turns: Sequence[tuple[str, str]] = (),
        system: str = "",
        search: Search | Contents | None = None,
    ) -> Request:
        """Return the prompt of a conversation, in the model's chat template or, without one, its prompt format.

        Parameters
        ----------
        question : str
            What is to be answered.
        turns : sequence of (str, str)
            Questions and answers so far.
        system : str
            What the model is told before the first turn.
        search : Search or Contents, optional
            Search the library for the question, unless it or the system's text refers to memories; or what is read
            with it in any case.

        Raises
        ------
        InputError
            If the question is blank, or the chat template has no place for a system text.
        """
        layout = self.layout(system)
        before, after = layout.opening_around(system)
        said, sources = self._woven(system, _frame(layout))
        pieces: Pieces = [before, *said, after]
        is_searched = not sources
        for asked, answered in turns:
            turn, read = self._turn(layout, asked)
            pieces += [*turn, Piece(answered, trusted=False), Piece(layout.between)]
            sources += read
        turn, read = self._question(layout, question, search, is_searched=is_searched)
        compressor: Any = self.opened(before)
        prompt = assemble([*pieces, *turn], compressor.tokenizer)
        prompt = replace(layout, opening=before.text).first_turn.begun(
            prompt, compressor.tokenizer, compressor.prefix_ids
        )
        return Request(prompt, [*sources, *read], layout.turn.stop)

    def continued(
        self, history: Memory, question: str, system: str = "", search: Search | Contents | None = None
    ) -> Request:
        """Return the prompt of a question behind the memory of all that was said before.

        The memory begins with the system's text; what that refers to is read in front of the question.
        """
        layout = self.layout(system)
        said, sources = self._woven(system, _frame(layout))
        referred = [piece for index, piece in enumerate(said) if _is_framed(said, index)]
        turn, read = self._question(layout, question, search, is_searched=not sources)
        compressor: Any = self.opened(self.opening_text(layout, system)[0])
        prompt = assemble([history, Piece(layout.between), *referred, *turn], compressor.tokenizer)
        prompt = begun(prompt, compressor.tokenizer, compressor.prefix_ids)
        return Request(prompt, [*sources, *read], layout.turn.stop)

    def blended(self, request: Request, share: float | None) -> Request:
        """Return a prompt whose memories know of each other, as :meth:`ctxdocs.Library.blend` does; None changes none.

        Raises
        ------
        InputError
            If the library's memories are not exact, or the prompt holds others than those of its chunks.
        """
        if share is None:
            return request
        others = sum(isinstance(part, Memory) for part in request.prompt) - len(request.sources)
        if others:
            raise InputError(
                f"{others} of the memories in the prompt are of no chunk of the library, and cannot be blended",
                "compress the texts into the library first, read the history as text, or leave blend out",
            )
        with self.model.lock, torch.no_grad():
            return replace(request, prompt=self.library.blend(request.prompt, request.sources, share))

    def layout(self, system: str) -> ChatFormat:
        """Return what stands around the turns of a conversation."""
        return ChatFormat.around(self.model.compressor, system)

    def opening_text(self, layout: ChatFormat, system: str) -> list[Piece]:
        """Return the text in front of the first turn, without what it refers to.

        The first piece is the chat format's own. It holds the system's text, unless that imitates special tokens.
        """
        text = self.text_of(system)
        compressor: Any = self.model.compressor
        if not any(special in text for special in compressor.tokenizer.all_special_tokens):
            return [Piece(ChatFormat.of(compressor, text or None).opening)]
        before, after = layout.opening_around(system)
        return [before, Piece(text, trusted=False), after]

    def opened(self, before: Piece) -> Compressor:
        """Return the compressor as it reads a conversation that begins with a text of the chat template's own."""
        return self.model.compressor.opened(before.text)

    def text_of(self, text: str) -> str:
        """Return a text without its references."""
        return "".join(part for part in self.references.read(text) if isinstance(part, str))

    def _question(
        self, layout: ChatFormat, question: str, search: Search | Contents | None, *, is_searched: bool
    ) -> tuple[Pieces, list[Hit | StoredChunk]]:
        """Return the last turn up to where its answer begins, with what is given or found for it."""
        if not question.strip():
            raise InputError("the last message is empty", "ask something")
        turn, sources = self._turn(layout, question)
        memories: list[Memory] = []
        found: Sequence[Hit | StoredChunk] = []
        if isinstance(search, Contents):
            memories, found = search.read(self.library, self.references)
        elif search is not None and is_searched and not sources:
            (found,) = self.search([question], search)
            memories = self.library.memories(found)
        if not sources:
            return layout.turn.pieces(question, memories), list(found)
        before, after = _frame(layout)
        given: Pieces = [piece for memory in memories for piece in (Piece(before), memory, Piece(after))]
        return [*given, *turn], [*found, *sources]

    def _turn(self, layout: ChatFormat, question: str) -> tuple[Pieces, list[Hit | StoredChunk]]:
        """Return a turn up to where its answer begins.

        What a question refers to stands, with the text in front of it, where the format has its sources; what comes
        behind the last reference is the question. Where that is none ("Question: ... Context: ... Answer:"), all of the
        text is.
        """
        pieces, sources = self._woven(question, _frame(layout))
        end = 1 + max((index for index in range(len(pieces)) if _is_framed(pieces, index)), default=-1)
        text = _text(pieces[end:])
        front: Any = layout.turn.pieces("")[0]
        if sources and front.text and _LABEL.fullmatch(text):
            return layout.turn.pieces(_text(pieces), [piece for piece in pieces if isinstance(piece, Memory)]), sources
        return [*pieces[:end], *layout.turn.pieces(text)], sources

    def _woven(self, text: str, frame: tuple[str, str]) -> tuple[Pieces, list[Hit | StoredChunk]]:
        """Return a text's pieces, memories in place of references, each in its frame; and the chunks they are of."""
        parts = self.references.read(text)
        chunks = [part for part in parts if not isinstance(part, str)]
        if not chunks:
            look_for_copies(self.library, text)
        memories = iter(self.library.store.memories(chunks))
        pieces: Pieces = []
        for part in parts:
            if isinstance(part, str):
                pieces.append(Piece(part, trusted=False))
            else:
                pieces += [Piece(frame[0]), next(memories), Piece(frame[1])]
        return pieces, list(chunks)

    def token_ids(self, text: str) -> list[int]:
        """Return the ids of what is read of a text: its tokens, and -1 for every slot of what it refers to.

        No special tokens are recognised or added.
        """
        tokenizer: Any = self.model.compressor.tokenizer
        ids: list[int] = []
        for part in self.references.read(text):
            ids += encode_text(tokenizer, part).tolist() if isinstance(part, str) else [-1] * part.slots
        return ids

    # Answering.

    def generate(self, requests: Sequence[Request], options: GenerationOptions) -> list[Generation]:
        """Answer prompts, in batches of those that end at the same strings."""
        answers: dict[int, Generation] = {}
        stops = {request.stop for request in requests}
        for stop in sorted(stops):
            indices = [index for index, request in enumerate(requests) if request.stop == stop]
            results = self.model.generate([requests[i].prompt for i in indices], stopping_at(options, stop))
            answers.update(zip(indices, results, strict=True))
        return [answers[index] for index in range(len(requests))]

    def stream(self, request: Request, options: GenerationOptions) -> Generator[str, None, Generation]:
        """Answer a prompt, yielding text as it is decided."""
        return self.model.stream(request.prompt, stopping_at(options, request.stop))


def stopping_at(options: GenerationOptions, stop: Sequence[str]) -> GenerationOptions:
    """Return options that end generation at more strings."""
    return replace(options, stop=tuple(dict.fromkeys([*options.stop, *stop])))


def stripped(pieces: Generator[str, None, Generation]) -> Generator[str, None, Generation]:
    """Pass on a stream without the white space at its beginning and end."""
    begun_, held = False, ""
    while True:
        try:
            piece = next(pieces)
        except StopIteration as end:
            return end.value
        piece = held + (piece if begun_ else piece.lstrip())
        kept = piece.rstrip()
        held = piece[len(kept) :]
        if kept:
            begun_ = True
            yield kept


def source_of(chunk: Hit | StoredChunk) -> dict[str, Any]:
    """Return where a chunk is from, as JSON-able values."""
    if isinstance(chunk, Hit):
        place = {"source": chunk.document, "chunk": chunk.chunk}
    else:
        place = {"source": chunk.uri, "chunk": chunk.ordinal}
    return {**place, "start_index": chunk.start, "end_index": chunk.end, "slots": chunk.slots, "tokens": chunk.tokens}


def _is_framed(pieces: Pieces, index: int) -> bool:
    """Whether a piece of woven text is a memory, or what its frame begins or ends with."""
    piece = pieces[index]
    return isinstance(piece, Memory) or piece.trusted


def _text(pieces: Pieces) -> str:
    """Return what of woven text comes from outside, without the memories and their frames."""
    return "".join(piece.text for piece in pieces if isinstance(piece, Piece) and not piece.trusted)


def _frame(layout: ChatFormat) -> tuple[str, str]:
    before, _, after = layout.turn.memory.partition("{source}")
    return before, after
