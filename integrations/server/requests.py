"""Bodies of requests become questions and options, or are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ctxdocs.errors import CtxdocsError
from ctxdocs.generation import GenerationOptions
from ctxdocs.integrations.formats import schema_of
from ctxdocs.integrations.server.errors import RequestError
from ctxdocs.integrations.server.questions import Question, Reading
from ctxdocs.structure import checked_schema

if TYPE_CHECKING:
    from ctxdocs.integrations.server.schemas import ChatRequest, CompletionRequest, Message, Mode
    from ctxdocs.integrations.server.settings import Settings

_CHOICES = ("temperature", "top_p", "top_k", "repetition_penalty", "seed")
_LONGEST_STOPS = 16


def chat_question(body: ChatRequest, settings: Settings) -> Question:
    """Return what a conversation asks: its last message, behind the others.

    Raises
    ------
    RequestError
        If the messages are not what the model's chat format can write.
    """
    _refuse(body, tools=body.tools, functions=body.functions, top_logprobs=body.top_logprobs)
    messages = body.messages
    if not messages:
        raise _wrong("messages", "there are no messages; send at least one of role 'user'")
    for index, message in enumerate(messages):
        if message.tool_calls:
            raise _unsupported(f"messages[{index}].tool_calls", "the model calls no tools")
        if not message.text.strip() and message.role != "assistant":
            raise _wrong(f"messages[{index}].content", f"message {index} is empty")
    system: list[str] = []
    while messages and messages[0].role in ("system", "developer"):
        system.append(messages[0].text)
        messages = messages[1:]
    _check_order(messages, len(system))
    texts = [message.text for message in messages]
    return Question(
        text=texts[-1],
        reading=reading(body, settings),
        turns=tuple(zip(texts[:-1:2], texts[1::2], strict=True)),
        system="\n\n".join(system),
    )


def _check_order(messages: list[Message], skipped: int) -> None:
    """Have users and the assistant take turns, a user last."""
    for index, message in enumerate(messages):
        expected = ("user", "assistant")[index % 2]
        if message.role != expected:
            what = "behind the first messages" if message.role in ("system", "developer") else "out of turn"
            raise _wrong(
                f"messages[{index + skipped}].role",
                f"message {index + skipped} is of role {message.role!r} {what}; expected {expected!r}: system "
                "messages stand at the beginning, then user and assistant take turns",
            )
    if len(messages) % 2 == 0:
        raise _wrong("messages", "the last message must be of role 'user'")


def text_questions(body: CompletionRequest, settings: Settings) -> list[Question]:
    """Return the questions of a request for completions, one for every prompt."""
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    _refuse(body, echo=body.echo, suffix=body.suffix, best_of=body.best_of not in (None, 1))
    if not prompts:
        raise _wrong("prompt", "there is no prompt")
    if len(prompts) > settings.max_prompts:
        raise _wrong("prompt", f"{len(prompts)} prompts; at most {settings.max_prompts} go into a request")
    if any(not prompt.strip() for prompt in prompts):
        raise _wrong("prompt", "a prompt is empty")
    how = reading(body, settings)
    return [Question(prompt, how, "text") for prompt in prompts]


def reading(body: Any, settings: Settings) -> Reading:
    """Return what is read of the library."""
    if body.k > settings.max_sources:
        raise _wrong("k", f"k is {body.k}; at most {settings.max_sources} chunks are read for a question")
    mode: Mode = getattr(body, "mode", "memory")
    blend = getattr(body, "blend", None)
    if blend is not None and mode != "memory":
        raise _wrong("blend", f"blend is for memories, and mode {mode!r} reads none")
    return Reading(mode, body.k, body.retrieval, body.rerank, blend)


def generation_options(body: ChatRequest | CompletionRequest, settings: Settings) -> GenerationOptions:
    """Return how an answer is written."""
    _refuse(
        body,
        n=body.n not in (None, 1),
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        logit_bias=body.logit_bias,
        logprobs=body.logprobs,
    )
    asked = getattr(body, "max_completion_tokens", None) or body.max_tokens
    if asked is not None and asked > settings.max_new_tokens:
        raise _wrong("max_tokens", f"max_tokens is {asked}; this server writes at most {settings.max_new_tokens}")
    limit = asked or min(settings.default_new_tokens, settings.max_new_tokens)
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stop) > _LONGEST_STOPS:
        raise _wrong("stop", f"{len(stop)} stop strings; at most {_LONGEST_STOPS} are looked for")
    chosen = {name: value for name in _CHOICES if (value := getattr(body, name)) is not None}
    return GenerationOptions(max_new_tokens=limit, stop=tuple(stop), schema=_schema(body), **chosen)


def _schema(body: ChatRequest | CompletionRequest) -> Mapping[str, Any] | None:
    """Return the JSON schema that an answer keeps to, which is known to be usable."""
    try:
        schema = schema_of(getattr(body, "response_format", None))
        if schema is not None:
            checked_schema(schema)
    except CtxdocsError as error:
        raise _wrong("response_format", str(error)) from error
    return schema


def _refuse(body: Any, **fields: Any) -> None:
    """Refuse fields of OpenAI's API that would change the answer, and that are not understood here."""
    for name, value in fields.items():
        if value:
            raise _unsupported(name, "leave it out")


def _unsupported(param: str, what: str) -> RequestError:
    return RequestError(400, f"{param} is not supported here: {what}", "unsupported_value", param)


def _wrong(param: str, message: str) -> RequestError:
    return RequestError(400, message, "invalid_value", param)
