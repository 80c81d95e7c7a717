"""The later layers of an unmodified model run for some tokens only, which see keys and values that the others have.

The first layers run for all tokens. What they put out tells which tokens are worth going on with; the states of the
others are dropped there, and in every later layer stand the keys and values that were known of them before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import Cache

from ctxdocs.errors import InputError
from ctxdocs.modeling.fixed_cache import FixedLayer
from ctxdocs.modeling.kv import KeysValues, Recorded, recorded_keys_values
from ctxdocs.modeling.rotary import rotate_keys

if TYPE_CHECKING:
    from ctxdocs.modeling.backbone import Backbone

#: Layers that run for all tokens. Values of the first one depend on nothing but the token; those of the second are the
#: first ones to tell what stands in front, and they are known once it has run.
COMPLETE_LAYERS = 2


class _Going:
    """Which tokens go on, ``[tokens]``, int64, in their order; None as long as all of them do."""

    places: Tensor | None = None


class _PartlyKnown(FixedLayer):
    """One layer's cache: slots in front, and keys and values of the tokens that did not go on, among those that do."""

    def __init__(self, front: tuple[Tensor, Tensor], known: tuple[Tensor, Tensor], going: _Going) -> None:
        super().__init__(*front)
        self._known, self._going = known, going

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the slots in front, and behind them keys and values of all tokens."""
        if (places := self._going.places) is not None:
            keys, values = self._known
            key_states, value_states = (
                keys.index_copy(2, places, key_states),
                values.index_copy(2, places, value_states),
            )
        return super().update(key_states, value_states, *args, **kwargs)


def run_some(
    backbone: Backbone, embeds: Tensor, front: KeysValues, known: KeysValues, choose: Callable[[Recorded], Tensor]
) -> KeysValues:
    """Compute keys and values of tokens anew: in the first layers of all, in the others of those that are chosen.

    Unless all are chosen, the later layers are given a mask (:func:`check_takes_masks`).

    Parameters
    ----------
    backbone : Backbone
        The model that runs.
    embeds : torch.Tensor
        ``[1, tokens, width]``, input embeddings.
    front : KeysValues
        Of a batch of one: what stands in front of all tokens, maybe nothing.
    known : KeysValues
        Of a batch of one: keys and values that the tokens have already; what is there of tokens that are going to be
        chosen does not matter.
    choose : callable
        From what the first layers projected to the places of the tokens that go on, ``[chosen]``, int64, ascending.

    Returns
    -------
    KeysValues
        All tokens', computed anew where they were, and as ``known`` elsewhere.

    Raises
    ------
    InputError
        If the model's layers are called in a way that is not known.
    """
    going = _Going()
    turned = [rotate_keys(backbone.model, part.keys, part.positions) for part in (front, known)]
    layers = zip(turned[0], front.values, turned[1], known.values, strict=True)
    cache = Cache(layers=[_PartlyKnown(layer[:2], layer[2:], going) for layer in layers])
    with recorded_keys_values(backbone.model) as recorded, _fewer_from(backbone, going, front.slots, recorded, choose):
        backbone.run(embeds, known.positions, cache=cache)
    places = going.places

    def merged(layer: int, old: Tensor, new: Tensor | None) -> Tensor:
        whole = cast("Tensor", new)  # a model whose layers keep none has been refused
        return whole if places is None or layer < COMPLETE_LAYERS else old.index_copy(2, places, whole)

    keys = [merged(layer, old, recorded.of_layer(layer)[0]) for layer, old in enumerate(known.keys)]
    values = [merged(layer, old, recorded.of_layer(layer)[1]) for layer, old in enumerate(known.values)]
    return KeysValues(torch.stack(keys), torch.stack(values), known.positions)


@contextmanager
def _fewer_from(
    backbone: Backbone, going: _Going, slots: int, recorded: Recorded, choose: Callable[[Recorded], Tensor]
) -> Iterator[None]:
    """Let only chosen tokens into the layers behind the first ones while the block runs."""
    mask: Tensor | None = None

    def decide(states: Tensor) -> Tensor:
        nonlocal mask
        tokens, places = states.shape[1], choose(recorded)
        if len(places) == tokens:  # all go on, and nothing needs a mask
            return states
        going.places = places
        seen = torch.arange(slots + tokens, device=states.device) <= slots + places[:, None]
        mask = torch.zeros(seen.shape, dtype=states.dtype, device=states.device)
        mask = mask.masked_fill(seen.logical_not(), torch.finfo(states.dtype).min)[None, None]
        return states[:, places]

    def narrow(module: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if module is backbone.layers[COMPLETE_LAYERS]:
            if not inputs:
                raise _unknown(backbone)
            inputs = (decide(inputs[0]), *inputs[1:])
        if (places := going.places) is None:
            return inputs, options
        if not {"attention_mask", "position_embeddings"} <= options.keys():
            raise _unknown(backbone)
        cos, sin = options["position_embeddings"]
        options = {**options, "attention_mask": mask, "position_embeddings": (cos[:, places], sin[:, places])}
        if options.get("position_ids") is not None:
            options["position_ids"] = options["position_ids"][:, places]
        return inputs, options

    hooks = [layer.register_forward_pre_hook(narrow, with_kwargs=True) for layer in backbone.layers[COMPLETE_LAYERS:]]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _unknown(backbone: Backbone) -> InputError:
    return InputError(
        f"the layers of {type(backbone.model).__name__} are not called like Llama's: no tokens can be left out of them",
        "leave blend out",
    )
