"""A LangChain LLM that reads memories: of what it searches for itself, or of what a prompt refers to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models.llms import BaseLLM
from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from pydantic import ConfigDict

from ctxdocs.checks import one_of
from ctxdocs.generation import Generation as Generated
from ctxdocs.generation import GenerationOptions
from ctxdocs.integrations.langchain.settings import LibrarySettings
from ctxdocs.integrations.reading import Request, source_of, stripped
from ctxdocs.integrations.settings import refuse


class CompressedMemoryLLM(LibrarySettings, BaseLLM):
    """A library's language model, reading memories.

    With ``k`` a prompt is a question: the library is searched for it, and the model reads what was found as memories,
    in its own prompt format, as :meth:`ctxdocs.Library.ask` does. A prompt that refers to memories (what
    ``retriever | format_memories`` puts into a template) is read as it stands, every reference replaced by its memory
    at that place. Without ``k`` every prompt is.

    Parameters
    ----------
    library, k, retrieval, rerank, filter, blend, max_new_tokens, stop
    temperature, top_k, top_p, repetition_penalty, seed
        As in :class:`LibrarySettings`. All but ``library`` may be given for one call as well.
    framing : {"none", "turn"}
        Whether a prompt that is read as it stands is all the model sees, or is put as one turn into the model's chat
        template (or, where it has none, its prompt format).

    Examples
    --------
    >>> CompressedMemoryLLM(library="./lib", k=4).invoke("When was the lighthouse built?")  # doctest: +SKIP
    '1874'
    """

    framing: Literal["none", "turn"] = "none"

    model_config = ConfigDict(extra="forbid")

    @property
    def _llm_type(self) -> str:
        return "ctxdocs-compressed-memory"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        settings = self.model_dump(include={*LibrarySettings.model_fields, "framing"})
        return {**settings, **self._state()}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> Any:
        return {"ls_model_type": "llm", **self._tracing(stop, kwargs)}

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        requests, options = self._requests(prompts, stop, kwargs)
        results = self._reader.generate(requests, options)
        usage = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0, "memory_slots": 0}
        generations = []
        for request, result in zip(requests, results, strict=True):
            text = result.text if request.is_raw else result.text.strip()
            info = _info(request, result)
            for name in usage:
                usage[name] += info["usage"][name]
            generations.append([Generation(text=text, generation_info=info)])
        return LLMResult(
            generations=generations,  # type: ignore[arg-type]
            llm_output={"token_usage": usage, "model_name": self.model_name},
        )

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        (request,), options = self._requests([prompt], stop, kwargs)
        pieces = self._reader.stream(request, options)
        if not request.is_raw:
            pieces = stripped(pieces)
        while True:
            try:
                chunk = GenerationChunk(text=next(pieces))
            except StopIteration as end:
                yield GenerationChunk(text="", generation_info=_info(request, end.value))
                return
            if run_manager:
                run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk

    def _requests(
        self, prompts: list[str], stop: list[str] | None, kwargs: dict[str, Any]
    ) -> tuple[list[Request], GenerationOptions]:
        changes = dict(kwargs)
        framing = one_of("framing", changes.pop("framing", self.framing), ("none", "turn"))
        search, share, options = self._search(changes), self._share(changes), self._options(stop, changes)
        refuse(changes)
        requests = self._reader.requests(prompts, search, framing)
        return [self._reader.blended(request, share) for request in requests], options

    def get_token_ids(self, text: str) -> list[int]:
        """Return the ids of what the model reads of a text: its tokens, and -1 for every slot of a memory."""
        return self._reader.token_ids(text)


def _info(request: Request, result: Generated) -> dict[str, Any]:
    """Return what is known of an answer besides its text; all of it JSON-able."""
    read = result.prompt_tokens + result.memory_slots
    return {
        "finish_reason": result.finish_reason,
        "sources": [source_of(chunk) for chunk in request.sources],
        "usage": {
            "input_tokens": read,
            "output_tokens": len(result.ids),
            "total_tokens": read + len(result.ids),
            "memory_slots": result.memory_slots,
        },
    }
