"""Sessions of methods that keep a part of the model's own cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ctxdocs.compressors.passes import ReadState, batch_input, first_pass, next_pass
from ctxdocs.compressors.sessions import Session
from ctxdocs.errors import InputError
from ctxdocs.memory import KVMemory, Memory

if TYPE_CHECKING:
    from ctxdocs.compressors.kv import KVCompressor


class KVSession(Session):
    """A context that stays as it is while it grows, and is compressed when it is closed into a memory.

    It begins with the compressor's prefix; what is fed follows.

    Parameters
    ----------
    compressor : KVCompressor
        Reads and compresses.
    memories : sequence of Memory
        What the context starts from, behind the prefix.
    options : mapping, optional
        How :meth:`memory` compresses.
    """

    def __init__(
        self, compressor: KVCompressor, memories: Sequence[Memory], options: Mapping[str, Any] | None = None
    ) -> None:
        self._options = dict(options or {})
        super().__init__(compressor, memories)

    @property
    def options(self) -> dict[str, Any]:
        """How the session's memory is compressed."""
        return self._options

    def reset(self) -> None:
        """Go back to the memories the session started from."""
        self.tokens_seen = 0
        self._last_logits = None
        self._ids: list[Tensor] = []
        self._state: ReadState | None = None

    def memory(self) -> Memory:
        """Read the session's text again and compress it, behind the memories it started from.

        Raises
        ------
        InputError
            If nothing has been read.
        ContextTooLong
            If the method needs more positions than are left.
        """
        given = [memory for memory in self.memories if isinstance(memory, KVMemory)]
        if self._ids:
            given += self.compressor.compress_behind(self.memories, [torch.cat(self._ids)], **self._options)
        if not given:
            raise InputError("nothing has been read that could become a memory", "feed the session first")
        return KVMemory.join(given)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the text, which is short; keys and values are computed from it again."""
        tensors = {"ids": torch.cat([torch.empty(0, dtype=torch.long), *self._ids])}
        if self._last_logits is not None:
            tensors["last_logits"] = self._last_logits
        return tensors, {}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Read the text again."""
        if len(ids := tensors["ids"].cpu()):
            with torch.no_grad():
                self._extend(ids)
            self._last_logits = tensors["last_logits"]

    def _read(self, ids: Tensor) -> Tensor:  # type: ignore[override]  # no options
        logits = self.compressor.backbone.head(self._extend(ids))
        self._last_logits = logits[-1]
        return logits

    def _extend(self, ids: Tensor) -> Tensor:
        """Run ids behind everything read so far; return their states ``[tokens, width]``."""
        compressor = self.compressor
        backbone = compressor.backbone
        if self._state is None:
            prefix = [compressor.prefix_memory()] if len(compressor.prefix_ids) else []
            row = compressor.model_input([*prefix, *self.memories, ids])
            batch = batch_input(compressor.model, [row])
            hidden = first_pass(backbone, batch)
            self._state = batch.state(batch.positions[:, -1] + 1)
        else:
            positions = self._state.next_position[:, None] + torch.arange(len(ids), device=backbone.device)
            hidden = next_pass(backbone, backbone.embed(ids[None]), positions, self._state)
            self._state.next_position = positions[:, -1] + 1
        self._ids.append(ids.cpu())
        self.tokens_seen += len(ids)
        return hidden[0]

    def _positions_for(self, tokens: int) -> int:
        start = len(self.compressor.prefix_ids) + sum(memory.span for memory in self.memories)
        return start + self.tokens_seen + tokens
