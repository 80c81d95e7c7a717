"""How JSON that is being written comes to its end while there are tokens left.

A grammar says what may follow, and not what leads to the end: a model at a loss writes on in a string, a list, a
number. Of the tokens that may follow, those that close something, or else open as little as possible, end any value
that the grammar lets end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: A bit for every token, eight to a byte, the lowest first: uint8 ``[vocabulary / 8]``.
Bits = NDArray[np.uint8]

# Ends are not looked for beyond this many tokens: behind a pattern, say, that wants certain letters in front.
_FARTHEST = 2048


@dataclass
class Place:
    """Where in a JSON text one is.

    Parameters
    ----------
    in_string : bool
        Behind a quotation mark that opens a string, and in front of the one that closes it.
    is_escaped : bool
        Right behind a backslash.
    """

    in_string: bool = False
    is_escaped: bool = False

    def pass_by(self, text: bytes) -> None:
        """Go on behind more of the text."""
        for character in text:
            if self.is_escaped:
                self.is_escaped = False
            elif character == ord('"'):
                self.in_string = not self.in_string
            else:
                self.is_escaped = self.in_string and character == ord("\\")


class Endings:
    """A vocabulary's tokens, by how much nearer they bring the end of a JSON value.

    Parameters
    ----------
    tokens : llguidance.LLTokenizer
        The vocabulary.
    eos_token_ids : set of int
        Tokens that end a value.
    """

    def __init__(self, tokens: Any, eos_token_ids: set[int]) -> None:
        self._text_of = lambda token: tokens.decode_bytes([token])
        texts = [self._text_of(token) for token in range(tokens.vocab_size)]

        def kind(has: Callable[[bytes], bool]) -> Bits:
            return np.packbits([has(text) for text in texts], bitorder="little")

        ends = np.packbits([token in eos_token_ids for token in range(len(texts))], bitorder="little")
        quotes, brackets = kind(b'"'.__eq__), kind((b"}", b"]").__contains__)
        commas = kind(lambda text: text.strip() == b",")  # only where nothing may be closed yet
        scalars = kind(lambda text: text[:1].isdigit() or text[:1] in (b"-", b"t", b"f", b"n"))
        self._kinds = {True: [quotes], False: [ends, brackets, quotes, commas, scalars]}

    def nearest(self, allowed: Bits, place: Place) -> Bits:
        """Return which of the tokens that may follow bring the end nearest."""
        for kind in self._kinds[place.in_string]:
            width = min(len(kind), len(allowed))
            if (both := allowed[:width] & kind[:width]).any():
                return both
        return allowed

    def way_to_end(self, matcher: Any, place: Place) -> list[int] | None:
        """Return the tokens that lead to a value's end, the nearest ones; None if they lead to none.

        Parameters
        ----------
        matcher : llguidance.LLMatcher
            What has been written of the value; it stays as it is.
        place : Place
            Where that ends.
        """
        matcher, place = matcher.deep_copy(), replace(place)
        way: list[int] = []
        while not matcher.is_stopped():
            allowed = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
            token = int(np.unpackbits(self.nearest(allowed, place), bitorder="little").argmax())
            if len(way) == _FARTHEST or not matcher.consume_token(token):  # nothing may follow
                return None
            way.append(token)
            place.pass_by(self._text_of(token))
        return way


class Closing:
    """Sees to it that a value is whole before its tokens are used up, where they are enough for one.

    At first everything is allowed that the grammar allows; then what brings the end nearer; at last, where the tokens
    just suffice, one way to the end.

    Parameters
    ----------
    endings : Endings
        Of the vocabulary.
    """

    def __init__(self, endings: Endings) -> None:
        self._endings = endings
        self._place = Place()
        self._half: int | None = None
        self._look_below: float = float("inf")
        self._has_begun = False
        self._way: list[int] = []

    def add(self, text: bytes) -> None:
        """Note what was written."""
        self._place.pass_by(text)

    def narrowed(self, allowed: Bits, matcher: Any, room: int) -> Bits:
        """Return which of the allowed tokens may be written with so many left, this one included."""
        self._half = room // 2 if self._half is None else self._half
        if not self._way and room < self._look_below:
            self._look(matcher, room, self._half)
        if self._way:
            only = np.zeros_like(allowed)
            token = self._way.pop(0)
            only[token // 8] = 1 << token % 8
            return only
        return self._endings.nearest(allowed, self._place) if self._has_begun else allowed

    def _look(self, matcher: Any, room: int, half: int) -> None:
        """Look for the way to the end. It gets longer as things are opened: look again, sooner as room gets short."""
        way = self._endings.way_to_end(matcher, self._place)
        if way is not None and len(way) >= room - 1:
            self._way = way
            return
        # A model takes longer keys and numbers than the shortest; where no end is in sight, it gets half the room.
        needed = half if way is None else len(way) + 2 + len(way) // 4
        self._has_begun = self._has_begun or needed >= room
        least = needed if way is None or not self._has_begun else len(way)
        self._look_below = room - max(room - least, 0) // 2
