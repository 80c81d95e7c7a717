"""How a found chunk is described on one line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ctxdocs.cli.output import counted, shown

if TYPE_CHECKING:
    from ctxdocs.library import Hit


def described(number: int, hit: Hit) -> tuple[str, ...]:
    """Return columns: number, document, chunk, score, and what its memory takes instead of its text."""
    return (
        f"{number}",
        shown(hit.document),
        f"chunk {hit.chunk}",
        f"score {hit.score:.3f}",
        f"{counted(hit.slots, 'slot')} for {counted(hit.tokens, 'token')}",
    )
