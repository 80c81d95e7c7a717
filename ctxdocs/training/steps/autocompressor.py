"""AutoCompressor's training step (arXiv 2305.14788, section 3.3), and RMT's.

A sequence is read in *substeps*, each of several segments. Gradients flow through the summary vectors within a substep;
into the next one they are handed on as they are (stop-gradient), after the substep's own loss has been
back-propagated. Segment lengths are drawn anew for every substep, so that the model learns to summarise texts of any
length. RMT is trained with one substep and fixed lengths.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ctxdocs.compressors.autocompressor import AutoCompressor
from ctxdocs.compressors.segments import split_lengths
from ctxdocs.errors import InputError
from ctxdocs.training.losses import IGNORED, next_token_loss
from ctxdocs.training.options import option
from ctxdocs.training.steps.base import Batch, Example, Step, StepOptions, StepOutput, output

#: OPT's row of "no position" in its table.
_NO_POSITION = 1


@dataclass
class AutoCompressorOptions(StepOptions):
    """Options of the published objective."""

    substeps: int = option(2, "parts of a sequence that are back-propagated one by one")
    segments: int = option(2, "segments of a substep, where their lengths are drawn")
    segment_lengths: list[int] = option([], "their lengths, where they are not drawn")


class AutoCompressorStep(Step[AutoCompressor]):
    """Next-token losses of all segments, in substeps."""

    Options = AutoCompressorOptions

    def __init__(self, compressor: AutoCompressor, options: AutoCompressorOptions) -> None:
        super().__init__(compressor, options)
        if options.substeps < 1 or options.segments < 1 or min(options.segment_lengths, default=1) < 1:
            raise InputError("a sequence has at least one substep, of at least one segment of at least one token")
        self.parts = options.substeps
        self.segments = options.segments
        self.segment_lengths = options.segment_lengths
        if not compressor.backbone.counts_slots:
            # The row of "no position" is not trained: it is what slots without text have in common.
            compressor.model.get_decoder().embed_positions.padding_idx = _NO_POSITION

    def check(self, longest: int) -> None:
        """Raise ``InputError`` if a segment, the vectors in front of it and its own slots cannot all have positions."""
        backbone, compressor = self.compressor.backbone, self.compressor
        if self.segment_lengths and (need := sum(self.segment_lengths) * self.parts) > longest:
            raise InputError(
                f"segments of {self.segment_lengths} in {self.parts} substeps need sequences of {need} tokens, "
                f"not {longest}",
                "--set data.sequence_tokens=...",
            )
        steps = self.parts * (len(self.segment_lengths) or self.segments)
        before = compressor.summary_length * (steps - 1 if compressor.accumulate_summary else min(steps - 1, 1))
        slots = before + compressor.summary_length if backbone.counts_slots else 0
        segment = max(self.segment_lengths, default=0) or self._longest_segment(longest)
        if segment + slots > backbone.max_positions:
            raise InputError(
                f"a segment of {segment} tokens and {slots} summary slots take {segment + slots} positions; "
                f"the model has {backbone.max_positions}",
                "shorten data.sequence_tokens, or cut it into more substeps or segments",
            )

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Pad on the right."""
        ids = nn.utils.rnn.pad_sequence([example["ids"] for example in examples], batch_first=True)
        padded = [example["labels"] for example in examples]
        labels = nn.utils.rnn.pad_sequence(padded, batch_first=True, padding_value=IGNORED)
        lengths = torch.tensor([len(example["ids"]) for example in examples])
        return {"input_ids": ids, "labels": labels, "attention_mask": torch.arange(ids.shape[1]) < lengths[:, None]}

    def forward(self, batch: Batch, part: int = 0, carried: Tensor | None = None) -> StepOutput:
        """Run one substep; ``carried`` is the soft prompt ``[batch, vectors, width]``."""
        ids, labels, mask = batch["input_ids"], batch["labels"], batch["attention_mask"]
        here, lengths = self.part_of(ids.shape[1], part)
        states, softprompt = self.compressor.encode(ids[:, here], mask[:, here], carried, lengths, True)
        loss = next_token_loss(self.compressor.backbone, states, labels[:, here])
        return output(loss, carried=softprompt.detach())

    def part_of(self, tokens: int, part: int) -> tuple[slice, list[int]]:
        """Return where a substep lies, and the lengths of its segments."""
        if self.segment_lengths:
            size = sum(self.segment_lengths)
            start = max(0, tokens - size * (self.parts - part))  # the end of the sequence is read
            return slice(start, start + size), self.segment_lengths
        start, stop = substep_bounds(tokens, self.parts)[part : part + 2]
        segments = min(self.segments, max(1, (stop - start + 1) // 3))  # as many as can be drawn
        lengths = random_segment_lengths(stop - start, segments, self.compressor.backbone.max_positions)
        return slice(start, stop), lengths

    def _longest_segment(self, tokens: int) -> int:
        bounds = substep_bounds(tokens, self.parts)
        longest = max(stop - start for start, stop in itertools.pairwise(bounds))
        if self.segments == 1:
            return longest
        return longest - (self.segments - 1) * _shortest(longest, self.segments, self.compressor.backbone.max_positions)


def substep_bounds(tokens: int, substeps: int) -> list[int]:
    """Return where substeps begin and end: as equal as integers allow."""
    return torch.linspace(0, tokens, substeps + 1).long().tolist()


def random_segment_lengths(tokens: int, segments: int, longest: int) -> list[int]:
    """Draw segment lengths that add up to ``tokens``, from torch's generator.

    Every segment but one could be as short as leaves the rest no longer than ``longest``; what is above that is cut at
    random places, all different.

    Raises
    ------
    InputError
        If so few tokens cannot be cut into so many segments.
    """
    if segments == 1:
        return [tokens]
    least = _shortest(tokens, segments, longest)
    free = tokens - least * segments
    if free < segments - 1:
        raise InputError(
            f"{tokens} tokens cannot be cut into {segments} segments at random", "train on longer sequences"
        )
    breaks = torch.multinomial(torch.ones(free), segments - 1).sort().values.tolist()
    edges = [0, *breaks, free]
    return split_lengths(tokens, [stop - start + least for start, stop in itertools.pairwise(edges)])


def _shortest(tokens: int, segments: int, longest: int) -> int:
    return max(-(-(tokens - longest) // (segments - 1)), 2)
