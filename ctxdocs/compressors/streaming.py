"""StreamingLLM (Xiao et al., arXiv 2309.17453): the first tokens, as an attention sink, and the last ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ctxdocs.checks import whole_number
from ctxdocs.compressors.kv import Reading
from ctxdocs.compressors.pruning import PruningCompressor
from ctxdocs.errors import InputError
from ctxdocs.memory import Memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Streaming(PruningCompressor):
    """Keeps the first tokens of what is read, prefix included, and the document's last ones; all heads the same.

    Parameters
    ----------
    model, tokenizer, **settings
        Those of :class:`~ctxdocs.compressors.pruning.PruningCompressor`.
    sink_tokens : int
        First tokens that stay. Those of the prefix count; those of the document are part of its budget.
    """

    method = "streaming"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        sink_tokens: int = 4,
        **settings: Any,
    ) -> None:
        super().__init__(model, tokenizer, **settings)
        if whole_number("sink_tokens", sink_tokens) < 0:
            raise InputError(f"sink_tokens is {sink_tokens}, it cannot be negative")
        self.sink_tokens = sink_tokens

    @property
    def run_settings(self) -> dict[str, Any]:
        """Those of all pruning methods, and ``sink_tokens``."""
        return {**super().run_settings, "sink_tokens": self.sink_tokens}

    def scored(
        self, documents: Sequence[Tensor], memories: Sequence[Memory], counts: Sequence[int]
    ) -> tuple[Reading, list[Tensor]]:
        """Score slots by their place; behind memories there is no sink but the prefix."""
        reading = self.read(documents, memories)
        sinks = 0 if memories else max(self.sink_tokens - len(self.prefix_ids), 0)
        heads = (reading.keys.shape[0], reading.keys.shape[2])
        scores = []
        for document in documents:
            score = torch.arange(len(document), dtype=torch.float32, device=reading.keys.device)
            score[:sinks] = float("inf")
            scores.append(score.expand(*heads, -1))
        return reading, scores
