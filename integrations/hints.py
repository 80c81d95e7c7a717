"""A hint to who copies the text of chunks into a prompt, where their memories could be read."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from ctxdocs.library import Library

logger = logging.getLogger(__name__)

# What was found of late. Shorter texts may stand in a prompt by chance.
_KEPT = 64
_SHORTEST = 32

_found: WeakKeyDictionary[Library, deque[str]] = WeakKeyDictionary()
_told: WeakKeyDictionary[Library, bool] = WeakKeyDictionary()


def note_found(library: Library, texts: Iterable[str]) -> None:
    """Note the texts of chunks that a search found."""
    _found.setdefault(library, deque(maxlen=_KEPT)).extend(text for text in texts if len(text) >= _SHORTEST)


def look_for_copies(library: Library, prompt: str) -> None:
    """Say in the log, once for a library, that a prompt holds the text of a chunk that was found."""
    texts = list(_found.get(library, ()))
    if library not in _told and any(text in prompt for text in texts):
        _told[library] = True
        logger.warning(
            "a prompt holds the text of chunks that have memories, and it is read as text. To read the memories, put "
            "format_memories behind the retriever, or give it content='memory' (said once)"
        )
