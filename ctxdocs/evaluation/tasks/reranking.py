"""Passages ranked by how likely the question is behind each of them (AutoCompressor, arXiv 2305.14788)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from ctxdocs.datasets import record_id
from ctxdocs.evaluation.reading import ContextReader
from ctxdocs.evaluation.task import Example, Metric, Result, Task
from ctxdocs.evaluation.tasks.qa import cluster_of
from ctxdocs.reranking import question_likelihoods


class Reranking(Task):
    """Rank passages by the likelihood of the question behind each one's memory, or behind its text."""

    name = "reranking"
    needs = "questions"
    metrics = (Metric("mrr", "reciprocal rank"), Metric("recall@1", "right one first"), Metric("recall@3", "in three"))
    readings = ("memory", "text")

    @dataclass(frozen=True)
    class Options(Task.Options):
        """What can be set: passages to rank, and questions whose contexts they are drawn from."""

        passages: int = 10
        pool: int = 1000

    def examples(self, reader: ContextReader, seed: int, limit: int) -> list[Example]:
        """Put the right passage behind wrong ones: contexts of other questions, those of the same title first.

        The right one stands last, so that passages that cannot be told apart do it no favour.
        """
        questions = list(itertools.islice(self.data.questions(seed), self.options.pool))
        passages = {question.contexts[i]: question.title for question in questions for i in question.relevant}
        found: dict[str, Example] = {}
        for question in questions:
            if not question.relevant or not question.answers:
                self.left_out["questions that their contexts do not answer"] += 1
                continue
            right = question.contexts[question.relevant[0]]
            rng = self.random(seed, record_id(question))
            drawn = [text for text in rng.sample(list(passages), len(passages)) if text not in question.contexts]
            wrong = sorted(drawn, key=lambda text: passages[text] != question.title)[: self.options.passages - 1]
            if len(wrong) < self.options.passages - 1:
                self.left_out["questions with too few other passages"] += 1
                continue
            name, cluster = record_id(question), cluster_of(question)
            found[name] = Example(name, (*wrong, right), question.question, question.answers, cluster=cluster)
            if len(found) == limit:
                break
        return list(found.values())

    def run(self, reader: ContextReader, examples: Sequence[Example]) -> list[Result]:
        """Score every passage of every question in one go."""
        given = reader.give([example.contexts for example in examples])
        with reader.timed("read"):
            scores = question_likelihoods(
                reader.compressor, [example.question for example in examples], [here.sources for here in given]
            )
        results = []
        for values, here in zip(scores, given, strict=True):
            rank = sum(value >= values[-1] for value in values)
            metrics = {"mrr": 1 / rank, "recall@1": float(rank <= 1), "recall@3": float(rank <= 3)}
            results.append(Result(metrics, here.costs))
        return results
