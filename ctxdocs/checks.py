"""Settings and options as users give them: of the right type, or refused by name.

Python would take many a wrong one: True as a number, a word letter by letter, 2.5 as a bound that no count ever meets.
Ranges are checked where the settings are used.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterable, Sequence
from typing import Any, cast

from ctxdocs.errors import InputError


def whole_number(name: str, value: object) -> int:
    """Return ``value`` as an int; ``InputError`` unless it is one (or a NumPy integer)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise _wrong(name, "a whole number", value)
    return operator.index(value)


def whole_numbers(name: str, value: object) -> list[int]:
    """Return one whole number, or a sequence of them, as a list."""
    if not isinstance(value, Iterable) or isinstance(value, str | bytes):
        return [whole_number(name, value)]
    return [whole_number(f"each {name}", entry) for entry in value]


def number(name: str, value: object) -> float:
    """Return ``value``; ``InputError`` unless it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _wrong(name, "a number", value)
    return value


def true_or_false(name: str, value: object) -> bool:
    """Return ``value``; ``InputError`` unless it is True or False."""
    if not isinstance(value, bool):
        raise _wrong(name, "True or False", value)
    return value


def words(name: str, value: object) -> list[str]:
    """Return a sequence of strings as a list; one string is not taken letter by letter."""
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(entry, str) for entry in value):
        raise _wrong(name, "a list of words", value)
    return list(value)


def one_of(name: str, value: object, known: Sequence[str]) -> str:
    """Return ``value``; ``InputError`` unless it is one of the known words."""
    if not isinstance(value, str) or value not in known:
        raise InputError(f"unknown {name} {value!r}", f"one of: {', '.join(known)}")
    return value


def items(name: str, values: object) -> list[Any]:
    """Return what can be gone through as a list; ``InputError`` for the rest, and for a string."""
    if isinstance(values, str) or not hasattr(values, "__iter__"):
        raise InputError(f"{name} come in a list, got {type(values).__name__}")
    return list(cast(Iterable[Any], values))


def _wrong(name: str, wanted: str, value: object) -> InputError:
    return InputError(f"{name} must be {wanted}, got {value!r} ({type(value).__name__})")
