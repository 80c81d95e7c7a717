"""A LangChain chat model that reads memories: of what it searches for, of what messages refer to, of its history."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, Literal

from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models import LanguageModelInput
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, ChatMessage, HumanMessage, SystemMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from pydantic import ConfigDict, model_validator

from ctxdocs.checks import one_of
from ctxdocs.errors import InputError
from ctxdocs.generation import Generation, GenerationOptions
from ctxdocs.integrations.history import CompressedHistory
from ctxdocs.integrations.langchain.settings import LibrarySettings
from ctxdocs.integrations.langchain.structured import structured
from ctxdocs.integrations.reading import Request, source_of, stripped
from ctxdocs.integrations.settings import refuse
from ctxdocs.integrations.turns import turns_of

# What LangChain calls standard parameters and only means something to a model behind a network.
_OF_REMOTE_MODELS = {"api_key", "base_url", "max_retries", "streaming", "timeout"}

_ROLES: dict[str, type[BaseMessage]] = {"system": SystemMessage, "user": HumanMessage, "assistant": AIMessage}


class ChatCompressedMemory(LibrarySettings, BaseChatModel):
    """A library's language model as a chat model.

    Messages are put into the model's chat template, or, where it has none, its prompt format. Wherever a message refers
    to a memory (see :func:`~ctxdocs.integrations.langchain.format_memories`), the model reads the memory. With ``k``
    the library is searched for the last message too, unless that refers to memories itself.

    Parameters
    ----------
    library, k, retrieval, rerank, filter, blend, max_new_tokens, stop
    temperature, top_k, top_p, repetition_penalty, seed
        As in :class:`LibrarySettings`. All but ``library`` may be given for one call as well.
    history : {"text", "memory"}
        Whether earlier turns are read as their text, or compressed: a session reads each turn once and keeps its
        memory, also between calls that continue one another. Compressed turns do not hold the memories they refer to.

    Notes
    -----
    Messages of one role that follow one another are one turn. Tools are not supported. A call may be given
    ``response_format`` in OpenAI's shape, or a JSON schema as ``schema``; see also :meth:`with_structured_output`.
    """

    history: Literal["text", "memory"] = "text"

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _drop_parameters_of_remote_models(cls, values: Any) -> Any:
        return {name: value for name, value in values.items() if name not in _OF_REMOTE_MODELS}

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """Whether LangChain can write the object as JSON: no, as it reads back only chat models on a list of its own.

        ``asdict`` returns the parameters.
        """
        return False

    @property
    def _llm_type(self) -> str:
        return "ctxdocs-chat-compressed-memory"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        settings = self.model_dump(include={*LibrarySettings.model_fields, "history"})
        return {**settings, **self._state()}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> Any:
        return {"ls_model_type": "chat", **self._tracing(stop, kwargs)}

    @cached_property
    def _histories(self) -> CompressedHistory:
        return CompressedHistory(self._reader)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        request, options = self._request(messages, stop, kwargs)
        (result,) = self._reader.generate([request], options)
        message = AIMessage(
            content=result.text.strip(), usage_metadata=_usage(result), response_metadata=self._about(request, result)
        )
        return ChatResult(generations=[ChatGeneration(message=message)], llm_output={"model_name": self.model_name})

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        request, options = self._request(messages, stop, kwargs)
        pieces = stripped(self._reader.stream(request, options))
        while True:
            try:
                chunk = ChatGenerationChunk(message=AIMessageChunk(content=next(pieces)))
            except StopIteration as end:
                last = AIMessageChunk(
                    content="",
                    usage_metadata=_usage(end.value),
                    response_metadata=self._about(request, end.value),
                    chunk_position="last",
                )
                yield ChatGenerationChunk(message=last)
                return
            if run_manager:
                run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk

    def _request(
        self, messages: list[BaseMessage], stop: list[str] | None, kwargs: dict[str, Any]
    ) -> tuple[Request, GenerationOptions]:
        changes = dict(kwargs)
        for name in ("ls_structured_output_format", "stream_usage"):
            changes.pop(name, None)
        history = one_of("history", changes.pop("history", self.history), ("text", "memory"))
        search, share, options = self._search(changes), self._share(changes), self._options(stop, changes)
        refuse(changes)
        system, turns, question = turns_of(
            (_role(message, place), _text(message, place)) for place, message in enumerate(messages)
        )
        if history == "memory" and turns:
            request = self._histories.request(question, turns, system, search)
        else:
            request = self._reader.conversation(question, turns, system, search)
        return self._reader.blended(request, share), options

    def _about(self, request: Request, result: Generation) -> dict[str, Any]:
        return {
            "model_name": self.model_name,
            "finish_reason": result.finish_reason,
            "sources": [source_of(chunk) for chunk in request.sources],
        }

    def with_structured_output(
        self,
        schema: dict[str, Any] | type | None = None,
        *,
        method: str = "json_schema",
        include_raw: bool = False,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """Return a model that answers with objects of a schema.

        While an answer is written, tokens that do not fit the schema are masked. So the answer always has the form,
        unless it is cut off: give it enough ``max_tokens``. What the fields mean is not told: the prompt has to say it.
        Objects have no properties but those the schema names, unless it has ``additionalProperties``.

        Parameters
        ----------
        schema : dict or type, optional
            A pydantic class, a ``TypedDict`` class, a JSON schema or a function in OpenAI's shape; for ``"json_mode"``
            it may be left out.
        method : {"json_schema", "json_mode", "function_calling"}
            The answer is held to the schema in every case; without one it is any JSON object. The model calls no
            functions: the last is taken for the first, with a warning.
        include_raw : bool
            Whether to return a dict of ``raw`` (the message), ``parsed`` and ``parsing_error``.
        **kwargs
            More options of the calls; ``strict`` is accepted and changes nothing.

        Returns
        -------
        Runnable
            Answers with objects of a pydantic class, else with dicts, which are not validated again.

        Raises
        ------
        InputError
            If the method is unknown, or there is no schema; and when called, if the schema cannot be used.
        OutputParserException
            When called, if the answer was cut off.
        MissingDependency
            When called, if llguidance is not installed.
        """
        kwargs.pop("strict", None)
        return structured(self, schema, method, include_raw, kwargs)

    def get_token_ids(self, text: str) -> list[int]:
        """Return the ids of what the model reads of a text: its tokens, and -1 for every slot of a memory."""
        return self._reader.token_ids(text)


def _role(message: BaseMessage, place: int) -> str:
    if isinstance(message, ChatMessage):
        role = {"human": "user", "ai": "assistant"}.get(message.role, message.role)
        if role in _ROLES:
            return role
    for role, kind in _ROLES.items():
        if isinstance(message, kind):
            if getattr(message, "tool_calls", None):
                break
            return role
    raise InputError(
        f"message {place} is a {type(message).__name__} that this model does not read",
        "it reads messages of the system, the user and the assistant, without tool calls",
    )


def _text(message: BaseMessage, place: int) -> str:
    if isinstance(message.content, str):
        return message.content
    for block in message.content:
        if isinstance(block, dict) and block.get("type") != "text":
            raise InputError(f"message {place} holds a block of type {block.get('type')!r}", "this model reads text")
    return message.text


def _usage(result: Generation) -> UsageMetadata:
    read, written = result.prompt_tokens + result.memory_slots, len(result.ids)
    details: Any = {"memory_slots": result.memory_slots}
    return UsageMetadata(
        input_tokens=read, output_tokens=written, total_tokens=read + written, input_token_details=details
    )
