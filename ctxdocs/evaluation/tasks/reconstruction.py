"""A text written again from its memory: how much of the wording is still there (RCC, arXiv 2406.06110)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ctxdocs.evaluation import metrics
from ctxdocs.evaluation.reading import ContextReader
from ctxdocs.evaluation.task import LOSS, Example, Metric, Result, Task


class Reconstruction(Task):
    """Write a text again from its memory."""

    name = "reconstruction"
    needs = "documents"
    metrics = (Metric("bleu", "BLEU-4"), Metric("accuracy", "token right"), LOSS)

    @dataclass(frozen=True)
    class Options(Task.Options):
        """What can be set: tokens of a text, and what stands between its memory and the text written again.

        The prompt may hold special tokens; models that were trained to reconstruct have one of their own.
        """

        tokens: int = 128
        prompt: str = "\n\nThe same text again:\n\n"

    def __init__(self, data: Any, **options: Any) -> None:
        super().__init__(data, **options)
        metrics.bleu("", "")  # says now what is missing, not after hours

    def examples(self, reader: ContextReader, seed: int, limit: int) -> list[Example]:
        """Take the beginning of each document."""
        found: list[Example] = []
        for number, document in enumerate(self.data.documents(seed)):
            ids = reader.ids(document.text)[: self.options.tokens]
            if len(ids) < self.options.tokens:
                self.left_out[f"documents of less than {self.options.tokens} tokens"] += 1
                continue
            text = str(reader.tokenizer.decode(ids))
            found.append(Example(f"{number}", (ids,), answers=(text,), extra={"ids": ids}))
            if len(found) == limit:
                break
        return found

    def run(self, reader: ContextReader, examples: Sequence[Example]) -> list[Result]:
        """Write freely for BLEU; read the text itself for how many of its tokens would have been written."""
        between = torch.tensor(
            reader.tokenizer(self.options.prompt, add_special_tokens=False)["input_ids"], dtype=torch.long
        )
        given = reader.give([example.contexts for example in examples])
        prompts = [reader.behind(here, between) for here in given]
        scores = reader.likelihoods(prompts, [example.extra["ids"] for example in examples])
        outputs = reader.generate(prompts, [self.options.tokens] * len(examples), stop=())
        rows = zip(examples, given, scores, outputs, strict=True)
        return [
            Result(
                {
                    "bleu": metrics.bleu(output, example.answers[0]),
                    "accuracy": float(score.greedy.float().mean()),
                    "loss": -score.mean,
                },
                here.costs,
                output,
            )
            for example, here, score, output in rows
        ]
