"""What the language models of the adapters are told alike; pydantic, which the frameworks rest on, checks it."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator

from ctxdocs.compressors.blending import check_share
from ctxdocs.errors import InputError
from ctxdocs.generation import GenerationOptions
from ctxdocs.integrations.formats import schema_of
from ctxdocs.integrations.reading import LibraryReader
from ctxdocs.integrations.searching import Search
from ctxdocs.library import Library
from ctxdocs.sharing import shared_library

#: A library, or its folder's path; opened once in a process for all that name it.
LibraryField = Annotated[
    Library, BeforeValidator(shared_library), PlainSerializer(lambda library: str(library.path), return_type=str)
]

_SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")


class LibrarySettings(BaseModel):
    """A library, how it is searched, and its model's generation.

    Parameters
    ----------
    library : Library or str or path
        Where memories are, and the model that reads them. It is opened once for all objects that name it. One whose
        compressor or embedder was made in Python has to be opened there (``ctxdocs.Library.open``) and passed.
    k : int, optional
        Chunks to search for; None searches for nothing.
    retrieval, rerank, filter
        As in :class:`ctxdocs.integrations.searching.Search`.
    blend : float, optional
        Of so large a share of the tokens behind a prompt's memories keys and values are computed again, so that exact
        memories know of each other; see :meth:`ctxdocs.Library.blend`.
    max_new_tokens : int
        Upper bound of new tokens; ``max_tokens`` is another name for it.
    temperature, top_k, top_p, repetition_penalty, seed
        As in :class:`ctxdocs.generation.GenerationOptions`; greedy by default.
    stop : list of str, optional
        Strings that end an answer.

    Raises
    ------
    LibraryError
        If there is no library.
    InputError
        If a setting is out of range.
    """

    library: LibraryField
    k: int | None = None
    retrieval: str = "hybrid"
    rerank: str = "none"
    filter: dict[str, Any] | None = None
    blend: float | None = None
    max_new_tokens: int = Field(default=64, alias="max_tokens")
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: list[str] | None = None

    model_config = ConfigDict(arbitrary_types_allowed=True, populate_by_name=True)

    @model_validator(mode="after")
    def _check(self) -> LibrarySettings:
        self._options(None, {})
        self._search({})
        self._share({})
        return self

    @cached_property
    def _reader(self) -> LibraryReader:
        return LibraryReader(self.library)

    @property
    def model_name(self) -> str:
        """The name of the library's model, or where it has none the method."""
        compressor = self.library.store.manifest.compressor
        return str(compressor.get("name_or_path") or compressor["method"])

    def _options(self, stop: list[str] | None, changes: dict[str, Any]) -> GenerationOptions:
        """Return the options of a call: the object's, with the changes made for this call alone.

        Takes what it knows out of ``changes``; that is also ``schema``, a JSON schema, or ``response_format``.
        """
        schema, asked = changes.pop("schema", None), schema_of(changes.pop("response_format", None))
        if schema is not None and asked is not None:
            raise InputError("schema and response_format both say what is answered with", "give one of them")
        new_tokens = changes.pop("max_tokens", self.max_new_tokens)
        return GenerationOptions(
            max_new_tokens=changes.pop("max_new_tokens", new_tokens),
            stop=tuple(self.stop or () if stop is None else stop),
            schema=asked if schema is None else schema,
            **{name: changes.pop(name, getattr(self, name)) for name in _SAMPLING},
        )

    def _search(self, changes: dict[str, Any]) -> Search | None:
        """Return how the library is searched in a call; None if it is not."""
        k = changes.pop("k", self.k)
        how = {name: changes.pop(name, getattr(self, name)) for name in ("retrieval", "rerank", "filter")}
        return None if k is None else Search(k, **how)

    def _share(self, changes: dict[str, Any]) -> float | None:
        """Return of which share of tokens memories are computed again in a call; None if they are read as they are."""
        share = changes.pop("blend", self.blend)
        if share is not None:
            check_share(share)
        return share


def refuse(changes: dict[str, Any]) -> None:
    """Refuse keyword arguments of a call that nothing took."""
    if changes:
        raise InputError(
            f"unknown option {sorted(changes)[0]!r}",
            f"one of: k, retrieval, rerank, filter, blend, max_new_tokens, {', '.join(_SAMPLING)}, stop, schema, "
            "response_format",
        )
