"""The model in the hands of somebody else than its thread: work is cut small, and done between tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ctxdocs.library import Library

if TYPE_CHECKING:
    import numpy as np

    from ctxdocs.integrations.server.batching import Engine
    from ctxdocs.memory import Memory

# Chunks that are compressed or embedded in one go: answers in progress wait that long.
_CHUNKS = 8


class Borrowed:
    """A compressor and an embedder for adding documents, each as far as that needs.

    Parameters
    ----------
    engine : Engine
        The thread that has both.
    on_chunks : callable
        Called with the chunks' texts whenever some have been compressed; what it raises ends the work.
    """

    def __init__(self, engine: Engine, on_chunks: Callable[[Sequence[str]], None]) -> None:
        self._engine = engine
        self._on_chunks = on_chunks
        self._texts: list[str] = []
        # A tokenizer changes while it is used, and the model's thread uses its own.
        self.tokenizer = copy.deepcopy(engine.library.compressor.tokenizer)

    def embed_documents(self, texts: Sequence[str]) -> np.ndarray:
        """Embed chunks, as the library's embedder does."""
        import numpy as np

        self._texts = list(texts)
        embedder = self._engine.library.embedder
        parts = [self._engine.lend(partial(embedder.embed_documents, some)) for some in _cut(self._texts)]
        return np.concatenate([part.result() for part in parts])

    def compress_ids(self, documents: Sequence[Any]) -> list[Memory]:
        """Compress the chunks that were embedded before, as the library's compressor does."""
        compressor = self._engine.library.compressor
        memories: list[Memory] = []
        for some in _cut(documents):
            memories += self._engine.lend(partial(compressor.compress_ids, some)).result()
            self._on_chunks(self._texts[len(memories) - len(some) : len(memories)])
        return memories

    def library(self) -> Library:
        """Return the library, for adding documents with these."""
        these: Any = self
        return Library(self._engine.library.store, lambda: these, lambda: these)


def _cut(values: Sequence[Any]) -> list[Sequence[Any]]:
    return [values[start : start + _CHUNKS] for start in range(0, len(values), _CHUNKS)]
