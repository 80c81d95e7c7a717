"""RCC's training step (arXiv 2406.06110), reconstruction: a span of the compressed text is to be written again.

The decoder reads the text's states and then a copy of the span. Its first tokens are the cue, which says where to
start, and are no targets. Questions about compressed texts are trained with the objective ``documents``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ctxdocs.compressors.rcc import RCC
from ctxdocs.errors import InputError
from ctxdocs.training.config import DataOptions
from ctxdocs.training.data import TrainingData
from ctxdocs.training.examples import Asking, Examples, end_token
from ctxdocs.training.losses import IGNORED, next_token_loss
from ctxdocs.training.method_examples import Spans
from ctxdocs.training.options import option
from ctxdocs.training.steps.base import Batch, Example, Step, StepOptions, StepOutput, output


@dataclass
class RCCOptions(StepOptions):
    """Options of the published objective."""

    target_tokens: int = option(512, "length of the span that is to be written again")
    cue: list[int] = option([10, 20], "fewest and most of its first tokens that are given")


class RCCStep(Step[RCC]):
    """Next-token losses of a span of the text, read behind the text's states."""

    Options = RCCOptions

    def __init__(self, compressor: RCC, options: RCCOptions) -> None:
        super().__init__(compressor, options)
        if len(options.cue) != 2 or not 1 <= options.cue[0] <= options.cue[1] < options.target_tokens:
            raise InputError(
                f"published.cue is {options.cue}", f"[fewest, most], from 1 to below {options.target_tokens}"
            )
        self.target_tokens = options.target_tokens
        self.cue = options.cue

    def check(self, longest: int) -> None:
        """Raise ``InputError`` if texts do not fill windows, or states and span need too many positions."""
        window, limit = self.compressor.window, self.compressor.backbone.max_positions
        if longest % window:
            raise InputError(f"texts of {longest} tokens do not fill windows of {window}", "data.sequence_tokens")
        if self.target_tokens > longest:
            raise InputError(f"a span of {self.target_tokens} tokens is longer than the text of {longest}")
        need = longest // self.compressor.ratio + self.target_tokens
        if need > limit:
            raise InputError(
                f"the states of {longest} tokens and a span of {self.target_tokens} take {need} positions; "
                f"the decoder has {limit}",
                "shorten data.sequence_tokens or published.target_tokens",
            )

    def examples(self, data: TrainingData, options: DataOptions, asking: Asking, seed: int) -> Examples:
        """Return packed documents with spans of them."""
        return Spans(data, self, options.sequence_tokens, end_token(asking.tokenizer), seed)

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Stack texts, spans and labels, all of one length."""
        return {name: torch.stack([example[name] for example in examples]) for name in ("context", "span", "labels")}

    def forward(self, batch: Batch, part: int = 0, carried: Tensor | None = None) -> StepOutput:
        """Encode the text and read the span."""
        encoded = self.compressor.encode(batch["context"])
        states = self.compressor.read(encoded, batch["span"])
        slots = torch.full(encoded.shape[:2], IGNORED, device=states.device)
        labels = torch.cat([slots, batch["labels"]], dim=1)
        return output(next_token_loss(self.compressor.backbone, states, labels))
