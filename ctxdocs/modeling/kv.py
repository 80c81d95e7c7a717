"""Keys and values of an unmodified model: recorded as its layers compute them, and put into its cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ctxdocs.modeling.attention_layers import attention_layers, projections_of
from ctxdocs.modeling.recompute import entered_again
from ctxdocs.modeling.rotary import rotate_keys

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


class Recorded:
    """Keys before the rotary embedding (after a key norm, where the model has one) and values, of every layer.

    Holds those of the last forward that ran while they were recorded.
    """

    def __init__(self) -> None:
        #: Whether the block has ended.
        self.is_complete = False
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}

    def of_layer(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """Return one layer's keys and values, ``[batch, kv_heads, tokens, head_dim]``; None where it has none."""
        return self._keys.get(layer), self._values.get(layer)

    @property
    def keys(self) -> Tensor:
        """``[layers, batch, kv_heads, tokens, head_dim]``."""
        return torch.stack([self._keys[layer] for layer in sorted(self._keys)])

    @property
    def values(self) -> Tensor:
        """``[layers, batch, kv_heads, tokens, head_dim]``."""
        return torch.stack([self._values[layer] for layer in sorted(self._values)])


@dataclass(frozen=True, eq=False)
class KeysValues:
    """Keys, before the rotary embedding, and values of a batch, each at its position.

    Parameters
    ----------
    keys, values : torch.Tensor
        ``[layers, batch, kv_heads, slots, head_dim]``.
    positions : torch.Tensor
        ``[batch, slots]``, int64.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor

    @property
    def slots(self) -> int:
        """Slots per row."""
        return self.positions.shape[1]

    def part(self, start: int, stop: int | None = None) -> KeysValues:
        """Return the slots ``start`` to ``stop`` of every row."""
        here = slice(start, stop)
        return KeysValues(self.keys[..., here, :], self.values[..., here, :], self.positions[:, here])

    def rows(self, index: Tensor) -> KeysValues:
        """Return some rows; ``index`` holds their numbers, or True for each of them."""
        return KeysValues(self.keys[:, index], self.values[:, index], self.positions[index])

    def rotated(self, model: PreTrainedModel) -> KeysValues:
        """Rotate the keys to their positions; they then stand at position 0 of wherever they are read."""
        keys = rotate_keys(model, self.keys, self.positions)
        return KeysValues(keys, self.values, torch.zeros_like(self.positions))

    def cache(self, model: PreTrainedModel) -> Cache:
        """Return a cache that holds them, each at its position."""
        return fill_cache(rotate_keys(model, self.keys, self.positions), self.values)

    def fixed_cache(self, model: PreTrainedModel) -> Cache | None:
        """Return a cache that holds them and does not grow; None where there are none."""
        from ctxdocs.modeling.fixed_cache import fixed_cache

        return fixed_cache(rotate_keys(model, self.keys, self.positions), self.values)

    @staticmethod
    def join(*parts: KeysValues) -> KeysValues:
        """Put slots side by side."""
        keys, values, positions = zip(*((part.keys, part.values, part.positions) for part in parts), strict=True)
        return KeysValues(torch.cat(keys, dim=3), torch.cat(values, dim=3), torch.cat(positions, dim=1))


@contextmanager
def recorded_keys_values(model: PreTrainedModel, places: Tensor | None = None) -> Iterator[Recorded]:
    """Record what the attention layers' key and value projections put out while the block runs.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Whose layers to record.
    places : torch.Tensor, optional
        ``[batch, kept]``, int64: which of each row's tokens to record; the others are then free to go as soon as their
        layer is done. Default: all.

    Raises
    ------
    InputError
        If the model's attention layers are of no known layout.
    """
    recorded, kept = Recorded(), _at(places)

    def keep(kind: dict[int, Tensor], layer: int, part: Callable[[Tensor], Tensor]) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            kind[layer] = part(kept(output))

        return hook

    @contextmanager
    def hooked() -> Iterator[None]:
        # Layers that run again, for the gradient, do so with hooks, but what they put out has been recorded already.
        into = Recorded() if recorded.is_complete else recorded
        hooks: list[Any] = []
        try:
            for attention in attention_layers(model):
                projections = projections_of(attention)
                for name, kind in (("keys", into._keys), ("values", into._values)):
                    module, part = projections[name]
                    hooks.append(module.register_forward_hook(keep(kind, attention.layer_idx, part)))
            yield
        finally:
            for hook in hooks:
                hook.remove()

    with entered_again(hooked):
        yield recorded
    recorded.is_complete = True


def fill_cache(keys: Tensor, values: Tensor) -> Cache:
    """Return a cache that holds rotated keys and values, ``[layers, batch, kv_heads, slots, head_dim]`` each."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, (layer_keys, layer_values) in enumerate(zip(keys, values, strict=True)):
        cache.update(layer_keys, layer_values, layer)
    return cache


def cached_keys(cache: Cache, layer: int) -> Tensor:
    """Return the rotated keys that a layer has cached, ``[batch, kv_heads, slots, head_dim]``."""
    layers: Any = cache.layers
    return layers[layer].keys


def cut_back(cache: Cache, tokens: int) -> None:
    """Drop the last tokens from every layer of a cache."""
    layers: Any = cache.layers
    for layer in layers:
        layer.keys, layer.values = layer.keys[..., :-tokens, :], layer.values[..., :-tokens, :]


def _at(places: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Return what takes the tokens at ``places`` from a layer's output ``[batch, tokens, ...]``."""
    if places is None:
        return lambda output: output

    def kept(output: Tensor) -> Tensor:
        batch, tokens = output.shape[:2]
        rows = places + tokens * torch.arange(batch, device=places.device)[:, None]
        return output.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, places.shape)

    return kept
