"""Language modelling without memories: what a base model is trained from scratch with before it learns to compress."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ctxdocs.compressors.base import Compressor
from ctxdocs.errors import InputError
from ctxdocs.training.losses import IGNORED, next_token_loss
from ctxdocs.training.steps.base import Batch, Example, Step, StepOutput, output


class TextStep(Step[Compressor]):
    """Next-token losses of plain text."""

    def check(self, longest: int) -> None:
        """Raise ``InputError`` if a sequence has more tokens than the model positions."""
        if longest > (limit := self.compressor.backbone.max_positions):
            raise InputError(
                f"sequences of {longest} tokens do not fit the model's {limit} positions", "data.sequence_tokens"
            )

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Pad on the right."""
        ids = nn.utils.rnn.pad_sequence([example["ids"] for example in examples], batch_first=True)
        padded = [example["labels"] for example in examples]
        return {"input_ids": ids, "labels": nn.utils.rnn.pad_sequence(padded, batch_first=True, padding_value=IGNORED)}

    def forward(self, batch: Batch, part: int = 0, carried: Tensor | None = None) -> StepOutput:
        """Run plain causal attention."""
        ids, backbone = batch["input_ids"], self.compressor.backbone
        place = torch.arange(ids.shape[1], device=ids.device)[None]
        states = backbone.run(backbone.embed(ids), place)
        return output(next_token_loss(backbone, states, batch["labels"]))
