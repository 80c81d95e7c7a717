"""A few tokens through a model show whether it is read right: its states, its logits, its keys and values.

Families of models differ in small things: layers without rotary embedding, pairs of dimensions that turn in another
order, logits that are scaled behind the head. Nothing fails where one is overlooked; the numbers are just wrong. So
every model is asked, once. A model on the ``meta`` device cannot answer, and is taken as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ctxdocs.errors import InputError
from ctxdocs.modeling.kv import recorded_keys_values
from ctxdocs.modeling.rotary import rotate_keys

if TYPE_CHECKING:
    from ctxdocs.modeling.backbone import Backbone

_TOKENS = 3
# Shares of the largest entry by which tensors may differ. The same steps differ by nothing, or by the rounding of
# another kernel; keys that a model turns in bfloat16 by a few thousandths from those turned in float32.
_SAME, _TURNED = 0.001, 0.03


def check_stages(backbone: Backbone) -> None:
    """Raise ``InputError`` unless embedding, layers and head, run one after another, give the model's own logits.

    Layers that keep a running state in place of keys and values are refused too: it would run on over padding.
    """
    if not backbone.keeps_keys_only:
        raise InputError(
            f"{_name(backbone)} has layers that keep a running state, not keys and values of every token",
            "use a model with attention in every layer",
        )
    if backbone.device.type == "meta":
        return
    with torch.no_grad(), _evaluating(backbone.model):
        own = backbone.model(input_ids=_ids(backbone), use_cache=False).logits
        try:
            staged = backbone.head(backbone.run(backbone.embed(_ids(backbone)), _positions(backbone)[None]))
        except (AttributeError, TypeError):
            staged = torch.empty(0)
    if not _alike(staged, own, _SAME):
        raise InputError(
            f"{_name(backbone)} does not compute its logits from input embeddings, positions and its head alone",
            "use a causal language model like Llama",
        )


def check_keys(backbone: Backbone) -> None:
    """Raise ``InputError`` unless the model caches what its key projections put out, turned by its one rotary module.

    Only then keys can be kept before the rotary embedding and placed anew. A model that has passed is not asked again.
    """
    if backbone.keys_checked:
        return
    name, rotary = _name(backbone), getattr(backbone.model.base_model, "rotary_emb", None)
    if rotary is None:
        raise InputError(f"{name} has no rotary embedding to place keys with", "use a rotary model")
    if "layer_type" in inspect.signature(rotary.forward).parameters:
        raise InputError(
            f"{name} has a rotary embedding for each kind of layer; keys can be placed with one for all",
            "use a model that turns the keys of all layers alike",
        )
    if backbone.device.type == "meta":
        return
    layer = _layer_with_other_keys(backbone)
    if layer is not None:
        raise InputError(
            f"layer {layer} of {name} caches something else than its key and value projections put out, turned by the "
            "rotary embedding as in Llama: its keys cannot be placed anew",
            "use a model that turns the keys of all layers like Llama",
        )
    backbone.keys_checked = True


def _layer_with_other_keys(backbone: Backbone) -> int | None:
    """Return the first layer whose cached keys or values are not those recorded of it; None where there is none."""
    from transformers import DynamicCache

    cache, positions = DynamicCache(), _positions(backbone)
    with torch.no_grad(), _evaluating(backbone.model), recorded_keys_values(backbone.model) as recorded:
        backbone.run(backbone.embed(_ids(backbone)), positions[None], cache=cache)
    for layer, kept in enumerate(cache.layers):
        keys, values = recorded.of_layer(layer)
        if keys is None or values is None or keys.shape != kept.keys.shape:
            return layer
        turned = rotate_keys(backbone.model, keys, positions)
        if not (_alike(turned, kept.keys, _TURNED) and _alike(values, kept.values, _SAME)):
            return layer
    return None


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off while the block runs."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def _alike(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether two tensors are the same but for rounding."""
    if actual.shape != expected.shape:
        return False
    actual, expected = actual.float(), expected.float()
    return bool(((actual - expected).abs() <= tolerance * expected.abs().amax()).all())


def _ids(backbone: Backbone) -> Tensor:
    """Return a few token ids, ``[1, tokens]``."""
    return _positions(backbone)[None] % backbone.vocabulary


def _positions(backbone: Backbone) -> Tensor:
    return torch.arange(_TOKENS, device=backbone.device)


def _name(backbone: Backbone) -> str:
    return type(backbone.model).__name__
