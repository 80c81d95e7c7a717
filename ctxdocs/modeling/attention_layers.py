"""Attention layers of an unmodified model: what they project, watched as they run, and who sees whom, head by head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from ctxdocs.errors import InputError
from ctxdocs.modeling.recompute import entered_again

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: A module and which part of its output, ``[batch, tokens, ...]``, it is: ``[batch, heads, tokens, head_dim]``.
Projection: TypeAlias = "tuple[nn.Module, Callable[[Tensor], Tensor]]"

# Attention kernels that add whatever mask they are given to their scores.
_MASKABLE = ("sdpa", "eager")


@dataclass
class Attention:
    """One attention layer that has just run.

    Parameters
    ----------
    layer : int
        Its number.
    queries, keys, values : torch.Tensor
        ``[batch, heads, tokens, head_dim]`` of the tokens that ran, queries and keys before the rotary embedding (and
        after their norms, where the model has them).
    scaling : float
        Factor of the products of queries and keys.
    softcap : float or None
        Bound that the scaled products are squeezed into (Gemma 2).
    """

    layer: int
    queries: Tensor
    keys: Tensor
    values: Tensor
    scaling: float
    softcap: float | None

    def scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return what the layer puts into its softmax, in float32.

        Parameters
        ----------
        queries : torch.Tensor
            ``[kv_heads, queries, head_dim]``, rotated: those of all query heads that share a key/value head.
        keys : torch.Tensor
            ``[kv_heads, keys, head_dim]``, rotated.

        Returns
        -------
        torch.Tensor
            ``[kv_heads, queries, keys]``.
        """
        scores = _products(queries, keys.transpose(1, 2)).mul_(self.scaling)
        return scores if self.softcap is None else (scores / self.softcap).tanh() * self.softcap


@contextmanager
def watched_attention(model: PreTrainedModel, watch: Callable[[Attention], None]) -> Iterator[None]:
    """Call ``watch`` for every attention layer, in the order they run, as soon as it has run.

    What a layer projected is let go after the call.

    Raises
    ------
    InputError
        If the model's attention layers are of no known layout.
    """
    hooks = []
    seen: dict[str, Tensor] = {}

    def keep(name: str, part: Callable[[Tensor], Tensor]) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            seen[name] = part(output)

        return hook

    def pass_on(module: Any, inputs: Any, output: Any) -> None:
        scaling = getattr(module, "scaling", None)
        attention = Attention(
            layer=module.layer_idx,
            **seen,
            scaling=seen["keys"].shape[-1] ** -0.5 if scaling is None else float(scaling),
            softcap=getattr(module, "attn_logit_softcapping", None),
        )
        seen.clear()
        if attention.queries.shape[1] != model.config.num_attention_heads:
            raise _without_queries(model)
        watch(attention)

    try:
        for module in attention_layers(model):
            projections = projections_of(module)
            if "queries" not in projections:
                raise _without_queries(model)
            for name, (projection, part) in projections.items():
                hooks.append(projection.register_forward_hook(keep(name, part)))
            hooks.append(module.register_forward_hook(pass_on))
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def masked_heads(model: PreTrainedModel, mask: Callable[[int], Tensor]) -> Iterator[None]:
    """Give every attention layer a mask of its own while the block runs.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Its attention must run by a kernel that takes masks.
    mask : callable
        From a layer's number to what is added to its scores, ``[batch, heads, queries, keys]``; called when the layer
        runs, so that one mask is held at a time.

    Raises
    ------
    InputError
        If the attention kernel, or the model, takes no such mask.
    """
    check_takes_masks(model, "slots that differ in number from head to head", "or compress with uniform budgets")

    def put(module: Any, inputs: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if "attention_mask" not in options:
            raise InputError(f"the attention layers of {type(model).__name__} cannot be given a mask for each head")
        return inputs, {**options, "attention_mask": mask(module.layer_idx)}

    @contextmanager
    def hooked() -> Iterator[None]:
        hooks = [module.register_forward_pre_hook(put, with_kwargs=True) for module in attention_layers(model)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    with entered_again(hooked):
        yield


def check_takes_masks(model: PreTrainedModel, what: str, instead: str | None = None) -> None:
    """Raise ``InputError`` unless the attention kernel adds masks to its scores; ``what`` needs one."""
    kernel = getattr(model.config, "_attn_implementation", None)
    if kernel not in _MASKABLE:
        raise InputError(
            f"{what} need a mask, which {kernel} does not take",
            ", ".join(filter(None, ["load the model with attn_implementation='sdpa'", instead])),
        )


def attention_layers(model: PreTrainedModel) -> list[Any]:
    """Return the attention modules, first to last.

    Raises
    ------
    InputError
        If there are none of a known layout.
    """
    modules: list[Any] = list(model.modules())
    layers = [m for m in modules if isinstance(getattr(m, "layer_idx", None), int) and hasattr(m, "is_causal")]
    known = [layer for layer in layers if projections_of(layer)]
    if not known:
        raise InputError(f"the attention layers of {type(model).__name__} are of no known layout")
    return known


def projections_of(attention: Any) -> dict[str, Projection]:
    """Return where an attention layer projects queries, keys and values; none where its layout is not known.

    Projections are separate, with or without norms behind them (most models), or one (Phi-3, GPT-NeoX). Where queries
    come about in another way, they alone are missing.
    """
    if hasattr(attention, "query_key_value") and hasattr(attention, "head_size"):
        size = attention.head_size

        def third(index: int) -> Callable[[Tensor], Tensor]:
            return lambda fused: _heads(fused, 3 * size).chunk(3, dim=-1)[index]

        return {name: (attention.query_key_value, third(i)) for i, name in enumerate(("queries", "keys", "values"))}
    if hasattr(attention, "qkv_proj") and hasattr(attention, "num_key_value_heads"):
        size = attention.head_dim
        width = attention.num_key_value_heads * size
        parts = {"queries": slice(-2 * width), "keys": slice(-2 * width, -width), "values": slice(-width, None)}

        def cut(part: slice) -> Callable[[Tensor], Tensor]:
            return lambda fused: _heads(fused[..., part], size)

        return {name: (attention.qkv_proj, cut(part)) for name, part in parts.items()}
    if hasattr(attention, "k_proj") and hasattr(attention, "v_proj"):
        size = attention.head_dim
        modules = {
            "queries": getattr(attention, "q_norm", None) or getattr(attention, "q_proj", None),
            "keys": getattr(attention, "k_norm", None) or attention.k_proj,
            "values": attention.v_proj,
        }
        return {name: (module, lambda out: _heads(out, size)) for name, module in modules.items() if module}
    return {}


def _heads(output: Tensor, size: int) -> Tensor:
    """Turn ``[batch, tokens, ...]`` into ``[batch, heads, tokens, size]``."""
    return output.flatten(2).unflatten(2, (-1, size)).transpose(1, 2)  # of no tokens, reshape could not tell the heads


def _products(first: Tensor, second: Tensor) -> Tensor:
    """Multiply batches of matrices, summing up in float32 whatever their dtype."""
    if first.is_cuda and first.dtype in (torch.float16, torch.bfloat16) and "dtype" in torch.ops.aten.bmm.overloads():
        return torch.bmm(first, second, out_dtype=torch.float32)
    return torch.bmm(first.float(), second.float())


def _without_queries(model: PreTrainedModel) -> InputError:
    return InputError(
        f"the attention layers of {type(model).__name__} project something beside, or other than, plain queries",
        "use the method kv or streaming, which need no queries",
    )
