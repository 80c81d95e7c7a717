"""Causal attention with no mask, or with a mask for some tokens only, so that the fast kernels do the rest.

``torch``'s causal kernels line queries and keys up at their first entries, but a cache puts keys in front of the first
query. ``transformers`` therefore writes causal attention behind a cache down as a mask, with which no kernel skips what
it hides. Here queries of no interest, in front of the others, make both equally many; what they see is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "ctxdocs_sdpa"


def causal_attention(
    model: PreTrainedModel, tokens: int, slots: int, mask: Tensor | None
) -> tuple[AbstractContextManager[None], Tensor | None]:
    """Choose how a model attends in one pass.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model.
    tokens : int
        Tokens that run.
    slots : int
        Slots of the cache in front of them.
    mask : torch.Tensor, optional
        ``[batch, slots + tokens]``, 1 = live; or ``[batch or 1, 1, masked, slots + tokens]``, additive, of the last
        ``masked`` tokens.

    Returns
    -------
    tuple of (context manager, torch.Tensor or None)
        What the pass has to run in, and the mask that the model is given there.
    """
    if mask is not None and mask.dim() == 2:
        return nullcontext(), mask
    causal = tokens if mask is None else tokens - mask.shape[2]
    # Behind more slots than causal tokens, a mask hides less than the queries cost that stand in for the slots.
    if slots < causal and (slots or mask is not None) and model.config._attn_implementation == "sdpa":
        return causal_kernels(model), mask
    return nullcontext(), mask if mask is None or not causal else mask_of_all(mask, tokens)


@contextmanager
def causal_kernels(model: PreTrainedModel) -> Iterator[None]:
    """Have a model that runs on ``torch``'s kernels attend causally without a mask while the block runs.

    A mask ``[batch, 1, masked, keys]`` is then that of the last ``masked`` tokens; those before attend causally.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, _mask)
    model.config._attn_implementation = _NAME
    try:
        yield
    finally:
        model.config._attn_implementation = "sdpa"


def mask_of_all(mask: Tensor, tokens: int) -> Tensor:
    """Complete an additive mask of the last tokens, ``[batch, 1, masked, keys]``: those before attend causally."""
    batch, _, masked, keys = mask.shape
    before = tokens - masked
    visible = torch.ones(before, keys, dtype=torch.bool, device=mask.device).tril(keys - tokens)
    causal = mask.new_zeros(visible.shape).masked_fill(visible.logical_not(), torch.finfo(mask.dtype).min)
    return torch.cat([causal.expand(batch, 1, -1, -1), mask], dim=2)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attend; queries ``[batch, heads, tokens, size]`` to ``[batch, tokens, heads, size]``."""
    from transformers import AttentionInterface

    attend = AttentionInterface()["sdpa"]
    masked = 0 if attention_mask is None else attention_mask.shape[2]
    causal, last = query.tensor_split([query.shape[2] - masked], dim=2)
    outputs = []
    if causal.shape[2]:
        seen = key.shape[2] - masked
        ahead = seen - causal.shape[2]
        aligned = nn.functional.pad(causal, (0, 0, ahead, 0))
        outputs.append(attend(module, aligned, key[:, :, :seen], value[:, :, :seen], None, **options)[0][:, ahead:])
    if masked:
        outputs.append(attend(module, last, key, value, attention_mask, **options)[0])
    return torch.cat(outputs, dim=1), None


def _mask(*args: Any, **options: Any) -> Tensor | None:
    """Return no mask where it would be a plain causal one, else transformers' own."""
    from transformers import AttentionMaskInterface

    local_size = options.get("local_size")
    if (
        options.get("allow_is_causal_skip", True)
        and options.get("attention_mask") is None
        and (local_size is None or options["kv_length"] < local_size)
    ):
        return None
    return AttentionMaskInterface()["sdpa"](*args, **options)
