"""A LlamaIndex LLM that reads memories: of what prompts refer to, of what it searches for, of what it is given."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeVar

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
    TextBlock,
)
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from pydantic import ConfigDict

from ctxdocs.checks import one_of
from ctxdocs.errors import InputError
from ctxdocs.generation import Generation, GenerationOptions
from ctxdocs.integrations.contents import Contents
from ctxdocs.integrations.history import CompressedHistory
from ctxdocs.integrations.llama_index.structured import StructuredAnswers
from ctxdocs.integrations.reading import Request, source_of, stripped
from ctxdocs.integrations.searching import Search
from ctxdocs.integrations.settings import LibrarySettings, refuse
from ctxdocs.integrations.turns import turns_of

_T = TypeVar("_T")

_ROLES = {
    MessageRole.SYSTEM: "system",
    MessageRole.DEVELOPER: "system",
    MessageRole.USER: "user",
    MessageRole.ASSISTANT: "assistant",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
}


@dataclass(frozen=True)
class _Step:
    """What has been said, what of it is new, and at the end what is known of the answer."""

    text: str
    delta: str
    raw: dict[str, Any] | None = None

    @property
    def counts(self) -> dict[str, int]:
        return dict(self.raw["usage"]) if self.raw else {}


class CompressedMemoryLLM(LibrarySettings, StructuredAnswers):
    """A library's language model, reading memories.

    Wherever a prompt or a message refers to a memory, as the nodes of
    :class:`~ctxdocs.integrations.llama_index.CompressedMemoryRetriever` and
    :class:`~ctxdocs.integrations.llama_index.MemoryNodePostprocessor` make LlamaIndex write it, the model reads the
    memory. ``complete`` reads a prompt as it stands; ``chat`` puts messages into the model's chat template or, where it
    has none, its prompt format. With ``k`` what refers to nothing is a question: the library is searched for it, and
    the model reads what was found, as :meth:`ctxdocs.Library.ask` does.

    Parameters
    ----------
    library, k, retrieval, rerank, filter, blend, max_new_tokens, stop
    temperature, top_k, top_p, repetition_penalty, seed
        As in :class:`ctxdocs.integrations.settings.LibrarySettings`. All but ``library`` may be given for one call as
        well.
    framing : {"none", "turn"}
        Whether a prompt that ``complete`` reads as it stands is all the model sees, or is put as one turn into the
        model's chat template (or, where it has none, its prompt format).
    history : {"text", "memory"}
        Whether earlier turns of a chat are read as their text, or compressed: a session reads each turn once and keeps
        its memory, also between calls that continue one another. Compressed turns do not hold the memories they refer
        to.

    Notes
    -----
    For one call there is also ``contents``, a list of texts that are read in front of the question: what they refer to
    as memories, all else compressed for this call alone. The library is not searched then. And ``schema``, a JSON
    schema, or ``response_format`` in OpenAI's shape: tokens that do not fit it are masked while the answer is written.
    ``structured_predict`` and ``as_structured_llm`` hold the model to a pydantic class's schema in this way.

    Of a response, ``raw`` holds ``usage`` (``prompt_tokens`` counts text tokens and memory slots, of which the slots
    are ``memory_slots``), ``sources``, ``finish_reason`` and ``model``.

    Examples
    --------
    >>> CompressedMemoryLLM(library="./lib", k=4).complete("When was the lighthouse built?")  # doctest: +SKIP
    CompletionResponse(text='1874', ...)
    """

    framing: Literal["none", "turn"] = "none"
    history: Literal["text", "memory"] = "text"

    model_config = ConfigDict(arbitrary_types_allowed=True, populate_by_name=True, extra="forbid")

    @classmethod
    def class_name(cls) -> str:
        """Return the name in serialised objects."""
        return "CompressedMemoryLLM"

    @property
    def metadata(self) -> LLMMetadata:
        """What LlamaIndex packs prompts by; asking for it loads the model."""
        return LLMMetadata(
            context_window=self._reader.model.compressor.backbone.max_positions,
            num_output=self.max_new_tokens,
            is_chat_model=True,
            model_name=self.model_name,
        )

    @cached_property
    def _histories(self) -> CompressedHistory:
        return CompressedHistory(self._reader)

    def token_ids(self, text: str) -> list[int]:
        """Return the ids of what the model reads of a text: its tokens, and -1 for every slot of a memory.

        For whatever in LlamaIndex counts tokens: ``Settings.tokenizer = llm.token_ids``, or, for one engine,
        ``PromptHelper.from_llm_metadata(llm.metadata, tokenizer=llm.token_ids)``.
        """
        return self._reader.token_ids(text)

    # Completing.

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Continue a prompt, or answer a question; see the class."""
        return _completion(self._answer(*self._asked(prompt, formatted, kwargs)))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """Like :meth:`complete`, piece by piece; the last response has no new text and ``raw``."""
        steps = self._steps(*self._asked(prompt, formatted, kwargs))
        return (_completion(step) for step in steps)

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Like :meth:`complete`, in a thread."""
        return _completion(await asyncio.to_thread(lambda: self._answer(*self._asked(prompt, formatted, kwargs))))

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        """Like :meth:`stream_complete`, in a thread."""
        request, options = await asyncio.to_thread(self._asked, prompt, formatted, kwargs)
        return (_completion(step) async for step in _in_threads(self._steps(request, options)))

    # Chatting.

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer the last message of a conversation; see the class."""
        return _reply(self._answer(*self._said(messages, kwargs)))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """Like :meth:`chat`, piece by piece; the last response has no new text and ``raw``."""
        steps = self._steps(*self._said(messages, kwargs))
        return (_reply(step) for step in steps)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Like :meth:`chat`, in a thread."""
        return _reply(await asyncio.to_thread(lambda: self._answer(*self._said(messages, kwargs))))

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """Like :meth:`stream_chat`, in a thread."""
        request, options = await asyncio.to_thread(self._said, messages, kwargs)
        return (_reply(step) async for step in _in_threads(self._steps(request, options)))

    # Both.

    def _asked(self, prompt: str, formatted: bool, kwargs: dict[str, Any]) -> tuple[Request, GenerationOptions]:
        changes = dict(kwargs)
        framing = one_of("framing", changes.pop("framing", self.framing), ("none", "turn"))
        share, (search, options) = self._share(changes), self._told(changes)
        if not formatted and self.completion_to_prompt is not None:
            prompt = self.completion_to_prompt(prompt)
        if isinstance(search, Contents):
            return self._reader.blended(self._reader.about(prompt, search), share), options
        (request,) = self._reader.requests([prompt], search, framing)
        return self._reader.blended(request, share), options

    def _said(self, messages: Sequence[ChatMessage], kwargs: dict[str, Any]) -> tuple[Request, GenerationOptions]:
        changes = dict(kwargs)
        history = one_of("history", changes.pop("history", self.history), ("text", "memory"))
        share, (search, options) = self._share(changes), self._told(changes)
        system, turns, question = turns_of(
            (_role(message, place), _text(message, place)) for place, message in enumerate(messages)
        )
        if history == "memory" and turns:
            request = self._histories.request(question, turns, system, search)
        else:
            request = self._reader.conversation(question, turns, system, search)
        return self._reader.blended(request, share), options

    def _told(self, changes: dict[str, Any]) -> tuple[Search | Contents | None, GenerationOptions]:
        """Return what is read with a question, and how it is answered; refuse what means neither."""
        contents = changes.pop("contents", None)
        options, search = self._options(changes.pop("stop", None), changes), self._search(changes)
        refuse(changes)
        return (search if contents is None else Contents(contents)), options

    def _answer(self, request: Request, options: GenerationOptions) -> _Step:
        (result,) = self._reader.generate([request], options)
        text = result.text if request.is_raw else result.text.strip()
        return _Step(text, text, self._raw(request, result))

    def _steps(self, request: Request, options: GenerationOptions) -> Generator[_Step, None, None]:
        pieces = self._reader.stream(request, options)
        if not request.is_raw:
            pieces = stripped(pieces)
        text = ""
        while True:
            try:
                piece = next(pieces)
            except StopIteration as end:
                yield _Step(text, "", self._raw(request, end.value))
                return
            text += piece
            yield _Step(text, piece)

    def _raw(self, request: Request, result: Generation) -> dict[str, Any]:
        """Return what is known of an answer besides its text; all of it JSON-able."""
        read, written = result.prompt_tokens + result.memory_slots, len(result.ids)
        return {
            "model": self.model_name,
            "finish_reason": result.finish_reason,
            "sources": [source_of(chunk) for chunk in request.sources],
            "usage": {
                "prompt_tokens": read,
                "completion_tokens": written,
                "total_tokens": read + written,
                "memory_slots": result.memory_slots,
            },
        }


def _completion(step: _Step) -> CompletionResponse:
    return CompletionResponse(text=step.text, delta=step.delta, raw=step.raw, additional_kwargs=step.counts)


def _reply(step: _Step) -> ChatResponse:
    message = ChatMessage(role=MessageRole.ASSISTANT, content=step.text)
    return ChatResponse(message=message, delta=step.delta, raw=step.raw, additional_kwargs=step.counts)


def _role(message: ChatMessage, place: int) -> str:
    role = _ROLES.get(message.role)
    if role is None or message.additional_kwargs.get("tool_calls"):
        raise InputError(
            f"message {place} is one of {message.role.value!r} that this model does not read",
            "it reads messages of the system, the user and the assistant, without tool calls",
        )
    return role


def _text(message: ChatMessage, place: int) -> str:
    for block in message.blocks:
        if not isinstance(block, TextBlock):
            raise InputError(f"message {place} holds a {type(block).__name__}", "this model reads text")
    return message.content or ""


_END: Any = object()


async def _in_threads(items: Iterator[_T]) -> AsyncGenerator[_T, None]:
    """Pass on an iterator whose items take long; what is abandoned on the way is closed once nothing holds it."""
    while (item := await asyncio.to_thread(next, items, _END)) is not _END:
        yield item
