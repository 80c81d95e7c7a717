"""What memories are worth: losses given nothing, a memory, the text; on documents no training has seen."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ctxdocs import generation
from ctxdocs.compressors.autocompressor import AutoCompressor
from ctxdocs.datasets.tokens import TokenSequences
from ctxdocs.memory import Memory
from ctxdocs.training.bundled.batches import ANSWER_ID, END_ID, QUESTION_ID
from ctxdocs.training.bundled.data import Questions, Split

#: What stands in front of a continuation. ``other memory`` is that of another document: the control.
CONTEXTS = ("nothing", "memory", "other memory", "text")
DOCUMENT_TOKENS = 256
CONTINUATION_TOKENS = 64
WINDOWS_PER_DOCUMENT = 4
_WINDOWS_AT_ONCE = 32
_RESAMPLES = 2000
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


@torch.inference_mode()
def evaluate(compressor: AutoCompressor, split: Split) -> dict[str, Any]:
    """Measure a compressor on a split.

    Continuations: up to four stretches of 256 + 64 tokens per document, spread evenly; the loss is that of the 64
    tokens but the first, in nats per token, given the 256 as text, their memory, the memory of another document, or
    nothing. Questions: the loss of the answer, and F1 of the words of the greedy answer.

    Returns
    -------
    dict
        ``continuation`` and ``gain`` (what each context saves against nothing), by context, over all documents and by
        source; ``answer_loss`` and ``answer_f1``. Leaves are :class:`Figure`.
    """
    compressor.eval()
    losses: dict[str, NDArray[np.float64]] = {}
    owners: dict[str, NDArray[np.int64]] = {}
    for name, packed in split.texts.items():
        windows, owner = _windows(packed)
        if len(windows):
            losses[name] = _continuation_losses(compressor, windows)
            owners[name] = owner + sum(len(other) for other in split.texts.values()) * len(owners)
    everything, owner = np.concatenate(list(losses.values())), np.concatenate(list(owners.values()))
    return {
        "continuation": _by_context(everything, owner),
        "gain": _by_context(everything[:, :1] - everything, owner),
        "continuation_by_source": {name: _by_context(losses[name], owners[name]) for name in losses},
        **_answers(compressor, split.questions),
    }


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


def _continuation_losses(compressor: AutoCompressor, windows: Tensor) -> NDArray[np.float64]:
    """Return ``[windows, contexts]``."""
    rows = []
    memories = torch.cat(
        [_summaries(compressor, part[:, :DOCUMENT_TOKENS]) for part in windows.split(_WINDOWS_AT_ONCE)]
    )
    # Half the windows away lies another document, but for very long ones.
    others = memories.roll(len(memories) // 2, dims=0)
    for at in torch.arange(len(windows)).split(_WINDOWS_AT_ONCE):
        document, rest = windows[at].to(compressor.backbone.device).split([DOCUMENT_TOKENS, CONTINUATION_TOKENS], dim=1)
        nothing = compressor.empty_softprompt(len(at))
        contexts = {
            "nothing": (nothing, rest),
            "memory": (memories[at], rest),
            "other memory": (others[at], rest),
            "text": (nothing, torch.cat([document, rest], dim=1)),
        }
        rows.append(torch.stack([_loss(compressor, *contexts[name]) for name in CONTEXTS], dim=1))
    return torch.cat(rows).double().cpu().numpy()


def _summaries(compressor: AutoCompressor, documents: Tensor) -> Tensor:
    return compressor.segment(documents.to(compressor.backbone.device), compressor.empty_softprompt(len(documents)))[1]


def _loss(compressor: AutoCompressor, softprompt: Tensor, ids: Tensor) -> Tensor:
    """Return the mean loss of the continuation but its first token, ``[rows]``."""
    states, _ = compressor.segment(ids, softprompt, summarise=False)
    logits = compressor.backbone.head(states[:, -CONTINUATION_TOKENS:-1]).float()
    targets = ids[:, -CONTINUATION_TOKENS + 1 :]
    return functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(dim=1)


def _by_context(values: NDArray[np.float64], owner: NDArray[np.int64]) -> dict[str, Figure]:
    return {name: bootstrap(values[:, column], owner) for column, name in enumerate(CONTEXTS)}


def bootstrap(values: NDArray[np.float64], owner: NDArray[np.int64]) -> Figure:
    """Return the mean over owners of their mean value, with an interval from resampled owners."""
    _, number = np.unique(owner, return_inverse=True)
    means = np.bincount(number, weights=values) / np.bincount(number)
    rng = np.random.default_rng(0)
    resampled = means[rng.integers(len(means), size=(_RESAMPLES, len(means)))].mean(axis=1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Figure(float(means.mean()), float(low), float(high), len(means))


def _answers(compressor: AutoCompressor, questions: Questions) -> dict[str, dict[str, Figure]]:
    """Return ``answer_loss`` and ``answer_f1`` by context; a document is a question's context."""
    count = len(questions.context_of)
    chosen = np.linspace(0, count - 1, min(count, _QUESTION_LIMIT)).astype(int)
    owner = questions.context_of[chosen]
    losses: dict[str, list[float]] = {name: [] for name in CONTEXTS}
    scores: dict[str, list[float]] = {name: [] for name in CONTEXTS}
    for index, context in zip(chosen, owner, strict=True):
        question, answer = (
            torch.from_numpy(packed[index].astype(np.int64)) for packed in (questions.questions, questions.answers)
        )
        for name, parts in _sources(compressor, questions, int(context)):
            asked = torch.cat([torch.tensor([QUESTION_ID]), question, torch.tensor([ANSWER_ID])])
            losses[name].append(_answer_loss(compressor, [*parts, asked], answer))
            found = generation.generate(
                compressor, [[*parts, asked]], generation.GenerationOptions(max_new_tokens=_ANSWER_TOKENS)
            )[0].text
            scores[name].append(word_f1(found, compressor.tokenizer.decode(answer)))  # type: ignore[union-attr, arg-type]
    return {
        "answer_loss": {name: bootstrap(np.array(values), owner) for name, values in losses.items()},
        "answer_f1": {name: bootstrap(np.array(values), owner) for name, values in scores.items()},
    }


