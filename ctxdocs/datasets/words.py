"""Words of a text: runs of letters and digits, in lower case."""

from __future__ import annotations

import re

_WORD = re.compile(r"\w+")


def words_of(text: str) -> list[str]:
    """Return the words of a text."""
    return _WORD.findall(_lower(text))


def word_spans(text: str) -> list[tuple[int, int]]:
    """Return where the words of :func:`words_of` begin and end."""
    return [match.span() for match in _WORD.finditer(_lower(text))]


def _lower(text: str) -> str:
    """Lower a text without changing its length: a dotted capital I would become two characters."""
    lowered = text.lower()
    if len(lowered) == len(text):
        return lowered
    return "".join(low if len(low := character.lower()) == 1 else character for character in text)
