"""RULER (Hsieh et al., arXiv 2404.06654), from files that its scripts wrote."""

from __future__ import annotations

import re

from ctxdocs.evaluation.benchmarks import BenchmarkTask, Parts, strings, text
from ctxdocs.evaluation.data import Line
from ctxdocs.evaluation.metrics import contains
from ctxdocs.evaluation.reading import ContextReader, Given
from ctxdocs.evaluation.task import Example
from ctxdocs.prompts import Prompt

#: Bound of new tokens, by how a data set's name begins.
_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}


class Ruler(BenchmarkTask):
    """Answer RULER's synthetic questions.

    A line has ``input`` and ``outputs``. The last line of the input asks, everything in front of it is the context;
    where ``answer_prefix`` is a field of its own, it goes behind the question. Scored is the share of outputs that
    stand in the answer, and for ``qa`` whether one does.
    """

    name = "ruler"
    keys = ("input", "outputs")
    stop = ()  # the benchmark looks at all that was written

    def dataset(self, line: Line) -> str:
        """Return the name in the line's ``dataset`` or ``task``, or that of the file or its folder."""
        named = line.values.get("dataset") or line.values.get("task") or f"{line.path.parent.name}/{line.path.name}"
        found = re.findall(r"(?:niah|vt|cwe|fwe|qa)(?:_[a-z0-9]+)*", str(named).lower())
        return found[-1] if found else "niah"

    def parts(self, line: Line, dataset: str) -> Parts:
        """Cut the input in front of its last line."""
        whole = text(line, "input").rstrip("\n")
        context, border, question = whole.rpartition("\n")
        question += str(line.values.get("answer_prefix") or "")
        tokens = _TOKENS.get(dataset.partition("_")[0], 128)
        return Parts(context + border, question, strings(line, "outputs"), tokens, {})

    def prompt(self, reader: ContextReader, given: Given, example: Example) -> Prompt:
        """Put the question behind the context as the file has it: it brings the beginning of the answer along."""
        return reader.behind(given, example.question)

    def grade(self, output: str, example: Example) -> dict[str, float]:
        """Look for the outputs."""
        found = [contains(output, wanted) for wanted in example.answers]
        any_is_right = str(example.labels["dataset"]).startswith("qa")
        return {"score": max(found) if any_is_right else sum(found) / len(found)}
