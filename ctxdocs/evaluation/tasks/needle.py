"""A fact at a chosen depth of a text of a chosen length: the needle in a haystack, as a grid."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from ctxdocs.evaluation.haystacks import Filler, haystack, hidden
from ctxdocs.evaluation.metrics import rouge_l_recall, says
from ctxdocs.evaluation.reading import ContextReader
from ctxdocs.evaluation.task import AskingTask, Example, Metric

_KEEPERS = ("Orsolya", "Benedikt", "Marguerite", "Tobias", "Philippa", "Casimir", "Henrietta", "Lorcan", "Wilhelmina")
_THINGS = ("key to the tower", "oldest map", "signal flag", "spare lantern", "silver whistle", "visitors' book")
_PLACES = ("a copper kettle", "the piano stool", "a hollow oak", "the flour bin", "a red hatbox", "the boot room",
           "an empty birdcage", "the coal cellar", "a wicker basket", "the linen drawer", "a cracked vase",
           "the organ loft", "a tin of buttons", "the dovecote", "a painted chest", "the pump house")  # fmt: skip


class Needle(AskingTask):
    """Find a fact that stands at a given depth of a text of a given length."""

    name = "needle"
    metrics = (Metric("accuracy", "answer found"), Metric("recall", "ROUGE-L recall"))
    groups = ("length", "depth")

    @dataclass(frozen=True)
    class Options(AskingTask.Options):
        """What can be set: the grid (tokens, and percent of them), and the text, ``made-up`` or ``documents``."""

        max_new_tokens: int = 16
        lengths: tuple[int, ...] = (256, 512, 1024)
        depths: tuple[int, ...] = (0, 25, 50, 75, 100)
        text: str = "made-up"

    def examples(self, reader: ContextReader, seed: int, limit: int) -> list[Example]:
        """Go through the cells of the grid in turn, so that all hold alike many examples, or one more."""
        cells = list(itertools.product(self.options.lengths, self.options.depths))
        filler = Filler(self.options.text, self.data, seed)
        return [self._example(reader, filler, seed, number, *cells[number % len(cells)]) for number in range(limit)]

    def grade(self, output: str, example: Example) -> dict[str, float]:
        """Look for the place's last word, which no other place has."""
        answer = example.answers[0]
        return {"accuracy": says(output, answer.split()[-1]), "recall": rouge_l_recall(output, answer)}

    def _example(
        self, reader: ContextReader, filler: Filler, seed: int, number: int, length: int, depth: int
    ) -> Example:
        rng = self.random(seed, number)
        who, thing, place = rng.choice(_KEEPERS), rng.choice(_THINGS), rng.choice(_PLACES)
        needle = f"{who} hid the {thing} in {place}."
        room = length - len(reader.ids(" " + needle))
        text = hidden(haystack(filler.sentences(rng), reader.tokenizer, room), needle, depth / 100)
        question = f"Where did {who} hide the {thing}?"
        return Example(f"{number}", (text,), question, (place,), {"length": length, "depth": depth})
