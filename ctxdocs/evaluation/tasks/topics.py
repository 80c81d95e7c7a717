"""The first topic of a long conversation about many (LongEval: Li et al. 2023, "How long can open-source LLMs ...")."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from ctxdocs.evaluation.metrics import says, word_f1
from ctxdocs.evaluation.reading import ContextReader
from ctxdocs.evaluation.task import AskingTask, Example, Metric

_SUBJECTS = (
    "beekeeping", "tidal power", "chess openings", "stained glass", "bread baking", "lighthouses", "mountain rescue",
    "clockmaking", "coral reefs", "letterpress printing", "night trains", "mushroom picking", "violin making",
    "desert gardens", "bird migration", "canal locks", "comic books", "cave paintings", "glaciers", "shipwrecks",
    "public libraries", "solar eclipses", "orchard keeping", "sign languages", "puppet theatre", "salt mining",
    "kite flying", "sheep farming", "street markets", "weather balloons", "silk weaving", "stone bridges",
)  # fmt: skip
_SIDES = ("the history of", "the future of", "the cost of", "the joys of", "the science of", "the dangers of")
_TURNS = (
    ("Where would you begin?", "With a good book, and then with somebody who does it every day."),
    ("Is that not rather slow?", "It is, but whoever hurries has to begin again."),
    ("What do most people get wrong?", "They take the first answer for the last one."),
    ("Does it depend on the season?", "Less than people say, and more than they plan for."),
    ("Who knows most about it?", "Those who have stopped talking about it, as a rule."),
    ("Would you try it yourself?", "I would, given a free week and dry shoes."),
    ("And what if it fails?", "Then you know one more thing that does not work."),
)


class Topics(AskingTask):
    """Name the first topic of a conversation about many."""

    name = "topics"
    metrics = (Metric("accuracy", "topic found"), Metric("f1", "word F1"))
    groups = ("topics",)

    @dataclass(frozen=True)
    class Options(AskingTask.Options):
        """What can be set: how many topics, and turns on each."""

        max_new_tokens: int = 24
        topics: tuple[int, ...] = (4, 8, 16)
        turns: int = 3

    def examples(self, reader: ContextReader, seed: int, limit: int) -> list[Example]:
        """Go through the numbers of topics in turn."""
        return [self._example(seed, number) for number in range(limit)]

    def grade(self, output: str, example: Example) -> dict[str, float]:
        """Look for the topic's name."""
        topic = example.answers[0]
        return {"accuracy": says(output, topic), "f1": word_f1(output, [topic])}

    def _example(self, seed: int, number: int) -> Example:
        rng = self.random(seed, number)
        count = self.options.topics[number % len(self.options.topics)]
        names = [f"{rng.choice(_SIDES)} {subject}" for subject in rng.sample(_SUBJECTS, count)]
        record = "\n".join(self._talk(rng, name) for name in names)
        question = "What is the first topic that was discussed?"
        return Example(f"{number}", (record,), question, (names[0],), {"topics": count})

    def _talk(self, rng: Random, topic: str) -> str:
        lines = [f"USER: I would like to discuss the topic of {topic}.", "ASSISTANT: Gladly. Ask me anything."]
        for question, answer in rng.sample(_TURNS, self.options.turns):
            lines += [f"USER: {question}", f"ASSISTANT: {answer}"]
        return "\n".join([*lines, f"USER: That was all about {topic}. On to the next topic."])