def _sources(
    compressor: AutoCompressor, questions: Questions, context: int
) -> Iterator[tuple[str, list[Tensor | Memory]]]:
    """Yield what stands in front of a question, as a library's prompt has it: a source, and the end token."""
    end = torch.tensor([END_ID])
    other = (context + len(questions.contexts) // 2) % len(questions.contexts)
    texts = [torch.from_numpy(questions.contexts[index].astype(np.int64)) for index in (context, other)]
    memories = compressor.compress_ids(texts)
    yield "nothing", []
    yield "memory", [memories[0], end]
    yield "other memory", [memories[1], end]
    yield "text", [texts[0], end]


def _answer_loss(compressor: AutoCompressor, prompt: list[Tensor | Memory], answer: Tensor) -> float:
    targets = torch.cat([answer, torch.tensor([END_ID])]).to(compressor.backbone.device)
    row = compressor.model_input([*prompt, answer])
    states = compressor.backbone.run(row.embeds[None], row.positions[None])[0, -len(targets) :]
    return float(functional.cross_entropy(compressor.backbone.head(states).float(), targets))


def word_f1(found: str, wanted: str) -> float:
    """Return the F1 of the words of an answer, lower-cased, without punctuation and articles."""
    words = [
        Counter(word for word in re.findall(r"\w+", text.lower()) if word not in {"a", "an", "the"})
        for text in (found, wanted)
    ]
    common = sum((words[0] & words[1]).values())
    return 2 * common / (words[0].total() + words[1].total()) if common else 0.0
