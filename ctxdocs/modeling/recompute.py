"""Activations that are computed again for the gradient instead of kept (gradient checkpointing, arXiv 1604.06174).

Layers of a transformers model can do this themselves, but they then drop the cache they are given, and hooks that
were set while they ran are gone when they run again. Here a layer runs again as it ran: with the keys and values that
were in its cache, and inside every context that was entered with :func:`entered_again`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from transformers import Cache

_Context: TypeAlias = "Callable[[], AbstractContextManager[None]]"

_CONTEXTS: ContextVar[tuple[_Context, ...]] = ContextVar("contexts that layers run again in", default=())


@contextmanager
def entered_again(context: _Context) -> Iterator[None]:
    """Enter a context, and enter it once more whenever a layer that ran inside the block runs again."""
    token = _CONTEXTS.set((*_CONTEXTS.get(), context))
    try:
        with context():
            yield
    finally:
        _CONTEXTS.reset(token)


@contextmanager
def recomputed(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Keep only the inputs of layers that run inside the block; the rest is computed again for the gradient."""
    replaced: list[tuple[nn.Module, Any]] = []
    try:
        for layer in layers:
            replaced.append((layer, layer.__dict__.get("forward")))
            layer.forward = partial(_checkpoint, layer.forward)
        yield
    finally:
        for layer, forward in replaced:
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def replayable(cache: Cache) -> Cache:
    """Return a view of a cache that takes a layer's keys and values a second time as if it were the first."""
    before: dict[int, Any] = {}

    def update(keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        held = cache.layers[layer] if layer < len(cache.layers) else None
        if layer not in before:
            before[layer] = copy.copy(held)
        elif held is not None:
            cache.layers[layer] = type(held)() if before[layer] is None else copy.copy(before[layer])
        return cache.update(keys, values, layer, *args, **kwargs)

    view = copy.copy(cache)
    view.update = update  # type: ignore[method-assign, assignment]
    return view


def _checkpoint(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    contexts = _CONTEXTS.get()
    return checkpoint(
        forward, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), _all_of(contexts)), **kwargs
    )


@contextmanager
def _all_of(contexts: Iterable[_Context]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context())
        yield
