"""Losses per token, computed from states: logits exist for some rows at a time, and only where there is a target."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from ctxdocs.modeling.backbone import Backbone

#: The label of a token that is no target, as everywhere in transformers.
IGNORED = -100
#: Rows whose logits exist at once; with 128k tokens in the vocabulary they take half a gigabyte in float32.
_ROWS_AT_ONCE = 1024


def next_token_loss(backbone: Backbone, states: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of the tokens that follow, over all labels that count.

    Parameters
    ----------
    backbone : Backbone
        Whose head turns states into logits.
    states : torch.Tensor
        ``[batch, tokens, width]``.
    labels : torch.Tensor
        ``[batch, tokens]``, int64: every token's own id, or :data:`IGNORED`. The first of a row is never a target.

    Returns
    -------
    torch.Tensor
        A scalar, float32; 0 where no label counts.
    """
    return mean_loss(backbone, states[:, :-1], labels[:, 1:])


def mean_loss(backbone: Backbone, states: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of ``targets`` given the states in the same places; see :func:`next_token_loss`."""
    live = targets != IGNORED
    losses = token_losses(backbone, states[live], targets[live])
    return losses.sum() / max(1, len(losses))


def token_losses(backbone: Backbone, states: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of every target, ``[rows]``, given states ``[rows, width]`` and ids ``[rows]``."""

    def losses(some_states: Tensor, some_targets: Tensor) -> Tensor:
        return cross_entropy(backbone.head(some_states).float(), some_targets, reduction="none")

    return by_rows(losses, states, targets)


def by_rows(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Apply a function to some rows of all inputs at a time; only its results are kept for the gradient."""
    if len(inputs[0]) <= _ROWS_AT_ONCE:
        return function(*inputs)
    parts = zip(*(tensor.split(_ROWS_AT_ONCE) for tensor in inputs), strict=True)
    return torch.cat([checkpoint(function, *part, use_reentrant=False) for part in parts])
