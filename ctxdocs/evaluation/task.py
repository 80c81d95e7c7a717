"""What a task is: examples from a seed, a way to run them, and a row of metrics for each."""

from __future__ import annotations

import abc
import dataclasses
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from ctxdocs.errors import InputError
from ctxdocs.evaluation.reading import READINGS, ContextReader, Given
from ctxdocs.prompts import Prompt

if TYPE_CHECKING:
    from torch import Tensor

    from ctxdocs.evaluation.data import Data


@dataclass(frozen=True)
class Metric:
    """One number that a task measures for every example.

    Parameters
    ----------
    name : str
        Its key in rows and results.
    label : str
        Its name for people.
    better : {"higher", "lower"}
        Which is better.
    unit : {"%", "nats"}
        Scores from 0 to 1 are shown in percent; a loss in nats per token is shown as a perplexity too.
    """

    name: str
    label: str
    better: str = "higher"
    unit: str = "%"

    def written(self, value: float) -> str:
        """Return a value as it is shown: in percent, or in nats."""
        return f"{100 * value:.1f}" if self.unit == "%" else f"{value:.3f}"


LOSS = Metric("loss", "loss per token", "lower", "nats")


@dataclass(frozen=True)
class Example:
    """One thing to try.

    Parameters
    ----------
    id : str
        The same for the same seed, whatever the model.
    contexts : tuple of (str or torch.Tensor)
        What is given as memory, as text, or not at all: texts, or token ids.
    question : str
        What is asked about them.
    answers : tuple of str
        Each of them is right.
    labels : dict
        What results are broken down by: a length, a depth, a data set.
    cluster : str
        Examples of one cluster are resampled together; by default an example is a cluster of its own.
    extra : dict
        What only the task itself needs.
    """

    id: str
    contexts: tuple[str | Tensor, ...] = ()
    question: str = ""
    answers: tuple[str, ...] = ()
    labels: Mapping[str, str | int | float] = field(default_factory=dict)
    cluster: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What came of one example.

    Parameters
    ----------
    metrics : dict
        Values by the names of the task's metrics; a metric that does not apply is left out.
    costs : dict
        ``context_tokens``, ``slots`` and ``bytes``, see :class:`~ctxdocs.evaluation.reading.Given`.
    output : str
        What the model wrote, if it wrote something.
    """

    metrics: Mapping[str, float]
    costs: Mapping[str, int]
    output: str = ""


class Task(abc.ABC):
    """One thing that memories can be good at.

    Parameters
    ----------
    data : Data
        The files that were given.
    **options
        Fields of the class's ``Options``.

    Raises
    ------
    InputError
        If the task has no such option.
    """

    name: ClassVar[str]
    #: What it needs of ``--data``: ``"nothing"``, ``"documents"``, ``"questions"``, or ``"lines"`` of its own format.
    needs: ClassVar[str] = "nothing"
    #: The first one is the task's own; the others explain it.
    metrics: ClassVar[tuple[Metric, ...]]
    #: Labels that results are broken down by; two of them make a heat map.
    groups: ClassVar[tuple[str, ...]] = ()
    readings: ClassVar[tuple[str, ...]] = READINGS

    @dataclass(frozen=True)
    class Options:
        """What can be set."""

    def __init__(self, data: Data, **options: Any) -> None:
        known = {option.name for option in dataclasses.fields(self.Options)}
        if unknown := sorted(options.keys() - known):
            raise InputError(
                f"the task {self.name} has no option {unknown[0]!r}", f"it has: {', '.join(sorted(known)) or 'none'}"
            )
        self.data = data
        self.options: Any = self.Options(**options)
        #: Records that made no example, by the reason.
        self.left_out: Counter[str] = Counter()

    @abc.abstractmethod
    def examples(self, reader: ContextReader, seed: int, limit: int) -> list[Example]:
        """Return at most ``limit`` examples; the same seed gives the same ones, in the same order."""

    @abc.abstractmethod
    def run(self, reader: ContextReader, examples: Sequence[Example]) -> list[Result]:
        """Try examples as one batch, each as if it stood alone."""

    def close(self) -> None:  # noqa: B027 - for tasks that hold files
        """Give back what the task holds."""

    def random(self, seed: int, *place: object) -> random.Random:
        """Return a random generator of its own for one place of the task, so that no example depends on another."""
        return random.Random("/".join(map(str, (self.name, seed, *place))))


class AskingTask(Task):
    """A task that asks a question about contexts and grades the answer."""

    #: Strings that end an answer; None is those of the model's prompt format.
    stop: ClassVar[tuple[str, ...] | None] = None

    @dataclass(frozen=True)
    class Options(Task.Options):
        """What can be set."""

        max_new_tokens: int = 32

    @abc.abstractmethod
    def grade(self, output: str, example: Example) -> dict[str, float]:
        """Return the metrics of an answer."""

    def prompt(self, reader: ContextReader, given: Given, example: Example) -> Prompt:
        """Return the prompt; by default the one in which a library asks."""
        return reader.ask(given, example.question)

    def new_tokens(self, example: Example) -> int:
        """Return the upper bound of an answer's tokens."""
        return self.options.max_new_tokens

    def scored(
        self, reader: ContextReader, prompts: Sequence[Prompt], examples: Sequence[Example]
    ) -> list[dict[str, float]]:
        """Return metrics that are measured without an answer being written; by default none."""
        return [{} for _ in examples]

    def run(self, reader: ContextReader, examples: Sequence[Example]) -> list[Result]:
        """Ask all examples in one batch."""
        given = reader.give([example.contexts for example in examples])
        prompts = [self.prompt(reader, *pair) for pair in zip(given, examples, strict=True)]
        outputs = reader.generate(prompts, [self.new_tokens(example) for example in examples], self.stop)
        scored = self.scored(reader, prompts, examples)
        return [
            Result({**self.grade(output, example), **more}, here.costs, output)
            for output, example, more, here in zip(outputs, examples, scored, given, strict=True)
        ]
