"""Expected Attention (Devoto et al., arXiv 2510.00636): the slots that queries still to come will probably look at.

In every head queries are taken to be normally distributed as those of the text are, and to stand at one of the next
``future_tokens`` positions. The attention that a slot can then expect, times the norm of its value, is its score.
The document is read once and nothing is read behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ctxdocs.checks import number, one_of, whole_number
from ctxdocs.compressors.kv import Reading
from ctxdocs.compressors.pruning import PruningCompressor
from ctxdocs.errors import InputError
from ctxdocs.memory import Memory
from ctxdocs.modeling.attention_layers import Attention
from ctxdocs.modeling.rotary import mean_rotation, rotate_keys

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SWITCH = ("on", "off")


class ExpectedAttention(PruningCompressor):
    """Keeps the slots that future queries can be expected to attend to.

    Parameters
    ----------
    model, tokenizer, **settings
        Those of :class:`~ctxdocs.compressors.pruning.PruningCompressor`.
    sink_tokens : int
        First tokens of what is read, prefix included, that stay whatever their score and are left out of the
        statistics.
    future_tokens : int
        Positions behind the document at which queries are expected.
    epsilon : float
        Added to the expected attention before it is multiplied by the norm of the value.
    covariance : str
        ``"on"``, or ``"off"`` to use the mean of the queries alone.
    value_norm : str
        ``"on"``, or ``"off"`` to use the expected attention alone.
    """

    method = "expected_attention"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        sink_tokens: int = 4,
        future_tokens: int = 512,
        epsilon: float = 0.0,
        covariance: str = "on",
        value_norm: str = "on",
        **settings: Any,
    ) -> None:
        super().__init__(model, tokenizer, **settings)
        sinks, future = whole_number("sink_tokens", sink_tokens), whole_number("future_tokens", future_tokens)
        if sinks < 0 or future < 1 or number("epsilon", epsilon) < 0:
            raise InputError(
                f"sink_tokens={sink_tokens}, future_tokens={future_tokens}, epsilon={epsilon} cannot be used",
                "give at least 0, 1 and 0",
            )
        one_of("covariance", covariance, _SWITCH)
        one_of("value_norm", value_norm, _SWITCH)
        self.sink_tokens = sink_tokens
        self.future_tokens = future_tokens
        self.epsilon = epsilon
        self.covariance = covariance
        self.value_norm = value_norm

    @property
    def run_settings(self) -> dict[str, Any]:
        """Those of all pruning methods, and the method's own."""
        names = ("sink_tokens", "future_tokens", "epsilon", "covariance", "value_norm")
        return {**super().run_settings, **{name: getattr(self, name) for name in names}}

    def scored(
        self, documents: Sequence[Tensor], memories: Sequence[Memory], counts: Sequence[int]
    ) -> tuple[Reading, list[Tensor]]:
        """Read documents, and score every layer as it runs."""
        prefix = len(self.prefix_ids)
        before = prefix + sum(memory.span for memory in memories)
        start = 0 if memories else prefix
        sinks = 0 if memories else self.sink_tokens
        scores: list[list[Tensor]] = [[] for _ in documents]

        @torch.no_grad()
        def watch(attention: Attention) -> None:
            for row, document in enumerate(documents):
                tokens = start + len(document)
                queries, keys, values = (
                    part[row, :, :tokens] for part in (attention.queries, attention.keys, attention.values)
                )
                first = before - start
                rotated = rotate_keys(self.model, keys, torch.arange(first, first + tokens))
                score = self._expected(attention, queries, rotated, values, before + len(document), sinks)
                scores[row].append(score[:, start:])

        reading = self.read(documents, memories, watch)
        return reading, [torch.stack(layers) for layers in scores]

    def _expected(
        self, attention: Attention, queries: Tensor, keys: Tensor, values: Tensor, position: int, sinks: int
    ) -> Tensor:
        """Score one layer's slots, ``[kv_heads, tokens]``; ``position`` is that of the first query to come."""
        kv_heads, tokens, size = keys.shape
        sinks = min(sinks, tokens - 1)
        known, keys = queries[:, sinks:].float(), keys[:, sinks:].float()
        mean = known.mean(1, keepdim=True)
        centred = known - mean
        future = torch.arange(
            position, min(position + self.future_tokens, max(self.backbone.max_positions, position + 1))
        )
        rotation = mean_rotation(self.model, size, future)
        mean = mean @ rotation.T
        expected = (mean.unflatten(0, (kv_heads, -1)) @ keys[:, None].transpose(2, 3))[:, :, 0] * attention.scaling
        if self.covariance == "on":
            covariance = rotation @ (centred.transpose(1, 2) @ centred / known.shape[1]) @ rotation.T
            spread = covariance.unflatten(0, (kv_heads, -1))
            each = keys[:, None]
            expected = expected + ((each @ spread) * each).sum(-1) * (attention.scaling**2 / 2)
        score = expected.softmax(-1).mean(1)
        if self.value_norm == "on":
            score = (score + self.epsilon) * values[:, sinks:].float().norm(dim=-1)
        protected = score.max() + 1
        return torch.cat([protected.expand(kv_heads, sinks), score], dim=1)
