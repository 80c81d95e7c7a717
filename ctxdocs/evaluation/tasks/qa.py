"""Questions about contexts: SQuAD's exact match and F1 (arXiv 1606.05250), and the loss of the right answer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from ctxdocs.datasets import Question, record_id
from ctxdocs.evaluation import metrics
from ctxdocs.evaluation.reading import ContextReader
from ctxdocs.evaluation.task import LOSS, AskingTask, Example, Metric
from ctxdocs.prompts import Prompt

ANSWER_METRICS = (Metric("f1", "word F1"), Metric("em", "exact match"))


def graded(output: str, answers: Sequence[str]) -> dict[str, float]:
    """Return the two scores of an answer."""
    return {"f1": metrics.word_f1(output, answers), "em": metrics.exact_match(output, answers)}


class QuestionAnswering(AskingTask):
    """Answer questions about their contexts; each context is compressed alone."""

    name = "qa"
    needs = "questions"
    metrics = (*ANSWER_METRICS, LOSS)

    @dataclass(frozen=True)
    class Options(AskingTask.Options):
        """What can be set: what is right to say where the contexts hold no answer, besides nothing at all."""

        no_answer: str = "not in the documents"

    def examples(self, reader: ContextReader, seed: int, limit: int) -> list[Example]:
        """Take questions in shuffled order; those about one context are one cluster."""
        found: dict[str, Example] = {}
        for question in self.data.questions(seed):
            name = record_id(question)
            if not question.contexts or name in found:
                self.left_out["questions that are there twice" if name in found else "questions without contexts"] += 1
                continue
            answers = question.answers or (self.options.no_answer, "")
            found[name] = Example(name, question.contexts, question.question, answers, cluster=cluster_of(question))
            if len(found) == limit:
                break
        return list(found.values())

    def grade(self, output: str, example: Example) -> dict[str, float]:
        """Score the answer against the one it fits best."""
        return graded(output, example.answers)

    def scored(
        self, reader: ContextReader, prompts: Sequence[Prompt], examples: Sequence[Example]
    ) -> list[dict[str, float]]:
        """Score the first right answer: where what was written is wrong either way, the loss still tells it apart."""
        scores = reader.likelihoods(prompts, [reader.ids(" " + example.answers[0]) for example in examples])
        return [{"loss": -score.mean} for score in scores]


def cluster_of(question: Question) -> str:
    """Return what questions of one document share: its title, or else a digest of their contexts."""
    return question.title or hashlib.sha256("\0".join(question.contexts).encode()).hexdigest()[:16]
