"""Questions about several documents: the right contexts among others, or among others only."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Literal, NamedTuple

from ctxdocs.datasets.drawing import generator, in_random_order, weighted
from ctxdocs.datasets.nearest import WordIndex
from ctxdocs.datasets.records import Question, holds_answer, record_id
from ctxdocs.errors import InputError

#: Where a distractor is drawn from: other titles, the same title, or what shares most words with the question.
Distractors = Literal["random", "same-title", "nearest"]
KINDS = ("random", "same-title", "nearest")
_NEAREST = 20


class PooledContext(NamedTuple):
    """A context that may stand beside another question.

    ``title`` is that of its question, or the text itself where there is none.
    """

    text: str
    title: str
    source: str


class ContextPool:
    """The contexts of many questions, each once.

    Parameters
    ----------
    questions : iterable of Question
        Of one split: a pool over all of them would bring held-out texts into training.
    """

    def __init__(self, questions: Iterable[Question]) -> None:
        seen: dict[tuple[str, str], PooledContext] = {}
        for question in questions:
            for text in question.contexts:
                title = question.title.strip().lower() or text
                seen.setdefault((question.source, text), PooledContext(text, title, question.source))
        self.contexts = list(seen.values())
        self.by_source: dict[str, list[int]] = defaultdict(list)
        self.by_title: dict[tuple[str, str], list[int]] = defaultdict(list)
        for index, context in enumerate(self.contexts):
            self.by_source[context.source].append(index)
            self.by_title[context.source, context.title].append(index)

    def __len__(self) -> int:
        return len(self.contexts)

    @cached_property
    def words(self) -> WordIndex:
        """BM25 over all contexts, built when first asked for."""
        return WordIndex([context.text for context in self.contexts])


def mix_contexts(
    question: Question,
    pool: ContextPool,
    *,
    contexts: int = 4,
    distractors: Distractors | Mapping[Distractors, float] = "random",
    unanswerable: float = 0.0,
    seed: int = 0,
    epoch: int = 0,
) -> Question:
    """Put a question's relevant contexts among distractors, in random order.

    The seed, the epoch and the question decide what comes out, whatever other questions there are. A context that
    holds an answer is no distractor. The question's own further contexts come first, then those of the pool, from
    the same ``source``.

    Parameters
    ----------
    question : Question
        One without contexts stays as it is.
    pool : ContextPool
        Where distractors come from.
    contexts : int, optional
        How many contexts there are in the end; more if more are relevant, fewer if the pool has no more to give.
    distractors : str or mapping of str to float, optional
        ``"random"``: of other titles. ``"same-title"``: other passages of the same title, for questions whose answer
        stands in their context as it is (of others one cannot tell whether a passage answers them). ``"nearest"``:
        those of other titles that share most words with the question (BM25). A mapping gives the share of each. Where
        one kind has no more to give, random ones stand in.
    unanswerable : float, optional
        Share of the questions whose relevant contexts are left out; ``answers`` and ``relevant`` are then empty.
    seed, epoch : int, optional
        The same two give the same contexts.

    Raises
    ------
    InputError
        If an argument is out of range.
    """
    shares = _shares(distractors)
    if contexts < 1 or not 0 <= unanswerable <= 1:
        raise InputError(
            f"{contexts} contexts, and {unanswerable} of the questions unanswerable", "at least 1, and from 0 to 1"
        )
    if not question.contexts:
        return question
    rng = generator(seed, epoch, record_id(question))
    left_out = rng.random() < unanswerable
    right = [] if left_out else [question.contexts[index] for index in question.relevant]
    own = [text for index, text in enumerate(question.contexts) if index not in question.relevant]
    wanted = max(contexts - len(right), 0)
    wrong = list(itertools.islice(in_random_order(own, rng), wanted))
    wrong += _draw(question, pool, shares, wanted - len(wrong), rng)
    together = [*((text, True) for text in right), *((text, False) for text in wrong)]
    mixed = list(in_random_order(together, rng))
    return replace(
        question,
        answers=() if left_out else question.answers,
        contexts=tuple(text for text, _ in mixed),
        relevant=tuple(index for index, (_, is_right) in enumerate(mixed) if is_right),
    )


def _shares(distractors: Distractors | Mapping[Distractors, float]) -> dict[str, float]:
    shares: dict[str, float] = {distractors: 1.0} if isinstance(distractors, str) else dict(distractors.items())
    if not shares or not set(shares) <= set(KINDS) or min(shares.values()) < 0 or not sum(shares.values()):
        raise InputError(f"distractors cannot be {distractors!r}", f"one of {', '.join(KINDS)}, or the share of each")
    return shares


def _draw(question: Question, pool: ContextPool, shares: dict[str, float], count: int, rng: random.Random) -> list[str]:
    stands = any(holds_answer(question.contexts[index], question.answers) for index in question.relevant)
    candidates = {kind: _candidates(kind, question, pool, stands, count, rng) for kind in ("random", *shares)}
    chosen: list[str] = []

    def fits(text: str) -> bool:
        taken = text in question.contexts or text in chosen
        return not taken and not (stands and holds_answer(text, question.answers))

    while len(chosen) < count:
        kind = list(shares)[weighted(list(shares.values()), rng)]
        found = next(filter(fits, itertools.chain(candidates[kind], candidates["random"])), None)
        if found is None:
            break
        chosen.append(found)
    return chosen


def _candidates(
    kind: str, question: Question, pool: ContextPool, stands: bool, count: int, rng: random.Random
) -> Iterator[str]:
    title = question.title.strip().lower()
    titles = {title} if title else set(question.contexts)
    if kind == "same-title":
        if stands and title:
            inside = pool.by_title.get((question.source, title), ())
            yield from (pool.contexts[index].text for index in in_random_order(inside, rng))
        return
    if kind == "nearest":
        for index in pool.words.nearest(question.question, _NEAREST + count):
            if pool.contexts[index].title not in titles and pool.contexts[index].source == question.source:
                yield pool.contexts[index].text
        return
    for index in in_random_order(pool.by_source.get(question.source, ()), rng):
        if pool.contexts[index].title not in titles:
            yield pool.contexts[index].text
