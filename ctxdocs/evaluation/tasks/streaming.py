"""A long text read as a stream: the loss of every token behind a memory that grows (CCM, arXiv 2312.03414)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ctxdocs.evaluation.reading import ContextReader, Given
from ctxdocs.evaluation.task import LOSS, Example, Metric, Result, Task


class Streaming(Task):
    """Loss of every token of a long text, read as a stream through the compressor's session.

    Given as ``text``, each token sees all text in front of it, as far as the model has positions; given ``none``, only
    the latest.
    """

    name = "streaming"
    needs = "documents"
    metrics = (LOSS, Metric("late_loss", "loss in the last quarter", "lower", "nats"))
    readings = ("memory", "text", "none")

    @dataclass(frozen=True)
    class Options(Task.Options):
        """What can be set: tokens of a text, how many are read at once, and how many ``none`` still sees."""

        tokens: int = 2048
        step: int = 128
        recent: int = 128

    def examples(self, reader: ContextReader, seed: int, limit: int) -> list[Example]:
        """Take the beginning of each document that is long enough."""
        found: list[Example] = []
        for number, document in enumerate(self.data.documents(seed)):
            ids = reader.ids(document.text)[: self.options.tokens]
            if len(ids) < self.options.tokens:
                self.left_out[f"documents of less than {self.options.tokens} tokens"] += 1
                continue
            found.append(Example(f"{number}", (ids,)))
            if len(found) == limit:
                break
        return found

    def run(self, reader: ContextReader, examples: Sequence[Example]) -> list[Result]:
        """Read every text; only ``text`` and ``none`` make a batch of it, a session has one text."""
        texts: list[Tensor] = [example.contexts[0] for example in examples]  # type: ignore[misc]
        read = {"memory": self._in_session, "text": self._as_text, "none": self._behind_recent}[reader.reading.how]
        return [self._result(reader, ids, *read(reader, ids)) for ids in texts]

    def _in_session(self, reader: ContextReader, ids: Tensor) -> tuple[Tensor, dict[str, int]]:
        losses = []
        with reader.configured(), torch.no_grad(), reader.timed("read"):
            session = reader.compressor.streaming_session()
            last = torch.empty(0)
            for piece in ids.split(self.options.step):
                logits = session.feed(piece).float()
                before = torch.cat([last, logits[:-1]]) if len(last) else logits[:-1]
                targets = piece[len(piece) - len(before) :].to(before.device)
                losses.append(functional.cross_entropy(before, targets, reduction="none").cpu())
                last = logits[-1:]
            memory = session.memory()
        return torch.cat(losses), {"slots": memory.slots, "bytes": memory.nbytes}

    def _as_text(self, reader: ContextReader, ids: Tensor) -> tuple[Tensor, dict[str, int]]:
        nothing = Given([], 0, 0, 0)
        score = reader.likelihoods([reader.behind(nothing, ids[:1])], [ids[1:]])[0]
        costs = reader.give([[ids]])[0].costs
        return -score.log_probabilities, {"slots": costs["slots"], "bytes": costs["bytes"]}

    def _behind_recent(self, reader: ContextReader, ids: Tensor) -> tuple[Tensor, dict[str, int]]:
        starts = [1, *range(self.options.step, len(ids), self.options.step)]
        ends = [*starts[1:], len(ids)]
        prompts = [[ids[max(start - self.options.recent, 0) : start]] for start in starts]
        scores = reader.likelihoods(prompts, [ids[start:end] for start, end in zip(starts, ends, strict=True)])  # type: ignore[arg-type]
        return -torch.cat([score.log_probabilities for score in scores]), {"slots": self.options.recent, "bytes": 0}

    def _result(self, reader: ContextReader, ids: Tensor, losses: Tensor, costs: dict[str, int]) -> Result:
        late = losses[-len(losses) // 4 :]
        metrics = {"loss": float(losses.double().mean()), "late_loss": float(late.double().mean())}
        return Result(metrics, {"context_tokens": len(ids), **costs})
