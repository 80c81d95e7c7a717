"""SnapKV (Li et al., arXiv 2404.14469): the slots that the last tokens of the document attend to.

The authors look from the question back at the document. A memory is made before there is a question, so here the last
tokens of the document look back. It is read once and nothing is read behind it.
"""

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
from ctxdocs.modeling.attention_layers import Attention
from ctxdocs.modeling.rotary import rotate_keys

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class SnapKV(PruningCompressor):
    """Keeps a window at the end of the document, and what it attends to.

    Parameters
    ----------
    model, tokenizer, **settings
        Those of :class:`~ctxdocs.compressors.pruning.PruningCompressor`.
    window : int
        Tokens of the window; never more than the document, or its budget, has.
    kernel : int
        Neighbouring slots over which scores are averaged, an odd number.
    """

    method = "snapkv"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        window: int = 64,
        kernel: int = 5,
        **settings: Any,
    ) -> None:
        super().__init__(model, tokenizer, **settings)
        if whole_number("window", window) < 1 or whole_number("kernel", kernel) < 1 or kernel % 2 == 0:
            raise InputError(
                f"window={window} and kernel={kernel} cannot be used", "give a window of at least 1 and an odd kernel"
            )
        self.window = window
        self.kernel = kernel

    @property
    def run_settings(self) -> dict[str, Any]:
        """Those of all pruning methods, ``window`` and ``kernel``."""
        return {**super().run_settings, "window": self.window, "kernel": self.kernel}

    def scored(
        self, documents: Sequence[Tensor], memories: Sequence[Memory], counts: Sequence[int]
    ) -> tuple[Reading, list[Tensor]]:
        """Read documents, and score every layer as it runs."""
        prefix = len(self.prefix_ids)
        start = 0 if memories else prefix
        first = prefix + sum(memory.span for memory in memories) - start
        scores: list[list[Tensor]] = [[] for _ in documents]

        @torch.no_grad()
        def watch(attention: Attention) -> None:
            for row, (document, count) in enumerate(zip(documents, counts, strict=True)):
                tokens, window = start + len(document), min(self.window, len(document), count)
                positions = torch.arange(first, first + tokens)
                keys = rotate_keys(self.model, attention.keys[row, :, :tokens], positions)
                queries = attention.queries[row, :, tokens - window : tokens]
                queries = rotate_keys(self.model, queries, positions[-window:])
                scores[row].append(self._looked_at(attention, queries, keys)[:, start:])

        reading = self.read(documents, memories, watch)
        return reading, [torch.stack(layers) for layers in scores]

    def _looked_at(self, attention: Attention, queries: Tensor, keys: Tensor) -> Tensor:
        """Score one layer's slots, ``[kv_heads, tokens]``, by the attention of the window's queries."""
        kv_heads, tokens, size = keys.shape
        window = queries.shape[1]
        groups = queries.shape[0] // kv_heads
        scores = attention.scores(queries.reshape(kv_heads, groups * window, size), keys)
        scores = scores.unflatten(1, (groups, window))
        later = torch.ones(window, window, dtype=torch.bool, device=keys.device).triu(1)
        scores[..., tokens - window :].masked_fill_(later, -torch.inf)
        seen = scores.softmax(-1)[..., : tokens - window].mean(2)
        if not seen.shape[-1]:
            return torch.ones(kv_heads, tokens, device=keys.device)
        half = self.kernel // 2
        pooled = torch.nn.functional.avg_pool1d(seen, self.kernel, stride=1, padding=half).mean(1)
        protected = pooled.max() + 1
        return torch.cat([pooled, protected.expand(kv_heads, window)], dim=1)
