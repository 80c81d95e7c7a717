"""What a library gives back: the chunks a search found, and an answer with what it was read from."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from ctxdocs.cache import StoredChunk
    from ctxdocs.generation import Generation

Mode: TypeAlias = Literal["memory", "text", "none"]


@dataclass(frozen=True)
class Hit:
    """A chunk that a search found.

    Parameters
    ----------
    document : str
        Uri of its document.
    chunk : int
        Its place in the document, from 0.
    score : float
        Higher is better; comparable within one search only.
    text : str
        The chunk's text.
    slots, tokens : int
        Memory slots that stand for it, and tokens of its text.
    start, end : int
        Character offsets in the document's text.
    id : int
        The chunk's number in the library.
    """

    document: str
    chunk: int
    score: float
    text: str
    slots: int
    tokens: int
    start: int
    end: int
    id: int

    @classmethod
    def of(cls, chunk: StoredChunk, score: float) -> Hit:
        """Return the hit for a stored chunk."""
        return cls(
            document=chunk.uri,
            chunk=chunk.ordinal,
            score=score,
            text=chunk.text,
            slots=chunk.slots,
            tokens=chunk.tokens,
            start=chunk.start,
            end=chunk.end,
            id=chunk.id,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return asdict(self)


@dataclass
class Answer:
    """An answer and what it was read from.

    Parameters
    ----------
    text : str
        The answer.
    sources : list of Hit
        What was read, in this order.
    mode : {"memory", "text", "none"}
        How it was read.
    prompt_tokens, memory_slots : int
        Text tokens and memory slots in the prompt.
    time_to_first_token, seconds : float
        Counted from the question; retrieval is included, loading models is not.
    finish_reason : {"stop", "length"}
        Why the answer ended.
    """

    text: str = ""
    sources: list[Hit] = field(default_factory=list)
    mode: Mode = "memory"
    prompt_tokens: int = 0
    memory_slots: int = 0
    time_to_first_token: float = 0.0
    seconds: float = 0.0
    finish_reason: str = "length"

    def fill(self, result: Generation, before: float) -> None:
        """Take over what was generated; ``before`` are the seconds that went by until then."""
        self.text = result.text.strip()
        self.prompt_tokens = result.prompt_tokens
        self.memory_slots = result.memory_slots
        self.finish_reason = result.finish_reason
        self.time_to_first_token = before + result.time_to_first_token
        self.seconds = before + result.seconds

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return asdict(self)
