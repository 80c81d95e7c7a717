"""What an examination found, line by line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

#: "FAIL" is for what must be exact and is not; "note" for what is worth knowing.
Verdict: TypeAlias = Literal["ok", "note", "FAIL"]


@dataclass(frozen=True)
class Check:
    """One line.

    Parameters
    ----------
    name : str
        What was looked at.
    verdict : {"ok", "note", "FAIL"}
        What to think of it.
    message : str
        The finding in words.
    values : dict
        The same in numbers, JSON-able.
    """

    name: str
    verdict: Verdict
    message: str
    values: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return {"name": self.name, "verdict": self.verdict, "message": self.message, **self.values}


@dataclass(frozen=True)
class Report:
    """All lines of an examination, in the order they were found."""

    checks: list[Check]

    @property
    def failed(self) -> list[Check]:
        """The lines that failed."""
        return [check for check in self.checks if check.verdict == "FAIL"]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return {"verdict": "FAIL" if self.failed else "ok", "checks": [check.to_dict() for check in self.checks]}
