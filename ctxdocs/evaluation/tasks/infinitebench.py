"""InfiniteBench (Zhang et al., arXiv 2402.13718), from its files; the data set is the file's name.

Contexts and answers are the benchmark's, the question is asked in the model's own prompt format. Left out are
``math_calc``, which asks for tens of thousands of new tokens, and the Chinese set.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from ctxdocs.evaluation.benchmarks import BenchmarkTask, Parts, strings, text, unknown_dataset
from ctxdocs.evaluation.data import Line
from ctxdocs.evaluation.metrics import contains, normalised, rouge_l, word_f1
from ctxdocs.evaluation.task import Example


class _Set(NamedTuple):
    """How a data set is scored, its bound of new tokens, and what stands behind its ``input``."""

    score: str
    tokens: int
    instruction: str = ""


_SETS = {
    "passkey": _Set("contains", 6),
    "number_string": _Set("contains", 12),
    "kv_retrieval": _Set("contains", 50),
    "longbook_sum_eng": _Set("rouge", 1200, "Summarise the book."),
    "longbook_qa_eng": _Set("f1", 40),
    "longdialogue_qa_eng": _Set("contains", 40, "Who is meant by $$MASK$$?"),
    "longbook_choice_eng": _Set("choice", 40),
    "code_debug": _Set("choice", 5),
    "code_run": _Set("number", 5),
    "math_find": _Set("number", 3),
}


class InfiniteBench(BenchmarkTask):
    """Answer InfiniteBench's English questions about books, dialogues, code and numbers."""

    name = "infinitebench"
    keys = ("input", "context", "answer")

    def dataset(self, line: Line) -> str:
        """Return the file's name."""
        return line.path.name.partition(".")[0]

    def parts(self, line: Line, dataset: str) -> Parts:
        """Ask the input, with the choices under their letters."""
        if dataset not in _SETS:
            raise unknown_dataset(line, dataset, _SETS)
        chosen = _SETS[dataset]
        question = f"{text(line, 'input')} {chosen.instruction}".strip()
        options = [str(option) for option in line.values.get("options") or []]
        if chosen.score == "choice":
            question += "".join(f"\n{letter}. {option}" for letter, option in zip("ABCDEFGH", options, strict=False))
        return Parts(text(line, "context"), question, strings(line, "answer"), chosen.tokens, {"options": options})

    def grade(self, output: str, example: Example) -> dict[str, float]:
        """Score against the answer that fits best."""
        kind = _SETS[str(example.labels["dataset"])].score
        if kind == "f1":
            return {"score": word_f1(output, example.answers)}
        if kind == "choice":
            return {"score": float(_choice(output, example.extra["options"]) in example.answers)}
        scores = {"contains": contains, "rouge": rouge_l, "number": _last_number_is}
        return {"score": max(scores[kind](output, wanted) for wanted in example.answers)}


def _choice(output: str, options: list[str]) -> str:
    """Return the option that the answer names by its letter, or in words; nothing if it names none, or several."""
    letter = re.match(r"\W*([A-H])\b", output)
    if letter and (index := "ABCDEFGH".index(letter[1])) < len(options):
        return options[index]
    named = [option for option in options if normalised(option) and normalised(option) in normalised(output)]
    return named[0] if len(named) == 1 else ""


def _last_number_is(output: str, wanted: str) -> float:
    found, right = (re.findall(r"-?\d+(?:\.\d+)?", text) for text in (output, wanted))
    return float(bool(found and right) and float(found[-1]) == float(right[-1]))
