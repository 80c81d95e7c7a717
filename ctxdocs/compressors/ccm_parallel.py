"""CCM in one pass: rows that hold their special tokens, with all steps of the recursion computed side by side.

This is how CCM is trained (arXiv 2312.03414, section 3). A mask lets every token see what the recursion would have
shown it: its own segment and the special tokens in front. Special tokens do not count as positions. Where memories are
merged, *sum tokens* stand behind a segment's special tokens; in every layer their keys and values are replaced, after
the rotary embedding, by the means of those of all special tokens so far. What sum tokens compute themselves is never
read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ctxdocs.compressors.passes import additive_mask
from ctxdocs.errors import InputError

if TYPE_CHECKING:
    from ctxdocs.compressors.ccm import CCM


@dataclass(frozen=True, eq=False)
class Specials:
    """Where special tokens stand in rows of ids.

    Parameters
    ----------
    comp, total : torch.Tensor
        ``[batch, tokens]``, int64: the number of a compression or sum token in its group, -1 at other tokens.
    size : int
        Tokens of a group.
    """

    comp: Tensor
    total: Tensor
    size: int

    @classmethod
    def of(cls, ids: Tensor, vocabulary: int, size: int) -> Specials:
        """Find them by their ids: ``size`` compression tokens behind the vocabulary, then as many sum tokens."""

        def numbered(first: int) -> Tensor:
            return torch.where((ids >= first) & (ids < first + size), ids - first, -1)

        return cls(numbered(vocabulary), numbered(vocabulary + size), size)

    @property
    def marked(self) -> Tensor:
        """``[batch, tokens]``, bool: the LoRA is on."""
        return (self.comp >= 0) | (self.total >= 0)

    def positions(self, live: Tensor) -> Tensor:
        """Return ``[batch, tokens]``, int64; ``live`` (bool) is False at padding, which gets position 1.

        Text is counted; the tokens of a group follow the last text token and do not move what comes behind them.
        """
        marked = self.marked
        text = (live & ~marked).cumsum(1) - 1
        within = (marked.cumsum(1) - 1) % self.size + 1
        return torch.where(live, text + marked * within, 1)

    def visible(self, attn_type: str, unseen: Tensor, sink: Tensor | None = None) -> Tensor:
        """Return who sees whom apart from causality, ``[batch, queries, keys]`` (bool).

        Parameters
        ----------
        attn_type : str
            A type of :data:`ctxdocs.compressors.ccm.ATTENTION_TYPES`; or ``"gist"``, the authors' baseline in which a
            segment sees only the compression tokens right in front of it.
        unseen : torch.Tensor
            ``[batch, tokens]``, bool: keys that nobody sees, such as padding.
        sink : torch.Tensor, optional
            ``[batch, tokens]``, bool: keys that everybody sees.
        """
        is_comp, is_total = self.comp >= 0, self.total >= 0
        by_comp, by_total = _blocks(self.comp == self.size - 1), _blocks(self.total == self.size - 1)
        keys_comp = is_comp[:, None]
        if attn_type == "concat_recur":
            seen = _same(by_comp) | keys_comp
        elif attn_type == "concat":
            is_last = by_comp == (self.comp == self.size - 1).sum(1, keepdim=True)
            seen = _same(by_comp) | (keys_comp & is_last[..., None])
        elif attn_type == "merge_recur":
            seen = _with_closing_group(by_total, is_total)
        elif attn_type == "merge":
            seen = _same(by_comp) & _with_closing_group(by_total, is_total)
            seen = seen | (is_total[..., None] & keys_comp)
        elif attn_type == "gist":
            seen = _with_closing_group(by_comp, is_comp)
        else:
            raise InputError(f"unknown attn_type {attn_type!r}")
        seen = seen & ~unseen[:, None]
        return seen if sink is None else seen | sink[:, None]

    def merging(self) -> Tensor:
        """Return which keys each sum token is the mean of, ``[batch, tokens, tokens]``, float32; zeros elsewhere."""
        tokens = self.comp.shape[1]
        earlier = torch.ones(tokens, tokens, dtype=torch.bool, device=self.comp.device).tril(-1)
        averaged = (self.total[..., None] == self.comp[:, None]) & (self.total[..., None] >= 0) & earlier
        return averaged / averaged.sum(-1, keepdim=True).clamp(min=1)


class MergedKeys(DynamicCache):
    """Takes the place of a cache, where layers look up rotated keys and values: it keeps none, and merges them.

    Parameters
    ----------
    merging : torch.Tensor
        See :meth:`Specials.merging`.
    """

    def __init__(self, merging: Tensor) -> None:
        super().__init__()
        self.merging = merging[:, None]
        self.is_total = merging.any(-1)[:, None, :, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:  # what layers call; the arguments left out vary with the version of transformers
        """Return keys and values ``[batch, heads, tokens, head_dim]`` with those of sum tokens replaced."""
        return self._merged(key_states), self._merged(value_states)

    def _merged(self, states: Tensor) -> Tensor:
        return torch.where(self.is_total, self.merging.to(states.dtype) @ states, states)


def one_pass(
    compressor: CCM, input_ids: Tensor, attention_mask: Tensor | None = None, *, unseen: Tensor | None = None
) -> Tensor:
    """Read rows that hold their special tokens.

    Parameters
    ----------
    compressor : CCM
        Whose adapter is on at special tokens.
    input_ids : torch.Tensor
        ``[batch, tokens]``, int64, as :func:`lay_out` makes them.
    attention_mask : torch.Tensor, optional
        ``[batch, tokens]``, 0 at padding, which may stand on either side.
    unseen : torch.Tensor, optional
        ``[batch, tokens]``, bool: keys that nobody sees; default padding. (The authors hide every token of id 0.)

    Returns
    -------
    torch.Tensor
        ``[batch, tokens, width]``, after the final norm; meaningless at padding.

    Raises
    ------
    InputError
        If the text needs more positions than the model has, or the model's attention takes no mask.
    """
    backbone = compressor.backbone
    check_kernel(compressor)
    ids = input_ids.to(backbone.device)
    live = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.to(ids.device).bool()
    specials = Specials.of(ids, backbone.vocabulary, compressor.num_comp_tokens)
    positions = specials.positions(live)
    limit = backbone.max_positions
    if ids.shape[1] > limit and (needed := int(positions.max()) + 1) > limit:
        raise InputError(f"a row of {needed} tokens of text does not fit the model's {limit} positions")
    first = live & (live.cumsum(1) == 1) if compressor.sink else None
    seen = specials.visible(compressor.attn_type, ~live if unseen is None else unseen.to(ids.device), first)
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
    marked = specials.marked
    own = compressor.comp_embeddings(torch.where(marked, ids - backbone.vocabulary, 0)).to(backbone.dtype)
    embeds = torch.where(marked[..., None], own, backbone.embed(torch.where(marked, 0, ids)))
    mask = additive_mask(seen & causal & live[:, None], embeds.dtype)
    cache = MergedKeys(specials.merging()) if compressor.merges else None
    with compressor.adapted(marked):
        return backbone.run(embeds, positions, mask=mask, cache=cache)


def lay_out(compressor: CCM, segments: Sequence[Tensor]) -> Tensor:
    """Put special tokens behind every segment but the last, which is read behind the memory of the others.

    Parameters
    ----------
    compressor : CCM
        Says how many, and whether sum tokens follow each group or only the last one.
    segments : sequence of torch.Tensor
        1-D int64 ids.

    Returns
    -------
    torch.Tensor
        ``[tokens]``, int64.
    """
    n, first = compressor.num_comp_tokens, compressor.backbone.vocabulary
    comp, total = torch.arange(first, first + n), torch.arange(first + n, first + 2 * n)
    parts: list[Tensor] = []
    for index, segment in enumerate(segments):
        parts.append(segment)
        if index < len(segments) - 1:
            parts.append(comp)
            if compressor.merges and (compressor.is_recurrent or index == len(segments) - 2):
                parts.append(total)
    return torch.cat(parts)


def check_kernel(compressor: CCM) -> None:
    """Raise ``InputError`` if the model's attention takes no mask."""
    kernel = getattr(compressor.model.config, "_attn_implementation", None) or ""
    if "flash" in kernel:
        raise InputError(f"CCM in one pass needs a mask, which {kernel} does not take", "use sdpa")


def _blocks(closes: Tensor) -> Tensor:
    """Return the number of each token's block; a block ends with a token that closes it."""
    return closes.cumsum(1) - closes.long()


def _same(blocks: Tensor) -> Tensor:
    return blocks[..., None] == blocks[:, None]


def _with_closing_group(blocks: Tensor, is_group: Tensor) -> Tensor:
    """See one's own block, and the group of tokens that closes the block in front of it."""
    return _same(blocks) | (is_group[:, None] & (blocks[:, None] + 1 == blocks[..., None]))
