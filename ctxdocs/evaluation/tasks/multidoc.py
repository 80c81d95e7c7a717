"""The document with the answer among others without it, first, last or between (Liu et al., arXiv 2307.03172)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from ctxdocs.datasets import record_id
from ctxdocs.datasets.records import holds_answer
from ctxdocs.errors import InputError
from ctxdocs.evaluation.reading import ContextReader
from ctxdocs.evaluation.task import AskingTask, Example
from ctxdocs.evaluation.tasks.qa import ANSWER_METRICS, cluster_of, graded


class MultiDocument(AskingTask):
    """Answer from several documents, each compressed alone, of which one holds the answer."""

    name = "multidoc"
    needs = "questions"
    metrics = ANSWER_METRICS
    groups = ("documents", "position")
    readings = ("memory", "text", "none")

    @dataclass(frozen=True)
    class Options(AskingTask.Options):
        """What can be set: how many documents, where the right one stands (percent), and questions to draw from."""

        documents: tuple[int, ...] = (2, 4, 8)
        positions: tuple[int, ...] = (0, 50, 100)
        pool: int = 1000

    def examples(self, reader: ContextReader, seed: int, limit: int) -> list[Example]:
        """Take every question to one cell of the grid after another, so that the cells are compared on the same ones.

        Distractors are contexts of other questions in which no right answer stands.
        """
        questions = []
        for question in itertools.islice(self.data.questions(seed), self.options.pool):
            if question.answers and question.relevant:
                questions.append(question)
            else:
                self.left_out["questions that their contexts do not answer"] += 1
        others = list({question.contexts[question.relevant[0]]: None for question in questions})
        cells = list(itertools.product(self.options.documents, self.options.positions))
        found: list[Example] = []
        for question in questions:
            rng = self.random(seed, record_id(question))
            right = question.contexts[question.relevant[0]]
            candidates = (text for text in rng.sample(others, len(others)) if text != right)
            wrong = list(
                itertools.islice(
                    (text for text in candidates if not holds_answer(text, question.answers)),
                    max(self.options.documents) - 1,
                )
            )
            if len(wrong) < max(self.options.documents) - 1:
                self.left_out["questions with too few documents that do not answer them"] += 1
                continue
            for count, position in cells:
                place = round((count - 1) * position / 100)
                contexts = (*wrong[:place], right, *wrong[place : count - 1])
                labels = {"documents": count, "position": position}
                name = f"{record_id(question)}/{count}/{position}"
                cluster = cluster_of(question)
                found.append(Example(name, contexts, question.question, question.answers, labels, cluster))
            if len(found) >= limit:
                break
        if questions and not found:
            raise InputError(
                f"{len(others)} different contexts are too few for {max(self.options.documents)} documents",
                "give more questions, or fewer documents: --option multidoc.documents=2,3",
            )
        return found[:limit]

    def grade(self, output: str, example: Example) -> dict[str, float]:
        """Score the answer against the one it fits best."""
        return graded(output, example.answers)
