"""LongBench (Bai et al., arXiv 2308.14508), from its files.

Contexts, answers and scores are the benchmark's. The question is asked in the model's own prompt format, so that every
model reads it as it was trained; the instruction in front of it is worded here.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from ctxdocs.evaluation.benchmarks import BenchmarkTask, Parts, strings, text, unknown_dataset
from ctxdocs.evaluation.data import Line
from ctxdocs.evaluation.metrics import edit_similarity, rouge_l, word_f1
from ctxdocs.evaluation.reading import ContextReader, Given
from ctxdocs.evaluation.task import Example
from ctxdocs.prompts import Prompt


class _Set(NamedTuple):
    """How a data set is scored, its bound of new tokens, and what stands in front of its ``input``."""

    score: str
    tokens: int
    instruction: str = ""


_SETS = {
    "narrativeqa": _Set("f1", 128),
    "qasper": _Set("f1", 128),
    "multifieldqa_en": _Set("f1", 64),
    "hotpotqa": _Set("f1", 32),
    "2wikimqa": _Set("f1", 32),
    "musique": _Set("f1", 32),
    "triviaqa": _Set("f1", 32),
    "gov_report": _Set("rouge", 512, "Summarise the report on one page."),
    "qmsum": _Set("rouge", 512),
    "multi_news": _Set("rouge", 512, "Summarise all the news on one page."),
    "samsum": _Set("rouge", 128, "Summarise this dialogue as the examples do. "),
    "trec": _Set("class", 64, "Name the type of this question as the examples do. "),
    "passage_count": _Set("number", 32, "How many different paragraphs are there, not counting any of them twice?"),
    "passage_retrieval_en": _Set(
        "paragraph", 32, "Which paragraph (Paragraph 1, Paragraph 2 ...) is summarised here? "
    ),
    "lcc": _Set("code", 64),
    "repobench-p": _Set("code", 64),
}
#: Sets of examples, where models go on with further ones: only the first line counts.
_ONE_LINE = {"trec", "triviaqa", "samsum"}


class LongBench(BenchmarkTask):
    """Answer the questions of LongBench's English sets, and complete its code."""

    name = "longbench"
    keys = ("input", "context", "answers", "dataset")

    def dataset(self, line: Line) -> str:
        """Return the line's ``dataset``; the even version's sets are scored alike."""
        return str(line.values["dataset"]).removesuffix("_e")

    def parts(self, line: Line, dataset: str) -> Parts:
        """Put the set's instruction in front of the input."""
        if dataset not in _SETS:
            raise unknown_dataset(line, dataset, _SETS)
        chosen = _SETS[dataset]
        classes = line.values.get("all_classes") or []
        question = f"{chosen.instruction}{text(line, 'input')}".strip()
        extra = {"classes": [str(name) for name in classes]}
        return Parts(text(line, "context"), question, strings(line, "answers"), chosen.tokens, extra)

    def prompt(self, reader: ContextReader, given: Given, example: Example) -> Prompt:
        """Ask; code is gone on with as it stands."""
        if _SETS[str(example.labels["dataset"])].score == "code":
            return reader.behind(given, example.question or "\n")
        return reader.ask(given, example.question)

    def grade(self, output: str, example: Example) -> dict[str, float]:
        """Score against the answer that fits best."""
        dataset = str(example.labels["dataset"])
        found = output.lstrip("\n").split("\n")[0] if dataset in _ONE_LINE else output
        kind = _SETS[dataset].score
        if kind == "f1":
            return {"score": word_f1(found, example.answers)}
        if kind == "class":
            return {"score": max(_class_score(found, wanted, example.extra["classes"]) for wanted in example.answers)}
        scores = {"rouge": rouge_l, "number": _number_score, "paragraph": _paragraph_score, "code": _code_score}
        return {"score": max(scores[kind](found, wanted) for wanted in example.answers)}


def _class_score(found: str, wanted: str, classes: list[str]) -> float:
    """One over the number of classes named, if the right one is among them; parts of its name do not count."""
    named = [name for name in classes if name in found and not (name in wanted and name != wanted)]
    return 1 / len(named) if wanted in named else 0.0


def _number_score(found: str, wanted: str) -> float:
    """Share of the numbers in the answer that are right."""
    numbers = re.findall(r"\d+", found)
    return numbers.count(wanted.strip()) / len(numbers) if numbers else 0.0


def _paragraph_score(found: str, wanted: str) -> float:
    """Share of the numbers in the answer that are the right paragraph's."""
    number = re.search(r"Paragraph (\d+)", wanted)
    return _number_score(found, number[1] if number else wanted)


def _code_score(found: str, wanted: str) -> float:
    """Similarity of the first line that is no comment and no fence."""
    lines = [line for line in found.lstrip("\n").split("\n") if not any(mark in line for mark in ("`", "#", "//"))]
    return edit_similarity(lines[0] if lines else "", wanted)
