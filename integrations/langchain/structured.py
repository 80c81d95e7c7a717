"""What makes a chat model answer with objects of a schema: it is held to the schema, and its answer is parsed."""

from __future__ import annotations

import warnings
from collections.abc import AsyncIterator, Iterator, Mapping
from operator import itemgetter
from typing import Any

from langchain_core.exceptions import OutputParserException
from langchain_core.language_models import LanguageModelInput
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import BaseMessage
from langchain_core.output_parsers import BaseOutputParser, JsonOutputParser, PydanticOutputParser
from langchain_core.runnables import Runnable, RunnableGenerator, RunnableMap, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_json_schema
from langchain_core.utils.pydantic import is_basemodel_subclass

from ctxdocs.checks import one_of
from ctxdocs.errors import InputError
from ctxdocs.integrations.formats import ANY_OBJECT, closed

_METHODS = ("json_schema", "json_mode", "function_calling")


def structured(
    model: BaseChatModel, schema: Any, method: str, include_raw: bool, options: Mapping[str, Any]
) -> Runnable[LanguageModelInput, Any]:
    """Return a chain of a chat model and a parser; see ``ChatCompressedMemory.with_structured_output``."""
    one_of("method", method, _METHODS)
    if method == "function_calling":
        warnings.warn("this model calls no functions; method='json_schema' is used instead", stacklevel=3)
        method = "json_schema"
    if schema is None and method == "json_schema":
        raise InputError("there is no schema", "give one, or use method='json_mode' for any JSON object")
    is_class = isinstance(schema, type) and is_basemodel_subclass(schema)
    asked = {"kwargs": {"method": method}, "schema": schema or dict(ANY_OBJECT)}
    bound = model.bind(schema=_json_schema(schema), ls_structured_output_format=asked, **options)
    reader: BaseOutputParser[Any] = PydanticOutputParser(pydantic_object=schema) if is_class else JsonOutputParser()
    parser = RunnableGenerator(_whole, _awhole) | reader
    if not include_raw:
        return bound | parser
    parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
    not_parsed = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=bound) | parsed.with_fallbacks([not_parsed], exception_key="parsing_error")


def _whole(messages: Iterator[BaseMessage]) -> Iterator[BaseMessage]:
    """Pass on messages, or their pieces; LangChain's parsers would take JSON that is cut off for an answer."""
    for message in messages:
        _check_whole(message)
        yield message


async def _awhole(messages: AsyncIterator[BaseMessage]) -> AsyncIterator[BaseMessage]:
    async for message in messages:
        _check_whole(message)
        yield message


def _check_whole(message: BaseMessage) -> None:
    if message.response_metadata.get("finish_reason") == "length":
        raise OutputParserException("the answer was cut off before it was whole; give it more max_tokens", message.text)


def _json_schema(schema: Any) -> Mapping[str, Any]:
    if schema is None:
        return ANY_OBJECT
    if isinstance(schema, Mapping) and not schema.keys() & {"function", "parameters", "input_schema"}:
        return closed(schema)
    if hasattr(schema, "model_json_schema"):  # LangChain's own conversion cannot write one that refers to itself
        return closed(schema.model_json_schema())
    return closed(convert_to_json_schema(schema))
