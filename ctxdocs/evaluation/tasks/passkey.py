"""A five-digit key somewhere in a long text, to be said again (Mohtashami and Jaggi, arXiv 2305.16300)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ctxdocs.evaluation.haystacks import Filler, haystack, hidden
from ctxdocs.evaluation.metrics import edit_similarity
from ctxdocs.evaluation.reading import ContextReader
from ctxdocs.evaluation.task import AskingTask, Example, Metric

_QUESTION = "What is the pass key?"


class Passkey(AskingTask):
    """Say a five-digit key that stands somewhere in a long text."""

    name = "passkey"
    metrics = (Metric("accuracy", "key right"), Metric("digits", "digits right"))
    groups = ("length",)

    @dataclass(frozen=True)
    class Options(AskingTask.Options):
        """What can be set: lengths in tokens, and whether the text is ``made-up`` or from ``documents``."""

        max_new_tokens: int = 16
        lengths: tuple[int, ...] = (256, 512, 1024)
        text: str = "made-up"

    def examples(self, reader: ContextReader, seed: int, limit: int) -> list[Example]:
        """Go through the lengths in turn; every example has its own text, key and depth."""
        filler = Filler(self.options.text, self.data, seed)
        return [self._example(reader, filler, seed, number) for number in range(limit)]

    def grade(self, output: str, example: Example) -> dict[str, float]:
        """Look at the first run of digits in the answer."""
        key = example.answers[0]
        digits = (re.findall(r"\d+", output) or [""])[0]
        return {"accuracy": float(digits == key), "digits": edit_similarity(digits, key)}

    def _example(self, reader: ContextReader, filler: Filler, seed: int, number: int) -> Example:
        rng = self.random(seed, number)
        length = self.options.lengths[number % len(self.options.lengths)]
        key = f"{rng.randrange(10_000, 100_000)}"
        needle = f"The pass key is {key}. Remember it: {key} is the pass key."
        room = length - len(reader.ids(" " + needle))
        sentences = haystack(filler.sentences(rng), reader.tokenizer, room)
        text = hidden(sentences, needle, rng.random())
        return Example(f"{number}", (text,), _QUESTION, (key,), {"length": length})
