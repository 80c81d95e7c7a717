"""Growing contexts of RCC: text is encoded anew, window by window, as the decoder runs out of room for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ctxdocs.compressors.sessions import Session
from ctxdocs.errors import InputError
from ctxdocs.memory import Memory

if TYPE_CHECKING:
    from transformers import Cache

    from ctxdocs.compressors.rcc import RCC


class RCCSession(Session):
    """Text that the decoder reads behind the states of all text before it.

    When ``segment_tokens`` of text have been read and more arrives, they are compressed: text fills one window after
    another, and the last, open one is encoded anew every time. Windows are filled from the start of the context, so
    beyond one window the memory differs from :meth:`RCC.compress_ids`, which lets them end with the text. Every
    window of text adds its slots for good: a session ends where the decoder's positions do.

    Parameters
    ----------
    compressor : RCC
        Reads and compresses.
    memories : sequence of Memory
        What the context starts from.
    segment_tokens : int, optional
        See :meth:`RCC.session`.
    """

    def __init__(self, compressor: RCC, memories: Sequence[Memory], segment_tokens: int | None) -> None:
        limit = compressor.backbone.max_positions
        self.segment_tokens = min(compressor.window, limit // 2) if segment_tokens is None else segment_tokens
        if not 1 <= self.segment_tokens <= compressor.window:
            raise InputError(
                f"a segment holds between 1 and {compressor.window} tokens (a window), not {self.segment_tokens}"
            )
        super().__init__(compressor, memories)

    @property
    def options(self) -> dict[str, Any]:
        """``segment_tokens``."""
        return {"segment_tokens": self.segment_tokens}

    def reset(self) -> None:
        """Go back to the memories the session started from."""
        encoder = self.compressor.encoder_backbone
        nothing = torch.empty(0, len(encoder.layers) + 1, encoder.width, device=encoder.device, dtype=encoder.dtype)
        self.tokens_seen = 0
        self._last_logits = None
        self._closed = torch.cat([nothing, *map(self.compressor.states_of, self.memories)])
        self._open_ids = torch.empty(0, dtype=torch.long)
        self._start_segment(self._closed)

    def memory(self) -> Memory:
        """Compress the running segment beside what is compressed already; the session goes on unchanged."""
        closed, open_states, _ = self._compressed()
        source_tokens = self.tokens_seen + sum(memory.source_tokens for memory in self.memories)
        return self.compressor.as_memory(torch.cat([closed, open_states]), source_tokens)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the states of full windows, and the text of the open one and of the running segment."""
        tensors = {"closed": self._closed, "open": self._open_ids, "running": self._running_ids}
        if self._last_logits is not None:
            tensors["last_logits"] = self._last_logits
        return tensors, {"tokens_seen": self.tokens_seen}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Encode the open window again, and read the running segment behind it."""
        self._closed = tensors["closed"].to(self._closed)
        self._open_ids, running = tensors["open"].cpu(), tensors["running"].cpu()
        states = [self._closed]
        if len(self._open_ids):
            states.append(self.compressor.encode(self.compressor.fill_windows(self._open_ids)[None])[0])
        self._start_segment(torch.cat(states))
        if len(running):
            self._extend(running)
        self.tokens_seen = values["tokens_seen"]
        self._last_logits = tensors.get("last_logits")

    def _read(self, ids: Tensor) -> Tensor:  # type: ignore[override]  # no options
        logits, ids = [], ids.cpu()
        while len(ids):
            if self.running == self.segment_tokens:
                self._closed, open_states, self._open_ids = self._compressed()
                self._start_segment(torch.cat([self._closed, open_states]))
            piece, ids = ids.tensor_split([self.segment_tokens - self.running])
            logits.append(self._extend(piece))
        self._last_logits = logits[-1][-1]
        return torch.cat(logits)

    @property
    def running(self) -> int:
        """Tokens of the running segment."""
        return len(self._running_ids)

    def _compressed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the states of full windows, those of the open one with the running segment in it, and its text."""
        compressor = self.compressor
        ids = torch.cat([self._open_ids, self._running_ids])
        whole, rest = ids.tensor_split([len(ids) // compressor.window * compressor.window])
        windows = torch.cat([whole, compressor.fill_windows(rest)]) if len(rest) else whole
        if not len(windows):
            return self._closed, self._closed[:0], rest
        closed, open_states = compressor.encode(windows[None])[0].tensor_split([len(whole) // compressor.ratio])
        return torch.cat([self._closed, closed]), open_states, rest

    def _start_segment(self, states: Tensor) -> None:
        """Have the decoder read states, and an empty segment behind them."""
        from transformers import DynamicCache

        compressor = self.compressor
        self._running_ids = torch.empty(0, dtype=torch.long)
        self._cache: Cache = DynamicCache(config=compressor.model.config)
        if len(states):
            self._cache = compressor.prefill([[compressor.as_memory(states, self.tokens_seen)]])[1].cache

    def _extend(self, ids: Tensor) -> Tensor:
        backbone, first = self.compressor.backbone, self._cache.get_seq_length()
        place = torch.arange(first, first + len(ids), device=backbone.device)
        hidden = backbone.run(backbone.embed(ids)[None], place[None], cache=self._cache)
        self._running_ids = torch.cat([self._running_ids, ids])
        self.tokens_seen += len(ids)
        return backbone.head(hidden[0])

    def _positions_for(self, tokens: int) -> int:
        compressor, seen = self.compressor, self.tokens_seen + tokens
        compressed = (seen - 1) // self.segment_tokens * self.segment_tokens
        slots = sum(memory.slots for memory in self.memories)
        slots += -(-compressed // compressor.window) * (compressor.window // compressor.ratio)
        return slots + min(seen, self.segment_tokens)
