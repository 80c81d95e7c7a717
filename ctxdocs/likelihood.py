"""How likely a model finds texts behind prompts with memories: batched, and written once for every method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ctxdocs.compressors.base import Compressor
from ctxdocs.compressors.batching import batches_by_length, default_batch_tokens
from ctxdocs.compressors.passes import only_pass
from ctxdocs.compressors.reading import ModelInput
from ctxdocs.errors import InputError
from ctxdocs.memory import Memory
from ctxdocs.prompts import Prompt, as_ids

# Logits are made for so many tokens at once: with a vocabulary of 150,000 they take 0.6 GB.
_LOGITS_AT_ONCE = 1024


@dataclass(frozen=True, eq=False)
class Likelihood:
    """How likely each token of a continuation was.

    Parameters
    ----------
    log_probabilities : torch.Tensor
        float32 ``[tokens]``, on the CPU, natural logarithms.
    greedy : torch.Tensor
        bool ``[tokens]``: whether the token was the likeliest.
    """

    log_probabilities: Tensor
    greedy: Tensor

    @property
    def total(self) -> float:
        """Sum of the log-probabilities."""
        return float(self.log_probabilities.double().sum())

    @property
    def mean(self) -> float:
        """Mean of the log-probabilities; its negative is the loss in nats per token."""
        return float(self.log_probabilities.double().mean())


@torch.no_grad()
def likelihoods(
    compressor: Compressor,
    prompts: Sequence[Prompt],
    continuations: Sequence[Sequence[int] | Tensor],
    *,
    batch_tokens: int | None = None,
) -> list[Likelihood]:
    """Read each continuation behind its prompt, and say how likely its tokens were.

    Parameters
    ----------
    compressor : Compressor
        Reads.
    prompts : sequence of Prompt
        Parts: 1-D token ids or memories. The first token of a continuation is predicted by what stands in front of
        it, a token or a slot that runs through the layers; cached slots predict nothing by themselves.
    continuations : sequence of (sequence of int or torch.Tensor)
        1-D token ids, one for each prompt, at least one token each.
    batch_tokens : int, optional
        Upper bound of rows x longest row in a batch. Default: what keeps the device busy.

    Returns
    -------
    list of Likelihood
        In the order of ``prompts``.

    Raises
    ------
    InputError
        If a continuation is empty, or nothing in front of it predicts its first token.
    ContextTooLong
        If a prompt and its continuation need more positions than the model has.
    """
    targets = [as_ids(continuation) for continuation in continuations]
    lengths = [_length(prompt) + len(target) for prompt, target in zip(prompts, targets, strict=True)]
    budget = default_batch_tokens(compressor.backbone.device) if batch_tokens is None else batch_tokens
    found: dict[int, Likelihood] = {}
    for batch in batches_by_length(lengths, budget):
        rows = [_laid_out(compressor, prompts[index], targets[index], index) for index in batch]
        states = _states(compressor, rows, [len(targets[index]) for index in batch])
        found.update(zip(batch, _scores(compressor, states, [targets[index] for index in batch]), strict=True))
    return [found[index] for index in range(len(targets))]


def _length(prompt: Prompt) -> int:
    return sum(part.slots if isinstance(part, Memory) else len(part) for part in prompt)


def _laid_out(compressor: Compressor, prompt: Prompt, target: Tensor, index: int) -> ModelInput:
    if not len(target):
        raise InputError(f"continuation {index} is empty", "give at least one token")
    row = compressor.model_input([*prompt, target])
    if len(row.positions) == len(target):
        raise InputError(
            f"nothing in prompt {index} predicts the first token of its continuation",
            "put a token of text behind cached memories, or move the first token into the prompt",
        )
    return row


def _states(compressor: Compressor, rows: Sequence[ModelInput], lengths: Sequence[int]) -> list[Tensor]:
    """Return the states that predict each row's last tokens, ``[tokens, width]`` a row."""
    hidden = only_pass(compressor.backbone, rows)
    ends = [len(row.positions) - 1 for row in rows]
    return [hidden[i, end - length : end] for i, (end, length) in enumerate(zip(ends, lengths, strict=True))]


def _scores(compressor: Compressor, states: Sequence[Tensor], targets: Sequence[Tensor]) -> list[Likelihood]:
    logs, hits = [], []
    lengths = [len(target) for target in targets]
    all_states, all_targets = (torch.cat(list(part)).split(_LOGITS_AT_ONCE) for part in (states, targets))
    for some, wanted in zip(all_states, all_targets, strict=True):
        logits = compressor.backbone.head(some).float()
        here = wanted.to(logits.device)
        logs.append((logits.gather(1, here[:, None])[:, 0] - logits.logsumexp(1)).cpu())
        hits.append((logits.argmax(1) == here).cpu())
    pieces = zip(torch.cat(logs).split(lengths), torch.cat(hits).split(lengths), strict=True)
    return [Likelihood(log_probabilities.clone(), greedy.clone()) for log_probabilities, greedy in pieces]
