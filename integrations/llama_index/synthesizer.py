"""A LlamaIndex response synthesizer that has nodes read as memories."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_index.core.callbacks import CallbackManager
from llama_index.core.prompts.mixin import PromptDictType
from llama_index.core.response_synthesizers import BaseSynthesizer
from llama_index.core.types import RESPONSE_TEXT_TYPE

from ctxdocs.errors import InputError
from ctxdocs.integrations.llama_index.llm import CompressedMemoryLLM
from ctxdocs.library import Library
from ctxdocs.sharing import shared_library


class CompressedMemorySynthesizer(BaseSynthesizer):
    """Answers a query from nodes, all of them read as memories in one prompt of the model's own format.

    Nodes that have a memory (of the retriever or the postprocessor of this package) bring it along. All others, such as
    the answers of a sub-question engine, are compressed on the way, and not kept.

    Parameters
    ----------
    library : Library or str or path, optional
        Where memories are, and the model that reads them.
    llm : CompressedMemoryLLM, optional
        The model with its settings, in place of ``library``.
    streaming : bool
        Whether to answer piece by piece.
    callback_manager : CallbackManager, optional
        LlamaIndex's.
    empty_response : str, optional
        What is answered if there are no nodes.
    **options
        Other parameters of :class:`~ctxdocs.integrations.llama_index.CompressedMemoryLLM`.

    Raises
    ------
    InputError
        If the model is one that reads no memories, or there is none, or both are given.
    LibraryError
        If there is no library.
    """

    def __init__(
        self,
        library: Library | str | Path | None = None,
        llm: CompressedMemoryLLM | None = None,
        *,
        streaming: bool = False,
        callback_manager: CallbackManager | None = None,
        empty_response: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            llm=reading_llm(library, llm, options),
            streaming=streaming,
            callback_manager=callback_manager,
            empty_response=empty_response,
        )

    def get_response(self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any) -> RESPONSE_TEXT_TYPE:
        """Answer a query from what nodes have for a language model to read."""
        told: Any = {"formatted": True, "contents": list(text_chunks), **response_kwargs}
        if not self._streaming:
            return self._llm.complete(query_str, **told).text
        responses = self._llm.stream_complete(query_str, **told)
        return (response.delta or "" for response in responses)

    async def aget_response(
        self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any
    ) -> RESPONSE_TEXT_TYPE:
        """Like :meth:`get_response`, in a thread."""
        told: Any = {"formatted": True, "contents": list(text_chunks), **response_kwargs}
        if not self._streaming:
            return (await self._llm.acomplete(query_str, **told)).text
        responses = await self._llm.astream_complete(query_str, **told)
        return (response.delta or "" async for response in responses)

    def _get_prompts(self) -> PromptDictType:
        return {}  # the model's own format is the prompt

    def _update_prompts(self, prompts: PromptDictType) -> None:
        pass


def reading_llm(
    library: Library | str | Path | None, llm: CompressedMemoryLLM | None, options: dict[str, Any]
) -> CompressedMemoryLLM:
    """Return a language model that was given, or one of a library."""
    if llm is None:
        if library is None:
            raise InputError("there is neither a library nor a language model", "give one of them")
        return CompressedMemoryLLM(library=shared_library(library), **options)
    if not isinstance(llm, CompressedMemoryLLM):
        raise InputError(f"a {type(llm).__name__} reads no memories", "give a CompressedMemoryLLM, or a library")
    if library is not None or options:
        raise InputError(
            "a language model brings its library and its settings with it", "give those to the CompressedMemoryLLM"
        )
    return llm
