"""In-context learning: demonstrations compressed group by group, and a label scored behind them.

As AutoCompressor (arXiv 2305.14788) has it: every option's mean log-probability is taken, and from it, where scores
are calibrated, the option's mean log-probability for an input that says nothing; the best one is the answer.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from ctxdocs.datasets import record_id
from ctxdocs.errors import InputError
from ctxdocs.evaluation.reading import ContextReader
from ctxdocs.evaluation.task import Example, Metric, Result, Task

_KINDS = {
    "animal": "badger otter falcon trout beetle heron weasel salmon sparrow hedgehog mole pike swallow hare newt",
    "tool": "hammer chisel plane pliers rasp trowel spanner mallet auger sickle tongs crowbar awl bellows clamp",
    "dish": "porridge dumpling omelette stew pancake chowder risotto trifle crumble goulash paella strudel broth",
    "garment": "jacket stocking bonnet apron waistcoat mitten scarf tunic slipper overcoat petticoat sash shawl",
    "instrument": "fiddle trumpet harp bassoon drum flute mandolin organ cello oboe lute piccolo accordion zither",
    "vessel": "kayak schooner ferry barge dinghy trawler cutter canoe steamer yawl lugger tugboat frigate raft",
}
_LABELS = ("amber", "cobalt", "crimson", "indigo", "olive", "scarlet", "violet", "walnut")
#: The most answers that a file's questions may have in common to be its labels.
_MOST_LABELS = 20
_CONTENT_FREE = "N/A"


class Classification(Task):
    """Label an input as demonstrations do, which are compressed group by group.

    Made up, words of a few kinds bear labels that only the demonstrations tell. From given questions, the answers are
    the labels, where few, or else each question's options.
    """

    name = "classification"
    metrics = (Metric("accuracy", "label right"), Metric("uncalibrated", "label right, not calibrated"))

    @dataclass(frozen=True)
    class Options(Task.Options):
        """What can be set: demonstrations and their groups, labels, and where inputs come from.

        ``examples`` is ``made-up`` or ``questions``.
        """

        demonstrations: int = 16
        groups: int = 4
        labels: int = 3
        examples: str = "made-up"

    def examples(self, reader: ContextReader, seed: int, limit: int) -> list[Example]:
        """Draw every example's demonstrations anew."""
        if self.options.examples == "made-up":
            return [self._made_up(seed, number) for number in range(limit)]
        if self.options.examples != "questions":
            raise InputError(f"unknown examples {self.options.examples!r}", "choose made-up or questions")
        return self._from_questions(seed, limit)

    def run(self, reader: ContextReader, examples: Sequence[Example]) -> list[Result]:
        """Score all options of all examples, behind the input and behind one that says nothing."""
        given = reader.give([example.contexts for example in examples])
        prompts, targets = [], []
        for here, example in zip(given, examples, strict=True):
            for asked, option in itertools.product((example.question, _CONTENT_FREE), example.extra["options"]):
                prompts.append(reader.behind(here, _demonstration(asked, "")))
                targets.append(reader.ids(" " + option))
        scores = iter([score.mean for score in reader.likelihoods(prompts, targets)])
        results = []
        for here, example in zip(given, examples, strict=True):
            options = example.extra["options"]
            plain, free = ([next(scores) for _ in options] for _ in range(2))
            calibrated = [score - base for score, base in zip(plain, free, strict=True)]
            chosen = options[calibrated.index(max(calibrated))]
            metrics = {
                "accuracy": float(chosen in example.answers),
                "uncalibrated": float(options[plain.index(max(plain))] in example.answers),
            }
            results.append(Result(metrics, here.costs, chosen))
        return results

    def _made_up(self, seed: int, number: int) -> Example:
        rng = self.random(seed, number)
        count = self.options.labels
        if not 2 <= count <= min(len(_KINDS), len(_LABELS)):
            raise InputError(f"{count} labels cannot be made up", f"between 2 and {min(len(_KINDS), len(_LABELS))}")
        kinds = dict(zip(rng.sample(list(_KINDS), count), rng.sample(_LABELS, count), strict=True))
        words = {kind: rng.sample(_KINDS[kind].split(), len(_KINDS[kind].split())) for kind in kinds}
        asked = rng.choice(list(kinds))
        question = words[asked].pop()
        names = itertools.islice(itertools.cycle(kinds), self.options.demonstrations)
        shown = [(words[kind][place // count % len(words[kind])], kinds[kind]) for place, kind in enumerate(names)]
        return self._example(f"{number}", shown, question, (kinds[asked],), tuple(kinds.values()), rng)

    def _from_questions(self, seed: int, limit: int) -> list[Example]:
        wanted = limit + self.options.demonstrations
        questions = [q for q in itertools.islice(self.data.questions(seed), 4 * wanted) if q.answers]
        labels = tuple(dict.fromkeys(question.answers[0] for question in questions))
        if len(labels) > _MOST_LABELS and not all(question.options for question in questions):
            raise InputError(
                f"the questions have {len(labels)} different answers, and no options to choose from",
                f"labels are at most {_MOST_LABELS}, or every question has options",
            )
        found = []
        for number, question in enumerate(questions[:limit]):
            rng = self.random(seed, record_id(question))
            others = [other for other in questions if other is not question]
            drawn = rng.sample(others, min(self.options.demonstrations, len(others)))
            shown = [(other.question, other.answers[0]) for other in drawn]
            options = question.options or labels
            found.append(self._example(f"{number}", shown, question.question, question.answers, options, rng))
        return found

    def _example(
        self,
        name: str,
        shown: list[tuple[str, str]],
        question: str,
        answers: tuple[str, ...],
        options: tuple[str, ...],
        rng: Random,
    ) -> Example:
        rng.shuffle(shown)
        size = -(-len(shown) // self.options.groups)
        groups = [shown[start : start + size] for start in range(0, len(shown), size)]
        contexts = tuple("".join(_demonstration(*pair) + "\n\n" for pair in group) for group in groups)
        return Example(name, contexts, question, answers, extra={"options": options})


def _demonstration(text: str, label: str) -> str:
    return f"Input: {text}\nOutput:" + (f" {label}" if label else "")
