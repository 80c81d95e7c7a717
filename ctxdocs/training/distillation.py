"""Matching another distribution over the next token: its likeliest tokens one by one, the others together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ctxdocs.training.losses import by_rows

if TYPE_CHECKING:
    from ctxdocs.modeling.backbone import Backbone

_LEAST = 1e-6  # of the probability that other tokens share


def top_predictions(backbone: Backbone, states: Tensor, top_k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the likeliest next tokens and their log-probabilities, without gradients.

    Parameters
    ----------
    backbone : Backbone
        The teacher's.
    states : torch.Tensor
        ``[rows, width]``.
    top_k : int
        Tokens per row; at most the vocabulary less one.
    temperature : float
        Logits are divided by it.

    Returns
    -------
    log_probabilities : torch.Tensor
        float32 ``[rows, top_k]``.
    tokens : torch.Tensor
        int64 ``[rows, top_k]``.
    """

    def top(some: Tensor) -> tuple[Tensor, Tensor]:
        predicted = (backbone.head(some).float() / temperature).log_softmax(-1)
        return predicted.topk(min(top_k, predicted.shape[-1] - 1), dim=-1)

    with torch.no_grad():
        found = [top(some) for some in states.split(1024)]
    values, tokens = zip(*found, strict=True)
    return torch.cat(values), torch.cat(tokens)


def distillation_losses(
    backbone: Backbone, states: Tensor, log_probabilities: Tensor, tokens: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """Return, per row, the Kullback-Leibler divergence of the prediction from :func:`top_predictions`.

    The tokens that are not among the likeliest count as one outcome, so that the loss is 0 only where all of the
    likeliest have the teacher's probabilities. It is multiplied by the square of the temperature, which keeps its
    gradient as large as it is without.

    Parameters
    ----------
    backbone : Backbone
        The student's.
    states : torch.Tensor
        ``[rows, width]``.
    log_probabilities, tokens : torch.Tensor
        The teacher's, ``[rows, top_k]`` each.
    temperature : float
        The one that the teacher's were taken at.

    Returns
    -------
    torch.Tensor
        float32 ``[rows]``.
    """

    def losses(some: Tensor, theirs: Tensor, places: Tensor) -> Tensor:
        ours = (backbone.head(some).float() / temperature).log_softmax(-1).gather(-1, places)
        our_rest, their_rest = _rest(ours), _rest(theirs)
        divergence = (theirs.exp() * (theirs - ours)).sum(-1) + their_rest * (their_rest.log() - our_rest.log())
        return temperature**2 * divergence

    return by_rows(losses, states, log_probabilities, tokens)


def _rest(log_probabilities: Tensor) -> Tensor:
    return (1 - log_probabilities.exp().sum(-1)).clamp(min=_LEAST)
