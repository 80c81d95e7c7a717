"""CCM's training step (arXiv 2312.03414): all steps of the recursion in one pass, the answer behind them as target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ctxdocs.compressors.ccm import CCM
from ctxdocs.compressors.ccm_parallel import check_kernel, lay_out, one_pass
from ctxdocs.errors import InputError
from ctxdocs.modeling.lora import Lora
from ctxdocs.training.config import DataOptions
from ctxdocs.training.data import TrainingData
from ctxdocs.training.examples import Asking, Examples
from ctxdocs.training.losses import IGNORED, next_token_loss
from ctxdocs.training.method_examples import segments
from ctxdocs.training.options import option
from ctxdocs.training.steps.base import Batch, Example, Step, StepOptions, StepOutput, output


@dataclass
class CCMOptions(StepOptions):
    """Options of the published objective."""

    segments: list[int] = option([2, 5], "fewest and most segments of a document; the last is read, not compressed")
    targets: str = option("last", "last: the last segment is the target; all: every one behind a memory is")
    dropout: float = option(0.05, "on the inputs of the LoRA of special tokens")


class CCMStep(Step[CCM]):
    """Next-token losses of what follows the compressed segments."""

    Options = CCMOptions

    def __init__(self, compressor: CCM, options: CCMOptions) -> None:
        super().__init__(compressor, options)
        if len(options.segments) != 2 or not 2 <= options.segments[0] <= options.segments[1]:
            raise InputError(f"published.segments is {options.segments}", "[fewest, most], at least 2")
        if options.targets not in ("last", "all"):
            raise InputError(f"published.targets is {options.targets!r}", "last or all")
        if options.targets == "all" and not compressor.is_recurrent:
            raise InputError(
                f"{compressor.attn_type} reads segments without memory, only the last one can be a target",
                "--set published.targets=last",
            )
        self.shortest = compressor.segment_tokens + 2  # one segment, and two tokens of another
        self.segments = options.segments
        self.targets = options.targets
        for module in compressor.modules():
            if isinstance(module, Lora):
                module.dropout = options.dropout

    def check(self, longest: int) -> None:
        """Raise ``InputError`` if a sequence has more tokens than the model positions, or attention takes no mask."""
        check_kernel(self.compressor)
        if longest > (limit := self.compressor.backbone.max_positions):
            raise InputError(
                f"sequences of {longest} tokens do not fit the model's {limit} positions", "data.sequence_tokens"
            )
        if longest < self.shortest:
            raise InputError(
                f"sequences of {longest} tokens hold no two segments of {self.compressor.segment_tokens}",
                "--set data.sequence_tokens=..., or a smaller settings.segment_tokens",
            )

    def examples(self, data: TrainingData, options: DataOptions, asking: Asking, seed: int) -> Examples:
        """Return documents and questions in segments."""
        return segments(data, self, asking, options.sequence_tokens)

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Lay segments out with special tokens between them; pad on the left."""
        rows = [lay_out(self.compressor, example["segments"]) for example in examples]
        labels = [self._labels(example) for example in examples]
        return {
            "input_ids": _padded(rows, 0),
            "attention_mask": _padded([torch.ones_like(row) for row in rows], 0),
            "labels": _padded(labels, IGNORED),
        }

    def forward(self, batch: Batch, part: int = 0, carried: Tensor | None = None) -> StepOutput:
        """Run everything in one pass."""
        states = one_pass(self.compressor, batch["input_ids"], batch["attention_mask"])
        return output(next_token_loss(self.compressor.backbone, states, batch["labels"]))

    def _labels(self, example: Example) -> Tensor:
        """Return a row's labels: what an example says of its last segment, or all text behind a memory."""
        segments = example["segments"]
        ignored = [torch.full_like(segment, IGNORED) for segment in segments]
        labels = list(ignored)
        labels[-1] = example.get("labels", segments[-1])
        if self.targets == "all":
            labels[1:-1] = segments[1:-1]
        # A segment's first token would be told by a special token.
        labels = [torch.cat([none[:1], some[1:]]) for none, some in zip(ignored, labels, strict=True)]
        row = lay_out(self.compressor, labels)
        return torch.where(row >= self.compressor.backbone.vocabulary, IGNORED, row)


def _padded(rows: list[Tensor], value: int) -> Tensor:
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side="left")
