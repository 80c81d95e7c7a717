"""States between the layers of an unmodified model: recorded as they pass, or added to on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ctxdocs.modeling.conditional import Change, changed_rows


@dataclass
class AddedStates:
    """What is added to the output of every layer at marked tokens.

    Parameters
    ----------
    states : torch.Tensor
        ``[layers, marked tokens, width]``, in the order of the tokens, row after row.
    marked : torch.Tensor
        ``[tokens]`` or ``[batch, tokens]``, bool.
    """

    states: Tensor
    marked: Tensor


@contextmanager
def added_to_layers(layers: Iterable[nn.Module], added: AddedStates) -> Iterator[None]:
    """Add states to the layers' outputs while the block runs."""

    def adding(states: Tensor) -> Change:
        return lambda inputs, output: output + states

    changes = {layer: adding(states) for layer, states in zip(layers, added.states, strict=True)}
    with changed_rows(changes, added.marked):
        yield


@contextmanager
def recorded_layers(layers: Iterable[nn.Module], keep: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """Record what the layers put out while the block runs, in the order they run; ``keep`` says which part of it."""
    recorded: list[Tensor] = []

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        recorded.append(keep(output))

    hooks = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield recorded
    finally:
        for handle in hooks:
            handle.remove()
