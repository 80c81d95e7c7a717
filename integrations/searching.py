"""How a library is searched for a question, by whichever adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

from ctxdocs.checks import one_of, whole_number
from ctxdocs.errors import InputError
from ctxdocs.library import Rerank, Retrieval

if TYPE_CHECKING:
    from ctxdocs.answers import Hit
    from ctxdocs.library import Library


@dataclass(frozen=True)
class Search:
    """How a library is searched for a question.

    Parameters
    ----------
    k, retrieval, rerank
        As in :meth:`ctxdocs.Library.search`.
    filter : mapping or callable, optional
        What must be so of a document: values by the names of its metadata, or ``source`` for its uri. A list stands
        for any of its values. Or a function that takes a document's metadata, ``source`` among them, and says whether
        to search it.

    Raises
    ------
    InputError
        If a choice is unknown, or ``k`` is below 1.
    """

    k: int
    retrieval: str = "hybrid"
    rerank: str = "none"
    filter: Mapping[str, Any] | Callable[[Mapping[str, Any]], bool] | None = None

    def __post_init__(self) -> None:
        if self.filter is not None and not isinstance(self.filter, Mapping) and not callable(self.filter):
            raise InputError(f"filter must be a dict of metadata, got {type(self.filter).__name__}")
        if whole_number("k", self.k) < 1:
            raise InputError(f"k must be at least 1, got {self.k}")
        one_of("retrieval", self.retrieval, get_args(Retrieval))
        one_of("rerank", self.rerank, get_args(Rerank))

    def found(self, library: Library, queries: Sequence[str]) -> list[list[Hit]]:
        """Return what a library holds about each query."""
        documents = None if self.filter is None else _documents(library, self.filter)
        how: dict[str, Any] = {"retrieval": self.retrieval, "rerank": self.rerank, "documents": documents}
        return library.search_many(queries, self.k, **how)


def _documents(library: Library, wanted: Mapping[str, Any] | Callable[[Mapping[str, Any]], bool]) -> list[str]:
    """Return the uris of the documents with certain metadata."""
    accepts = wanted if callable(wanted) else partial(_has_values, wanted)
    return [
        document.uri for document in library.store.documents() if accepts({**document.metadata, "source": document.uri})
    ]


def _has_values(wanted: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    return all(name in values and _is_one_of(values[name], value) for name, value in wanted.items())


def _is_one_of(value: Any, wanted: Any) -> bool:
    return value in wanted if isinstance(wanted, list | tuple | set) else value == wanted
