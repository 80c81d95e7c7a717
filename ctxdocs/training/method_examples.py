"""What CCM and RCC learn from: segments with a text behind them, and spans of a text to be written again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ctxdocs.datasets.records import Question
from ctxdocs.prompts import encode_text
from ctxdocs.training.data import TrainingData
from ctxdocs.training.document_examples import frames_of
from ctxdocs.training.examples import Asking, Examples, Joined, Rows, tokens_of
from ctxdocs.training.losses import IGNORED

if TYPE_CHECKING:
    from ctxdocs.training.steps.base import Example
    from ctxdocs.training.steps.ccm import CCMStep
    from ctxdocs.training.steps.rcc import RCCStep


class Segments(Examples):
    """Stretches of documents, in segments: ``segments``."""

    def __init__(self, data: TrainingData, step: CCMStep, longest: int) -> None:
        self.documents = data.documents
        self.size, self.longest = step.compressor.segment_tokens, longest
        self.fewest, self.most = step.segments
        needed = (self.fewest - 1) * self.size + 2
        self.kept = np.flatnonzero(data.documents.lengths >= min(needed, longest))
        self.lengths = np.minimum(data.documents.lengths[self.kept], min(longest, self.most * self.size))

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Return a stretch of a random number of segments, from a random place."""
        document = tokens_of(self.documents[int(self.kept[index])])
        tokens = min(self.size * int(rng.integers(self.fewest, self.most + 1)), self.longest, len(document))
        if tokens % self.size == 1:
            tokens -= 1  # no target in a segment of one token
        start = int(rng.integers(len(document) - tokens + 1))
        return {"segments": list(document[start : start + tokens].split(self.size))}


class AskedSegments(Examples):
    """Contexts in segments, and a question with its answer, which alone is the target: ``segments`` and ``labels``."""

    def __init__(self, questions: Sequence[Question], step: CCMStep, asking: Asking, longest: int) -> None:
        self.rows: list[tuple[list[Tensor], int]] = []
        for question in questions:
            if not question.answers or not question.contexts:
                continue
            (first, between, last), _ = frames_of(asking.prompt_format, asking, question.question)
            contexts = [encode_text(asking.tokenizer, text) for text in question.contexts]
            contexts[0] = torch.cat([first, contexts[0]])
            contexts[1:] = [torch.cat([between, context]) for context in contexts[1:]]
            pieces = [piece for ids in contexts for piece in ids.split(step.compressor.segment_tokens)]
            answer = asking.answer(question.answers[0])
            segments = [*pieces, torch.cat([last, answer])]
            if sum(map(len, segments)) <= longest:
                self.rows.append((segments, len(answer)))
        self.lengths = np.array([sum(map(len, segments)) for segments, _ in self.rows], dtype=np.int64)

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Return a question with its answer."""
        segments, targets = self.rows[index]
        labels = segments[-1].clone()
        labels[:-targets] = IGNORED
        return {"segments": segments, "labels": labels}


class Spans(Examples):
    """Packed documents, and a span of each row to be written again: ``context``, ``span`` and ``labels``."""

    def __init__(self, data: TrainingData, step: RCCStep, length: int, end: int, seed: int) -> None:
        self.rows = Rows(data, length, end, seed)
        self.lengths = self.rows.lengths
        self.span, self.cue = step.target_tokens, step.cue

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Return a row and a random span of it."""
        row = self.rows.example(index, rng)
        start = int(rng.integers(len(row["ids"]) - self.span + 1))
        here = slice(start, start + self.span)
        labels = row["labels"][here].clone()
        labels[: int(rng.integers(self.cue[0], self.cue[1] + 1))] = IGNORED
        return {"context": row["ids"], "span": row["ids"][here], "labels": labels}


def segments(data: TrainingData, step: CCMStep, asking: Asking, longest: int) -> Examples:
    """Return documents and questions in segments."""
    return Joined([Segments(data, step, longest), AskedSegments(data.questions, step, asking, longest)])
