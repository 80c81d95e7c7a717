"""Batches of the three kinds of rows a step learns from. Step ``n`` always draws the same batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ctxdocs.training.bundled import sources
from ctxdocs.training.bundled.data import Questions, Split
from ctxdocs.training.bundled.recipe import Recipe
from ctxdocs.training.bundled.tokenizer import ANSWER, DOCUMENT, END, PADDING, QUESTION, SPECIAL_TOKENS

Ids = NDArray[np.int64]

DOCUMENT_ID, QUESTION_ID, ANSWER_ID, END_ID, PADDING_ID = (
    SPECIAL_TOKENS.index(token) for token in (DOCUMENT, QUESTION, ANSWER, END, PADDING)
)
#: A question's own tokens teach what a document is about; its answer is what counts.
QUESTION_WEIGHT = 0.3
#: How often a row begins with a question that its document leaves open.
NOT_FOUND_RATE = 0.05
#: How often a context that fits is looked for.
_DRAWS = 50


@dataclass(frozen=True)
class Rows:
    """Rows of one length and how much each token counts as a target.

    Parameters
    ----------
    ids : torch.Tensor
        int64 ``[rows, tokens]``.
    weights : torch.Tensor
        float32 ``[rows, tokens]``.
    """

    ids: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Batch:
    """What one step learns from.

    Parameters
    ----------
    documents : torch.Tensor
        int64 ``[documents, tokens]``, compressed each alone.
    reads : Rows
        Read behind memories: first continuations, then rebuilt documents, then questions.
    memories : torch.Tensor
        int64 ``[rows of reads, memories]``: the documents whose memories stand in front, the right one among them.
    kinds : dict of str to slice
        Rows of ``reads`` that are ``continuation``, ``rebuilt`` and ``answers``.
    closed : bool
        Whether the end token follows every memory, where the method puts it there.
    ratio : int
        Tokens per slot.
    plain : Rows
        Text as it stands, and documents with questions behind them; weights are those of the text.
    plain_answers : torch.Tensor
        float32 like ``plain.weights``: how much the tokens of questions and answers count.
    """

    documents: Tensor
    reads: Rows
    memories: Tensor
    kinds: dict[str, slice]
    closed: bool
    ratio: int
    plain: Rows
    plain_answers: Tensor


class Batches:
    """Draws batches from a split.

    Parameters
    ----------
    split : Split
        Prepared data.
    recipe : Recipe
        Sizes.
    seed : int
        With the step's number it decides everything, so that a resumed run goes on where it stopped.
    """

    def __init__(self, split: Split, recipe: Recipe, seed: int = 0) -> None:
        self.recipe, self.seed = recipe, seed
        self._texts = [split.texts[source.name] for source in sources.TEXTS]
        self._questions, self._cloze, self._not_found = split.questions, split.cloze, split.not_found
        self._starts: dict[tuple[int, int], NDArray[np.int64]] = {}

    def batch(self, step: int) -> Batch:
        """Draw the batch of a step."""
        recipe, rng = self.recipe, np.random.default_rng((self.seed, step))
        length, room = int(rng.choice(recipe.document_tokens)), recipe.read_tokens
        count = int(rng.integers(1, recipe.most_memories + 1))
        half = max(1, recipe.rows // 2)
        windows = np.stack([self._window(rng, length + room) for _ in range(recipe.rows)])
        rebuilt = rng.permutation(recipe.rows)[:half]
        asked = [self._asked(rng, length) for _ in range(recipe.asked)]
        documents = np.concatenate([windows[:, :length], [ids for ids, _, _ in asked]])
        again = windows[rebuilt, : min(room - 1, length)]
        again = np.pad(again, ((0, 0), (1, room - 1 - again.shape[1])), constant_values=PADDING_ID)
        again[:, 0] = DOCUMENT_ID
        reads = np.concatenate([windows[:, length:], again, [ids for _, ids, _ in asked]])
        weights = np.concatenate([np.ones((recipe.rows, room)), again != PADDING_ID, [w for _, _, w in asked]])
        right = np.concatenate([np.arange(recipe.rows), rebuilt, recipe.rows + np.arange(recipe.asked)])
        return Batch(
            documents=torch.from_numpy(documents),
            reads=Rows(torch.from_numpy(reads), torch.from_numpy(weights).float()),
            memories=torch.from_numpy(self._among_others(rng, right, count, len(documents))),
            kinds={
                "continuation": slice(0, recipe.rows),
                "rebuilt": slice(recipe.rows, recipe.rows + half),
                "answers": slice(recipe.rows + half, None),
            },
            closed=bool(step % 2),
            ratio=int(rng.choice(recipe.ratios)),
            **self._plain(rng),
        )

    def token_frequencies(self, sample: int = 1_000_000) -> Tensor:
        """Return the share of every token in the running text, float32 ``[vocabulary]``."""
        counts = sum(
            np.bincount(packed.tokens[:sample], minlength=self.recipe.vocabulary) / min(sample, len(packed.tokens))
            for packed in self._texts
        )
        return torch.from_numpy(np.asarray(counts) / len(self._texts)).float()

    def _plain(self, rng: np.random.Generator) -> dict[str, Any]:
        recipe = self.recipe
        tokens, room = int(rng.choice(recipe.text_tokens)), recipe.read_tokens
        rows = max(2, recipe.plain_tokens // tokens)
        texts = [self._window(rng, tokens) for _ in range(rows - rows // 2)]
        asked = [self._asked(rng, tokens - room - 1) for _ in range(rows // 2)]
        behind = [np.concatenate([document, [END_ID], ids]) for document, ids, _ in asked]
        is_text, answers = np.ones((rows, tokens)), np.zeros((rows, tokens))
        is_text[len(texts) :, tokens - room :] = 0
        answers[len(texts) :, tokens - room :] = [weight for _, _, weight in asked]
        return {
            "plain": Rows(torch.from_numpy(np.stack(texts + behind)), torch.from_numpy(is_text).float()),
            "plain_answers": torch.from_numpy(answers).float(),
        }

    def _asked(self, rng: np.random.Generator, tokens: int) -> tuple[Ids, Ids, NDArray[np.float64]]:
        """Draw a document and questions about it, of people or made of the text."""
        questions = self._cloze if rng.random() < self.recipe.cloze else self._questions
        return question_document(rng, questions, tokens, self.recipe.read_tokens, self._not_found)

    def _window(self, rng: np.random.Generator, tokens: int) -> Ids:
        """Draw a stretch of one document: a source by its weight, then every possible stretch alike."""
        shares = np.array([source.weight for source in sources.TEXTS]) * [
            self._starts_of(index, tokens)[-1] > 0 for index in range(len(self._texts))
        ]
        chosen = int(rng.choice(len(self._texts), p=shares / shares.sum()))
        starts, packed = self._starts_of(chosen, tokens), self._texts[chosen]
        place = int(rng.integers(starts[-1]))
        document = int(np.searchsorted(starts, place, side="right")) - 1
        start = packed.offsets[document] + place - starts[document]
        return packed.tokens[start : start + tokens].astype(np.int64)

    def _starts_of(self, index: int, tokens: int) -> NDArray[np.int64]:
        """Return, cumulated over documents, at how many places a stretch of that length can start."""
        key = (index, tokens)
        if key not in self._starts:
            places = np.maximum(self._texts[index].lengths - tokens + 1, 0)
            self._starts[key] = np.concatenate([[0], np.cumsum(places)])
        return self._starts[key]

    @staticmethod
    def _among_others(rng: np.random.Generator, right: Ids, count: int, documents: int) -> Ids:
        """Return ``count`` documents per row, the right one at a random place among different ones."""
        others = (right[:, None] + 1 + np.argsort(rng.random((len(right), documents - 1)), axis=1)) % documents
        chosen = np.concatenate([right[:, None], others[:, : count - 1]], axis=1)
        return rng.permuted(chosen, axis=1)


def question_document(
    rng: np.random.Generator, questions: Questions, tokens: int, room: int, not_found: Ids
) -> tuple[Ids, Ids, NDArray[np.float64]]:
    """Join contexts to a document of exactly ``tokens`` tokens, and pack questions about them into a row.

    Returns
    -------
    document : numpy.ndarray
        int64 ``[tokens]``: whole contexts in random order, the last one cut.
    row : numpy.ndarray
        int64 ``[room]``: question, answer, end, and so on, padded.
    weights : numpy.ndarray
        float64 ``[room]``.
    """
    whole: list[int] = []
    used = 0
    for _ in range(_DRAWS):
        context = int(rng.choice(questions.context_of))
        size = len(questions.contexts[context]) + 1
        if used + size <= tokens and context not in whole:
            whole.append(context)
            used += size
        elif whole:
            break
    rng.shuffle(whole)
    pieces = [np.append(questions.contexts[c].astype(np.int64), END_ID) for c in whole]
    document = np.concatenate([*pieces, questions.contexts[context].astype(np.int64)])[:tokens]
    return np.pad(document, (0, tokens - len(document)), constant_values=END_ID), *_question_row(
        rng, questions, whole, room, not_found
    )


def _question_row(
    rng: np.random.Generator, questions: Questions, contexts: list[int], room: int, not_found: Ids
) -> tuple[Ids, NDArray[np.float64]]:
    """Pack questions about the contexts into a row; now and then, one about another context comes first."""
    row, weights = np.full(room, PADDING_ID, dtype=np.int64), np.zeros(room)
    asked = np.concatenate(
        [
            np.arange(
                np.searchsorted(questions.context_of, context), np.searchsorted(questions.context_of, context, "right")
            )
            for context in contexts
        ]
        or [np.empty(0, np.int64)]
    )
    filled, open_question = 0, int(rng.integers(len(questions.context_of)))
    leaves_open = rng.random() < NOT_FOUND_RATE and questions.context_of[open_question] not in contexts
    for index in [*([open_question] if leaves_open else []), *rng.permutation(asked)]:
        question = questions.questions[index]
        answer: NDArray[Any] = questions.answers[index]
        if leaves_open and index == open_question:
            answer = not_found
        ids = np.concatenate([[QUESTION_ID], question, [ANSWER_ID], answer, [END_ID]])
        if filled + len(ids) <= room:
            stretch = slice(filled, filled + len(ids))
            row[stretch] = ids
            weights[stretch] = [0.0] + [QUESTION_WEIGHT] * len(question) + [0.0] + [1.0] * (len(answer) + 1)
            filled += len(ids)
    return row, weights
