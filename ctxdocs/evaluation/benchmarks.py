"""What tasks share that read a benchmark's own files: sampling, cutting, and one score per data set."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, ClassVar

from ctxdocs.errors import DocumentError, InputError
from ctxdocs.evaluation.data import Line
from ctxdocs.evaluation.reading import ContextReader
from ctxdocs.evaluation.task import AskingTask, Example, Metric


class BenchmarkTask(AskingTask):
    """Lines of a benchmark's files, each with a context, a question and answers, and a score that its data set has."""

    needs = "lines"
    metrics = (Metric("score", "score"),)
    groups = ("dataset",)

    #: Keys that a line must have.
    keys: ClassVar[tuple[str, ...]]

    @dataclass(frozen=True)
    class Options(AskingTask.Options):
        """What can be set: 0 takes the data set's own number of new tokens, and contexts as long as they are.

        Longer contexts are cut in the middle, as LongBench does.
        """

        max_new_tokens: int = 0
        max_context_tokens: int = 0

    @abc.abstractmethod
    def dataset(self, line: Line) -> str:
        """Return the name of the line's data set."""

    @abc.abstractmethod
    def parts(self, line: Line, dataset: str) -> Parts:
        """Return what the line asks.

        Raises
        ------
        InputError
            If the data set is unknown.
        """

    def examples(self, reader: ContextReader, seed: int, limit: int) -> list[Example]:
        """Draw ``limit`` lines of every data set."""
        drawn: dict[str, list[tuple[int, Line]]] = {}
        seen: dict[str, int] = {}
        rng = self.random(seed)
        for number, line in enumerate(self.data.lines()):
            if missing := [key for key in self.keys if key not in line.values]:
                raise DocumentError(
                    f"{line.place}: no {missing[0]!r}, which every line of a {self.name} file has",
                    f"is it a file of this kind? keys: {', '.join(sorted(line.values))}",
                )
            name = self.dataset(line)
            count = seen[name] = seen.get(name, 0) + 1
            kept = drawn.setdefault(name, [])
            if count <= limit:
                kept.append((number, line))
            elif (place := rng.randrange(count)) < limit:
                kept[place] = (number, line)
        return [
            self._example(reader, number, line, name) for name, lines in drawn.items() for number, line in sorted(lines)
        ]

    def new_tokens(self, example: Example) -> int:
        """Return the data set's own bound, unless another one was set."""
        return self.options.max_new_tokens or example.extra["tokens"]

    def _example(self, reader: ContextReader, number: int, line: Line, dataset: str) -> Example:
        parts = self.parts(line, dataset)
        context, limit = parts.context, self.options.max_context_tokens
        if limit and len(ids := reader.ids(context)) > limit:
            ends = ids[: limit // 2], ids[len(ids) - limit // 2 :]
            context = "".join(str(reader.tokenizer.decode(end)) for end in ends)
        extra = {"tokens": parts.tokens, **parts.extra}
        return Example(f"{number}", (context,), parts.question, parts.answers, {"dataset": dataset}, extra=extra)


@dataclass(frozen=True)
class Parts:
    """What one line asks.

    Parameters
    ----------
    context, question : str
        What is compressed, and what is asked about it.
    answers : tuple of str
        As the data set has them.
    tokens : int
        Bound of an answer's tokens.
    extra : dict
        What grading needs besides.
    """

    context: str
    question: str
    answers: tuple[str, ...]
    tokens: int
    extra: dict[str, Any]


def strings(line: Line, key: str) -> tuple[str, ...]:
    """Return a value that is a string, a number or a list of them as strings.

    Raises
    ------
    DocumentError
        If it is something else.
    """
    values = line.values[key] if isinstance(line.values[key], list) else [line.values[key]]
    if not values or not all(isinstance(value, (str, int, float)) for value in values):
        raise DocumentError(f"{line.place}: {key!r} holds neither strings nor numbers", "was the file converted?")
    return tuple(str(value) for value in values)


def text(line: Line, key: str) -> str:
    """Return a string.

    Raises
    ------
    DocumentError
        If it is something else.
    """
    value = line.values[key]
    if not isinstance(value, str):
        raise DocumentError(f"{line.place}: {key!r} is no string", "was the file converted?")
    return value


def unknown_dataset(line: Line, dataset: str, known: Any) -> InputError:
    """Return the error of a data set that nobody here can grade."""
    return InputError(f"{line.place}: unknown data set {dataset!r}", f"known: {', '.join(sorted(known))}")
