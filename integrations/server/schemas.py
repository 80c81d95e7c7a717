"""What clients may send, as OpenAI's API has it, with ctxdocs' own fields beside."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Mode = Literal["memory", "text", "none"]
Retrieval = Literal["hybrid", "dense", "lexical"]
Rerank = Literal["none", "likelihood"]


# Of fields that would change an answer in a way that is not understood here.
_NOTHING = "Refused, unless it is nothing."


def _encodable(text: str) -> str:
    """Refuse half a character, which JSON can write and nothing else can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"a lone surrogate at character {error.start} is no text") from error
    return text


Text = Annotated[str, AfterValidator(_encodable)]


class _Body(BaseModel):
    # A field that is misspelled is refused, and not passed over.
    model_config = ConfigDict(extra="forbid", strict=False)


class _Reading(_Body):
    mode: Mode = Field("memory", description="Read the chunks' memories, their raw text, or nothing.")
    k: Annotated[int, Field(ge=1, description="Chunks to read.")] = 4
    retrieval: Retrieval = "hybrid"
    rerank: Rerank = "none"
    blend: float | None = Field(None, ge=0, le=1, description="Share of tokens computed again in exact memories.")


class StreamOptions(_Body):
    """What a stream holds besides text."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class _Generation(_Reading):
    model: Text
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=10, description="0, the default, takes the likeliest token.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    repetition_penalty: float | None = Field(None, gt=0)
    seed: int | None = Field(None, description="Of the draws; such an answer is written alone.", ge=-(2**63), lt=2**63)
    stop: Text | list[Text] | None = Field(None, description="Beside what ends a turn of the model.")
    n: int | None = Field(None, description="1 or nothing.")
    frequency_penalty: float | None = Field(None, description=_NOTHING)
    presence_penalty: float | None = Field(None, description=_NOTHING)
    logit_bias: dict[str, float] | None = Field(None, description=_NOTHING)
    logprobs: bool | int | None = Field(None, description=_NOTHING)
    user: str | None = Field(None, description="Passed over.")

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with what it took."""
        return self.stream_options is not None and self.stream_options.include_usage


class TextPart(_Body):
    """A stretch of a message's text."""

    type: Literal["text"]
    text: Text


class Message(_Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: str | None = None
    # What assistants' messages of OpenAI hold besides; only nothing is understood.
    refusal: None = None
    tool_calls: list[Any] | None = None
    function_call: None = None
    audio: None = None
    annotations: list[Any] | None = None

    @property
    def text(self) -> str:
        """The message's text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(_Generation):
    """Body of ``/v1/chat/completions``."""

    messages: list[Message]
    max_completion_tokens: int | None = Field(None, ge=1)
    response_format: dict[str, Any] | None = Field(None, description="Of type text, json_object or json_schema.")
    tools: list[Any] | None = Field(None, description=_NOTHING)
    tool_choice: Any = Field(None, description="Passed over.")
    functions: list[Any] | None = Field(None, description=_NOTHING)
    parallel_tool_calls: bool | None = Field(None, description="Passed over.")
    top_logprobs: int | None = Field(None, description=_NOTHING)
    metadata: dict[str, Any] | None = Field(None, description="Passed over.")
    store: bool | None = Field(None, description="Passed over.")
    service_tier: str | None = Field(None, description="Passed over.")


class CompletionRequest(_Generation):
    """Body of ``/v1/completions``."""

    prompt: Text | list[Text]
    best_of: int | None = Field(None, description="1 or nothing.")
    echo: bool = Field(False, description=_NOTHING)
    suffix: str | None = Field(None, description=_NOTHING)


class EmbeddingRequest(_Body):
    """Body of ``/v1/embeddings``."""

    model: Text
    input: Text | list[Text]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None
    input_type: Literal["document", "query"] = Field("document", description="What the texts are: found, or asked.")


class SearchRequest(_Body):
    """Body of ``/v1/search``."""

    query: Text
    k: Annotated[int, Field(ge=1)] = 4
    retrieval: Retrieval = "hybrid"
    rerank: Rerank = "none"
