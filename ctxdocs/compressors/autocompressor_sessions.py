"""Growing contexts of AutoCompressor: a segment is summarised as soon as it is full."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ctxdocs.compressors.sessions import Session
from ctxdocs.memory import Memory, SoftPrompt

if TYPE_CHECKING:
    from ctxdocs.compressors.autocompressor import AutoCompressor


class AutoCompressorSession(Session):
    """A running segment with a key/value cache behind a soft prompt that takes in one full segment after another.

    Parameters
    ----------
    compressor : AutoCompressor
        Reads and summarises.
    memories : sequence of Memory
        What the context starts from.
    segment_tokens : int
        Length of the running segment.
    published : bool
        See :meth:`AutoCompressor.session`.
    """

    def __init__(
        self, compressor: AutoCompressor, memories: Sequence[Memory], segment_tokens: int, *, published: bool = False
    ) -> None:
        self.segment_tokens = segment_tokens
        self.published = published
        super().__init__(compressor, memories)

    @property
    def options(self) -> dict[str, Any]:
        """``segment_tokens`` and ``published``."""
        return {"segment_tokens": self.segment_tokens, "published": self.published}

    def reset(self) -> None:
        """Go back to the memories the session started from."""
        empty = self.compressor.empty_softprompt(1)
        start = [memory.vectors[None].to(empty) for memory in self.memories if isinstance(memory, SoftPrompt)]
        self.softprompt = torch.cat([empty, *start], dim=1)
        self.tokens_seen = 0
        self._last_logits = None
        self._open_segment()

    def _read(self, ids: Tensor) -> Tensor:  # type: ignore[override]  # no options
        # A token's logits are computed before the segment it completes is summarised.
        logits = []
        is_first = self.tokens_seen == 0
        while len(ids):
            room = self.segment_tokens - self.running
            piece, ids = (ids[:room], ids[room:]) if room > 0 else (ids, ids[:0])
            logits.append(self._extend(piece))
            left_open = self.published and is_first and not len(ids)
            if self.running == self.segment_tokens and not left_open:
                self._summarise()
        self._last_logits = logits[-1][-1]
        return torch.cat(logits)

    def _positions_for(self, tokens: int) -> int:
        slots = self.compressor.summary_length if self.compressor.backbone.counts_slots else 0
        vectors = self.softprompt.shape[1] if slots else 0
        running = self.running + tokens
        if self.running >= self.segment_tokens:  # left open for good
            return vectors + running + slots
        full, rest = divmod(running, self.segment_tokens)

        def before(segment: int) -> int:
            if self.compressor.accumulate_summary or not segment:
                return vectors + segment * slots
            return slots

        # Every segment has room for its slots: the session can be closed at any time.
        last_full = before(full - 1) + self.segment_tokens if full else 0
        return max(last_full, before(full) + rest) + slots

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the soft prompt and the running segment's text."""
        empty = torch.empty(0, dtype=torch.long)
        tensors = {"softprompt": self.softprompt, "running": torch.cat([empty, *self._running_ids])}
        if self._last_logits is not None:
            tensors["last_logits"] = self._last_logits
        return tensors, {"tokens_seen": self.tokens_seen}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Read the running segment again behind the soft prompt."""
        self.softprompt = tensors["softprompt"].to(self.softprompt)
        self._open_segment()
        if len(tensors["running"]):
            self._extend(tensors["running"].cpu())
        self.tokens_seen = values["tokens_seen"]
        self._last_logits = tensors.get("last_logits")

    def memory(self) -> Memory:
        """Summarise the running segment beside the soft prompt; the session goes on unchanged."""
        softprompt = self.softprompt
        if self.running:
            ids = torch.cat(self._running_ids)[None].to(softprompt.device)
            _, summary = self.compressor.segment(ids, softprompt)
            softprompt = self.compressor.next_softprompt(softprompt, summary)
        source_tokens = self.tokens_seen + sum(memory.source_tokens for memory in self.memories)
        return self.compressor.as_memory(softprompt[0].clone(), source_tokens)

    def _open_segment(self) -> None:
        from transformers import DynamicCache

        self.running = 0
        self._running_ids: list[Tensor] = []
        self._cache = DynamicCache(config=self.compressor.model.config)
        if self.softprompt.shape[1]:
            self._run(self.softprompt, counts=self.compressor.backbone.counts_slots)

    def _extend(self, ids: Tensor) -> Tensor:
        backbone = self.compressor.backbone
        hidden = self._run(backbone.embed(ids)[None], counts=True)
        self._running_ids.append(ids.cpu())
        self.running += len(ids)
        self.tokens_seen += len(ids)
        return backbone.head(hidden[0])

    def _summarise(self) -> None:
        slots = self.compressor.embed_summary.weight[None]
        if slots.shape[1]:
            summary = self._run(slots, counts=self.compressor.backbone.counts_slots)
            self.softprompt = self.compressor.next_softprompt(self.softprompt, summary)
        self._open_segment()

    def _run(self, embeds: Tensor, *, counts: bool) -> Tensor:
        backbone = self.compressor.backbone
        cached = self._cache.get_seq_length()
        first = cached if backbone.counts_slots else self.running
        positions = torch.arange(first, first + embeds.shape[1], device=embeds.device)
        if not counts:
            positions = torch.full_like(positions, -1)
        return backbone.run(embeds, positions[None], cache=self._cache)
