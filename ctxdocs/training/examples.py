"""What batches are made of: documents and questions as sequences, segments or spans, each decided by a number."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ctxdocs.datasets.packing import PackedRows
from ctxdocs.datasets.records import Question
from ctxdocs.prompts import PromptFormat, encode_text
from ctxdocs.training.data import TrainingData
from ctxdocs.training.losses import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ctxdocs.training.config import DataOptions
    from ctxdocs.training.steps.base import Example


class Examples(abc.ABC):
    """A number of examples, any of them at once.

    Attributes
    ----------
    lengths : numpy.ndarray
        int64 ``[examples]``: tokens of each, by which batches are grouped.
    """

    lengths: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.lengths)

    @abc.abstractmethod
    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Build an example; what is random about it is drawn from ``rng``."""


class Joined(Examples):
    """Several kinds of examples, one behind the other."""

    def __init__(self, parts: Sequence[Examples]) -> None:
        self.parts = [part for part in parts if len(part)]
        self.lengths = np.concatenate([part.lengths for part in self.parts] or [np.empty(0, np.int64)])
        self._ends = np.cumsum([len(part) for part in self.parts])

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Build an example of one of the parts."""
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[part].example(index - (int(self._ends[part - 1]) if part else 0), rng)


class Rows(Examples):
    """Documents, each closed by an end token, joined and cut into rows of one length: ``ids`` and ``labels``."""

    def __init__(self, data: TrainingData, length: int, end: int, seed: int) -> None:
        self.rows = PackedRows(data.documents, length, end=end, seed=seed)
        self.lengths = np.full(len(self.rows), length, dtype=np.int64)

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Return a row; what fills the last one up is no target."""
        row = self.rows[index]
        ids = torch.from_numpy(row.tokens)
        return {"ids": ids, "labels": torch.where(torch.from_numpy(row.documents) < 0, IGNORED, ids)}


class Documents(Examples):
    """Documents, one per example, closed by an end token and cut to a length: ``ids`` and ``labels``."""

    def __init__(self, data: TrainingData, shortest: int, longest: int, end: int) -> None:
        self.documents, self.longest, self.end = data.documents, longest, end
        self.kept = np.flatnonzero(data.documents.lengths + 1 >= shortest)
        self.lengths = np.minimum(data.documents.lengths[self.kept] + 1, longest)

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Return the beginning of a document."""
        ids = np.append(self.documents[int(self.kept[index])][: self.longest].astype(np.int64), self.end)
        tensor = torch.from_numpy(ids[: self.longest])
        return {"ids": tensor, "labels": tensor}


class Answers(Examples):
    """Questions behind the text of their contexts, of which only the answers are targets: ``ids`` and ``labels``."""

    def __init__(self, questions: Sequence[Question], asking: Asking, shortest: int, longest: int) -> None:
        self.asking = asking
        self.rows: list[tuple[Tensor, int]] = []
        for question in questions:
            if question.answers:
                prompt, answer = asking.as_text(question), asking.answer(question.answers[0])
                if shortest <= len(prompt) + len(answer) <= longest:
                    self.rows.append((torch.cat([prompt, answer]), len(answer)))
        self.lengths = np.array([len(ids) for ids, _ in self.rows], dtype=np.int64)

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Return a question with its answer."""
        ids, targets = self.rows[index]
        labels = ids.clone()
        labels[:-targets] = IGNORED
        return {"ids": ids, "labels": labels}


class Asking:
    """How questions become tokens, in the format that a library asks in.

    Parameters
    ----------
    tokenizer : transformers tokenizer
        The model's.
    prompt_format : PromptFormat
        The compressor's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat) -> None:
        self.tokenizer, self.prompt_format = tokenizer, prompt_format
        self._glue = "" if prompt_format.template[-1:].isspace() else " "
        eos = tokenizer.eos_token_id
        self.end = torch.tensor([eos]) if eos is not None else encode_text(tokenizer, "".join(prompt_format.stop[:1]))

    def as_text(self, question: Question) -> Tensor:
        """Return the prompt that asks a question about the text of its contexts, int64 ``[tokens]``."""
        prompt = self.prompt_format.build(question.question, list(question.contexts), self.tokenizer)
        return torch.cat([part for part in prompt if isinstance(part, Tensor)])

    def answer(self, text: str) -> Tensor:
        """Return an answer and what ends it, int64 ``[tokens]``."""
        return torch.cat([encode_text(self.tokenizer, self._glue + text.strip()), self.end])


def end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that closes a document: end of sequence, or else what separates or pads."""
    for name in ("eos", "sep", "pad", "bos"):
        if (token := getattr(tokenizer, f"{name}_token_id")) is not None:
            return int(token)
    return 0


def sequences(data: TrainingData, options: DataOptions, shortest: int, asking: Asking, seed: int) -> Examples:
    """Return documents and questions as sequences of at most ``options.sequence_tokens`` tokens."""
    longest, end = options.sequence_tokens, end_token(asking.tokenizer)
    shortest = max(shortest, options.shortest)
    packs = options.packing == "pack"
    documents = Rows(data, longest, end, seed) if packs else Documents(data, shortest, longest, end)
    return Joined([documents, Answers(data.questions, asking, shortest, longest)])


def cut(ids: Tensor, at: float, longest: int) -> Tensor:
    """Cut a text to a length around the place ``at`` (0: its beginning, 1: its end)."""
    start = min(max(0, round(at * len(ids)) - longest // 2), max(0, len(ids) - longest))
    return ids[start : start + longest]


def tokens_of(array: Any) -> Tensor:
    """Return stored tokens as int64 ``[tokens]``."""
    return torch.from_numpy(np.asarray(array).astype(np.int64))
