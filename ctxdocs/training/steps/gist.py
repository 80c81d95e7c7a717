"""The training step of Activation Beacon (arXiv 2401.03462) and UltraGist (arXiv 2405.16635).

A sequence is read window by window in one step, and gradients flow through the gist tokens of all windows. The last
window holds no gist tokens. Ratios are drawn per window. What the first window says is no target, because no memory
stands in front of it; interleaved gist tokens of full coverage are seen within their window, so that there it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ctxdocs.compressors.gist import GistCompressor
from ctxdocs.errors import InputError
from ctxdocs.training.losses import IGNORED, next_token_loss
from ctxdocs.training.steps.base import Batch, Example, Step, StepOptions, StepOutput, output


class GistStep(Step[GistCompressor]):
    """Next-token losses of all windows."""

    def __init__(self, compressor: GistCompressor, options: StepOptions) -> None:
        super().__init__(compressor, options)
        self.shortest = compressor.window + 1  # in one window nothing is trained
        self.first_counts = compressor.interleaves and compressor.attention == "full-coverage"

    def check(self, longest: int) -> None:
        """Raise ``InputError`` if sequences fit one window, or need more positions than the model has."""
        compressor = self.compressor
        if longest <= compressor.window:
            raise InputError(
                f"sequences of {longest} tokens fit one window of {compressor.window}, where nothing is trained",
                "--set data.sequence_tokens=..., or a smaller settings.window",
            )
        ratio = max(compressor.ratio_choice().ratios)  # with smaller ones, drawn too often, positions run on beyond it
        if (reach := compressor.reach(ratio)) < longest:
            raise InputError(
                f"sequences of {longest} tokens do not fit the model's {compressor.backbone.max_positions} positions: "
                f"with ratio {ratio} and windows of {compressor.window} tokens they hold {reach}",
                "shorten data.sequence_tokens, or add a larger ratio",
            )

    def group(self, tokens: int) -> int:
        """Return the number of windows: rows are padded in the last one, where no gist tokens stand."""
        compressor = self.compressor
        return -(-max(0, tokens - compressor.window) // compressor.stride) + 1

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Pad on the right; sequences have the same number of windows."""
        ids = nn.utils.rnn.pad_sequence([example["ids"] for example in examples], batch_first=True)
        padded = [example["labels"] for example in examples]
        return {"input_ids": ids, "labels": nn.utils.rnn.pad_sequence(padded, batch_first=True, padding_value=IGNORED)}

    def forward(self, batch: Batch, part: int = 0, carried: Tensor | None = None) -> StepOutput:
        """Run all windows."""
        compressor = self.compressor
        # Draws go on from torch's generator, which is kept in checkpoints.
        compressor.ratio_generator = np.random.default_rng(int(torch.randint(2**62, ())))
        try:
            states = compressor.encode(batch["input_ids"], last_window="plain")
        finally:
            compressor.ratio_generator = None
        skipped = 0 if self.first_counts else compressor.window
        return output(next_token_loss(compressor.backbone, states[:, skipped:], batch["labels"][:, skipped:]))
