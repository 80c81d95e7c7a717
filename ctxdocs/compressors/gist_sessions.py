"""Growing contexts of gist tokens: a window is compressed as soon as it is full."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ctxdocs.compressors.gist_windows import Windows
from ctxdocs.compressors.sessions import Session
from ctxdocs.errors import InputError
from ctxdocs.memory import KVMemory, Memory


class GistSession(Session):
    """A context whose windows are compressed as they fill; what it keeps grows by a window's gist tokens at a time."""

    def reset(self) -> None:
        """Go back to the memories the session started from."""
        self.tokens_seen = 0
        empty = self.compressor.empty_slots(1)
        start = [
            torch.stack([memory.keys, memory.values])[:, :, None].to(empty)
            for memory in self.memories
            if isinstance(memory, KVMemory)
        ]
        self.windows = Windows(self.compressor, front=torch.cat([empty, *start], dim=-2))
        self._last_logits = None

    def feed(  # type: ignore[override]
        self, ids: Sequence[int] | Tensor, *, skip_first: int = 0, skip_last: int | None = None
    ) -> Tensor:
        """Read token ids; return their logits ``[len(ids), vocabulary]``.

        Parameters
        ----------
        ids : sequence of int or torch.Tensor
            1-D token ids.
        skip_first : int
            With the first tokens of the session: keep so many of them as they are, in front of the first window.
        skip_last : int, optional
            Keep windows that start at this token of the session or later as they are.
        """
        compressor = self.compressor
        if (skip_first or skip_last is not None) and (
            compressor.sink_size or (skip_last is not None and (skip_last - skip_first) % compressor.window)
        ):
            raise InputError(
                f"tokens {skip_first} to {skip_last} cannot be told apart from those that are kept",
                f"between them lie whole windows of {compressor.window} tokens, and the compressor keeps no sink",
            )
        return super().feed(ids, skip_first=skip_first, skip_last=skip_last)

    def memory(self) -> Memory:
        """Close the running window beside what was compressed; the session goes on unchanged."""
        nothing = torch.zeros(1, 0, dtype=torch.long, device=self.compressor.backbone.device)
        slots = self.windows.close(nothing, nothing.sum(1))[0]
        source_tokens = self.tokens_seen + sum(memory.source_tokens for memory in self.memories)
        return self.compressor.as_memory(slots, source_tokens)

    def _read(self, ids: Tensor, *, skip_first: int = 0, skip_last: int | None = None) -> Tensor:  # type: ignore[override]
        backbone = self.compressor.backbone
        states = self.windows.read(ids.to(backbone.device)[None], skip_first=skip_first, skip_last=skip_last)
        logits = backbone.head(states[0])
        self._last_logits = logits[-1]
        self.tokens_seen = self.windows.tokens_read
        return logits

    def _positions_for(self, tokens: int) -> int:
        return self.windows.positions_for(tokens)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the slots, and how the running window stands."""
        tensors, values = self.windows.state()
        if self._last_logits is not None:
            tensors["last_logits"] = self._last_logits
        return tensors, values

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Put the slots back."""
        self.windows.restore(tensors, values)
        self.tokens_seen = self.windows.tokens_read
        self._last_logits = tensors.get("last_logits")
