"""Answers of a LlamaIndex LLM with objects of a pydantic class: the model is held to the class's schema."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from typing import Any

from llama_index.core.llms import CustomLLM
from llama_index.core.program.utils import FlexibleModel
from llama_index.core.prompts import PromptTemplate
from llama_index.core.types import Model
from pydantic import BaseModel

from ctxdocs.integrations.formats import closed


class StructuredAnswers(CustomLLM):
    """What LlamaIndex's own ways to objects need of a language model that can be held to a ``schema``.

    LlamaIndex writes the schema into the prompt as well, and parses what comes.
    """

    def structured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """Answer a prompt with an object of a pydantic class, tokens that do not fit its schema being masked."""
        return super().structured_predict(output_cls, prompt, _held(llm_kwargs, output_cls), **prompt_args)

    async def astructured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """Like :meth:`structured_predict`, in a thread."""
        return await super().astructured_predict(output_cls, prompt, _held(llm_kwargs, output_cls), **prompt_args)

    def stream_structured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Generator[Model | FlexibleModel, None, None]:
        """Like :meth:`structured_predict`, as far as the object has come."""
        return super().stream_structured_predict(output_cls, prompt, _held(llm_kwargs, output_cls), **prompt_args)

    async def astream_structured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> AsyncGenerator[Model | FlexibleModel, None]:
        """Like :meth:`stream_structured_predict`, in a thread."""
        return await super().astream_structured_predict(
            output_cls, prompt, _held(llm_kwargs, output_cls), **prompt_args
        )


def _held(options: dict[str, Any] | None, output_cls: type[BaseModel]) -> dict[str, Any]:
    return {"schema": closed(output_cls.model_json_schema()), **(options or {})}
