"""What memories are worth: losses given nothing, a memory, the text; on documents no training has seen."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ctxdocs import generation
from ctxdocs.compressors.autocompressor import AutoCompressor
from ctxdocs.compressors.base import Compressor
from ctxdocs.datasets.tokens import TokenSequences
from ctxdocs.evaluation import statistics
from ctxdocs.likelihood import likelihoods
from ctxdocs.memory import Memory
from ctxdocs.training.bundled.batches import ANSWER_ID, END_ID, QUESTION_ID
from ctxdocs.training.bundled.data import Questions, Split
from ctxdocs.training.bundled.tokenizer import END

#: What all contexts are compared with. ``other memory`` is that of another document: the control.
NOTHING = "nothing"
#: Tokens per slot that memories are measured at, but summary vectors.
RATIOS = (4, 8)
DOCUMENT_TOKENS = 256
CONTINUATION_TOKENS = 64
WINDOWS_PER_DOCUMENT = 4
_WINDOWS_AT_ONCE = 32
_QUESTION_LIMIT = 300
_ANSWER_TOKENS = 24


@dataclass(frozen=True)
class Figure:
    """A mean over documents with its 95 % bootstrap interval.

    Parameters
    ----------
    mean, low, high : float
        Documents count alike, whatever their number of windows.
    documents : int
        Documents behind it.
    """

    mean: float
    low: float
    high: float
    documents: int


def evaluate(compressor: Compressor, split: Split) -> dict[str, Any]:
    """Measure a compressor on a split.

    Continuations: up to four stretches of 256 + 64 tokens per document, spread evenly; the loss is that of the 64
    tokens but the first, in nats per token, given the 256 as text, their memory (at every ratio of the compressor's),
    the memory of another document, or nothing. Questions: the loss of the answer, and F1 of the words of the greedy
    answer.

    Returns
    -------
    dict
        ``continuation`` and ``gain`` (what each context saves against nothing), by context, over all documents and by
        source; ``answer_loss`` and ``answer_f1``. Leaves are :class:`Figure`.
    """
    compressor.eval()
    losses: dict[str, dict[str, NDArray[np.float64]]] = {}
    owners: dict[str, NDArray[np.int64]] = {}
    for name, packed in split.texts.items():
        windows, owner = _windows(packed)
        if len(windows):
            losses[name] = _continuation_losses(compressor, windows)
            owners[name] = owner + sum(len(other) for other in split.texts.values()) * len(owners)
    contexts = next(iter(losses.values()))
    everything = {context: np.concatenate([part[context] for part in losses.values()]) for context in contexts}
    owner = np.concatenate(list(owners.values()))
    return {
        "continuation": _figures(everything, owner),
        "gain": _figures({name: everything[NOTHING] - values for name, values in everything.items()}, owner),
        "continuation_by_source": {name: _figures(losses[name], owners[name]) for name in losses},
        **_answers(compressor, split.questions),
    }


def contexts_of(
    compressor: Compressor, texts: Sequence[Tensor], others: Sequence[Tensor]
) -> dict[str, list[list[Tensor | Memory]]]:
    """Return what stands in front of a continuation or a question, by name of the context, one entry for each text."""
    closing = [torch.tensor([END_ID])] if END in compressor.prompt_format.memory else []

    def read(documents: Sequence[Tensor]) -> list[list[Tensor | Memory]]:
        return [[memory, *closing] for memory in compressor.compress_ids(documents)]

    found: dict[str, list[list[Tensor | Memory]]] = {NOTHING: [[] for _ in texts]}
    if isinstance(compressor, AutoCompressor):
        found["memory"] = read(texts)
    else:
        for ratio in RATIOS:
            with compressor.configured(**compressor.settings_at_ratio(ratio)):
                found[f"memory {ratio}x"] = read(texts)
    found["other memory"] = read(others)
    found["text"] = [[text] for text in texts]
    return found


def _windows(packed: TokenSequences) -> tuple[Tensor, NDArray[np.int64]]:
    size = DOCUMENT_TOKENS + CONTINUATION_TOKENS
    windows: list[Tensor] = []
    owner: list[int] = []
    for index in range(len(packed)):
        ids = packed[index].astype(np.int64)
        count = min(WINDOWS_PER_DOCUMENT, len(ids) // size)
        starts = np.linspace(0, len(ids) - size, count).astype(int)
        windows += [torch.from_numpy(ids[start : start + size]) for start in starts.tolist()]
        owner += [index] * count
    return (torch.stack(windows) if windows else torch.empty(0, size)), np.array(owner, dtype=np.int64)


def _continuation_losses(compressor: Compressor, windows: Tensor) -> dict[str, NDArray[np.float64]]:
    """Return the loss of every window's continuation, by context."""
    documents, rest = windows.split([DOCUMENT_TOKENS, CONTINUATION_TOKENS], dim=1)
    # Half the windows away lies another document, but for very long ones.
    others = documents.roll(len(documents) // 2, dims=0)
    parts: dict[str, list[float]] = defaultdict(list)
    for at in torch.arange(len(windows)).split(_WINDOWS_AT_ONCE):
        for name, contexts in contexts_of(compressor, list(documents[at]), list(others[at])).items():
            prompts = [[*context, row[:1]] for context, row in zip(contexts, rest[at], strict=True)]
            parts[name] += [-found.mean for found in likelihoods(compressor, prompts, list(rest[at, 1:]))]
    return {name: np.array(values) for name, values in parts.items()}


def _figures(values: dict[str, NDArray[np.float64]], owner: NDArray[np.int64]) -> dict[str, Figure]:
    return {name: bootstrap(each, owner) for name, each in values.items()}


def bootstrap(values: NDArray[np.float64], owner: NDArray[np.int64]) -> Figure:
    """Return the mean over owners of their mean value, with an interval from resampled owners."""
    _, number = np.unique(owner, return_inverse=True)
    found = statistics.bootstrap(np.bincount(number, weights=values) / np.bincount(number))
    return Figure(found.mean, found.low, found.high, found.count)


def _answers(compressor: Compressor, questions: Questions) -> dict[str, dict[str, Figure]]:
    """Return ``answer_loss`` and ``answer_f1`` by context; a document is a question's context."""
    count = len(questions.context_of)
    chosen = np.linspace(0, count - 1, min(count, _QUESTION_LIMIT)).astype(int)
    losses: dict[str, list[float]] = defaultdict(list)
    scores: dict[str, list[float]] = defaultdict(list)
    options = generation.GenerationOptions(max_new_tokens=_ANSWER_TOKENS)
    tokenizer: Any = compressor.tokenizer
    end = torch.tensor([END_ID])
    for part in np.array_split(chosen, -(-len(chosen) // _WINDOWS_AT_ONCE)):
        owner = questions.context_of[part]
        texts, others = (
            [torch.from_numpy(questions.contexts[int(index)].astype(np.int64)) for index in indices]
            for indices in (owner, (owner + len(questions.contexts) // 2) % len(questions.contexts))
        )
        asked, answers = (
            [torch.from_numpy(packed[int(index)].astype(np.int64)) for index in part]
            for packed in (questions.questions, questions.answers)
        )
        asked = [torch.cat([torch.tensor([QUESTION_ID]), row, torch.tensor([ANSWER_ID])]) for row in asked]
        for name, contexts in contexts_of(compressor, texts, others).items():
            closed = [[*context, end] if name == "text" else context for context in contexts]
            prompts = [[*context, row] for context, row in zip(closed, asked, strict=True)]
            targets = [torch.cat([answer, end]) for answer in answers]
            losses[name] += [-found.mean for found in likelihoods(compressor, prompts, targets)]
            generated = generation.generate(compressor, prompts, options)
            scores[name] += [
                word_f1(found.text, tokenizer.decode(answer)) for found, answer in zip(generated, answers, strict=True)
            ]
    owner = questions.context_of[chosen]
    return {
        "answer_loss": _figures({name: np.array(values) for name, values in losses.items()}, owner),
        "answer_f1": _figures({name: np.array(values) for name, values in scores.items()}, owner),
    }


def word_f1(found: str, wanted: str) -> float:
    """Return the F1 of the words of an answer, lower-cased, without punctuation and articles."""
    words = [
        Counter(word for word in re.findall(r"\w+", text.lower()) if word not in {"a", "an", "the"})
        for text in (found, wanted)
    ]
    common = sum((words[0] & words[1]).values())
    return 2 * common / (words[0].total() + words[1].total()) if common else 0.0
