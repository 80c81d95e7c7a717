"""How well a text goes on behind what came before: the protocol of AutoCompressor (arXiv 2305.14788)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ctxdocs.evaluation.reading import ContextReader
from ctxdocs.evaluation.task import LOSS, Example, Metric, Result, Task


class Perplexity(Task):
    """Loss of the next tokens of a document, given those in front of them."""

    name = "perplexity"
    needs = "documents"
    metrics = (LOSS, Metric("accuracy", "next token right"))

    @dataclass(frozen=True)
    class Options(Task.Options):
        """What can be set: tokens in front, tokens that are scored, and stretches per document at most."""

        context_tokens: int = 512
        tokens: int = 128
        stretches: int = 4

    def examples(self, reader: ContextReader, seed: int, limit: int) -> list[Example]:
        """Take stretches spread evenly over each document, until there are enough."""
        size = self.options.context_tokens + self.options.tokens
        found: list[Example] = []
        for number, document in enumerate(self.data.documents(seed)):
            ids = reader.ids(document.text)
            count = min(self.options.stretches, len(ids) // size)
            if not count:
                self.left_out[f"documents of less than {size} tokens"] += 1
            for part in range(count):
                start = part * (len(ids) - size) // max(count - 1, 1)
                context, rest = ids[start : start + size].split([self.options.context_tokens, self.options.tokens])
                name = f"{number}.{part}"
                found.append(Example(name, (context,), cluster=f"{number}", extra={"next": rest}))
            if len(found) >= limit:
                break
        return found[:limit]

    def run(self, reader: ContextReader, examples: Sequence[Example]) -> list[Result]:
        """Score all tokens but the first: behind nothing, there is nothing to predict that one by."""
        given = reader.give([example.contexts for example in examples])
        rests = [example.extra["next"] for example in examples]
        prompts = [reader.behind(here, rest[:1]) for here, rest in zip(given, rests, strict=True)]
        scores = reader.likelihoods(prompts, [rest[1:] for rest in rests])
        return [
            Result({"loss": -score.mean, "accuracy": float(score.greedy.float().mean())}, here.costs)
            for score, here in zip(scores, given, strict=True)
        ]
