"""What the LangChain language models of this package are told alike."""

from __future__ import annotations

from typing import Any

from langchain_core.load.serializable import Serializable
from pydantic import ConfigDict

from ctxdocs.integrations import settings


class LibrarySettings(settings.LibrarySettings, Serializable):
    """Settings that LangChain can write and read, and tell its tracers.

    Parameters
    ----------
    library, k, retrieval, rerank, filter, blend, max_new_tokens, stop
    temperature, top_k, top_p, repetition_penalty, seed
        As in :class:`ctxdocs.integrations.settings.LibrarySettings`.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, populate_by_name=True)

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """Whether LangChain can write the object as JSON; the library is written as its path."""
        return True

    @property
    def lc_attributes(self) -> dict[str, Any]:
        """What is written in place of attributes that JSON cannot hold."""
        return {"library": str(self.library.path)}

    def _tracing(self, stop: list[str] | None, changes: dict[str, Any]) -> dict[str, Any]:
        """Return what LangChain's tracers are told of a call."""
        params: dict[str, Any] = {
            "ls_provider": "ctxdocs",
            "ls_model_name": changes.get("model", self.model_name),
            "ls_temperature": changes.get("temperature", self.temperature),
            "ls_max_tokens": changes.get("max_new_tokens", changes.get("max_tokens", self.max_new_tokens)),
        }
        return {**params, "ls_stop": stop} if stop else params

    def _state(self) -> dict[str, Any]:
        """Return what decides an answer besides the prompt and the settings: a cached answer must not outlive it."""
        store = self.library.store
        return {"fingerprint": store.manifest.fingerprint, "revision": store.revision()}
