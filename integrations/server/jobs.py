"""An answer on its way: asked for in the event loop, written in the model's thread."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ctxdocs.integrations.server.errors import RequestError

if TYPE_CHECKING:
    from ctxdocs.answers import Hit
    from ctxdocs.generation import Generation, GenerationOptions
    from ctxdocs.integrations.server.questions import Question


@dataclass
class Written:
    """An answer, whole or as far as it came.

    Parameters
    ----------
    text : str
        What was written.
    sources : list of Hit
        What was read, in this order.
    prompt_tokens, memory_slots, completion_tokens : int
        Text tokens and memory slots of the prompt, and tokens of the answer.
    finish_reason : {"stop", "length"}
        Why it ended.
    waited, time_to_first_token, seconds : float
        From the request's arrival to when the model took it up, to the first token, and to the last.
    """

    text: str = ""
    sources: list[Hit] = field(default_factory=list)
    prompt_tokens: int = 0
    memory_slots: int = 0
    completion_tokens: int = 0
    finish_reason: str = "length"
    waited: float = 0.0
    time_to_first_token: float = 0.0
    seconds: float = 0.0


class Job:
    """A question that waits for its answer, is being answered, or has been.

    Parameters
    ----------
    question : Question
        What is asked.
    options : GenerationOptions
        How to choose tokens and when to stop.
    seconds : float
        How long the answer may take from now on.
    delivery : {"pieces", "whole"}
        Whether text is wanted as it is decided.

    Attributes
    ----------
    written : Written
        The answer; whole once :meth:`pieces` has ended.
    is_wanted : bool
        Whether anybody still waits for it.
    """

    def __init__(
        self,
        question: Question,
        options: GenerationOptions,
        seconds: float,
        delivery: Literal["pieces", "whole"] = "whole",
    ) -> None:
        self.question = question
        self.options = options
        self.delivery = delivery
        self.written = Written()
        self.is_wanted = True
        self.arrived = time.perf_counter()
        self._deadline = self.arrived + seconds
        self.seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[str | BaseException | None] = asyncio.Queue()
        self._first: list[str | None] = []
        self._begun = question.form == "text"
        self._held = ""

    # In the event loop.

    async def started(self) -> None:
        """Wait until the first text is there, or the end.

        Raises
        ------
        RequestError
            If the answer cannot be given, or takes too long.
        """
        if not self._first:
            self._first.append(await self._next())

    async def pieces(self) -> AsyncIterator[str]:
        """Yield the answer's text as it comes; see :meth:`started` for errors."""
        await self.started()
        event = self._first[0]
        while event is not None:
            yield event
            event = await self._next()

    async def whole(self) -> Written:
        """Return the answer when it is there; see :meth:`started` for errors."""
        async for _ in self.pieces():
            pass
        return self.written

    def cancel(self) -> None:
        """Give the answer up: the model stops writing it."""
        self.is_wanted = False

    async def _next(self) -> str | None:
        try:
            event = await asyncio.wait_for(self._events.get(), max(self._deadline - time.perf_counter(), 0.001))
        except asyncio.TimeoutError:
            self.cancel()
            raise RequestError(
                504, f"the answer took longer than {self.seconds:g} s", "timeout", headers={"Retry-After": "5"}
            ) from None
        if isinstance(event, BaseException):
            raise event
        return event

    # In the model's thread.

    def take_up(self, sources: list[Hit], now: float) -> None:
        """Note that the model reads the question now, with these chunks."""
        self.written.sources = sources
        self.written.waited = now - self.arrived

    def add(self, piece: str, result: Generation, now: float) -> None:
        """Pass on text, with what has been generated so far."""
        written = self.written
        if not written.time_to_first_token:
            written.time_to_first_token = now - self.arrived
        written.seconds = now - self.arrived
        written.prompt_tokens, written.memory_slots = result.prompt_tokens, result.memory_slots
        written.completion_tokens, written.finish_reason = len(result.ids), result.finish_reason
        if piece := self._stripped(piece):
            written.text += piece
            if self.delivery == "pieces":
                self._tell(piece)

    def finish(self, error: BaseException | None = None) -> None:
        """End the answer, well or not."""
        self._tell(error)

    def _stripped(self, piece: str) -> str:
        """Leave out the white space around an answer; a prompt's continuation keeps it."""
        if self.question.form == "text":
            return piece
        piece = self._held + (piece if self._begun else piece.lstrip())
        kept = piece.rstrip()
        self._held = piece[len(kept) :] if kept or self._begun else ""
        self._begun = self._begun or bool(kept)
        return kept

    def _tell(self, event: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop is closed: nobody waits
            self.is_wanted = False
