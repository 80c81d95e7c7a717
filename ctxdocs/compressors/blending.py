"""Blending (CacheBlend, Yao et al., arXiv 2405.16444): exact memories of documents, computed again in part.

Documents that were computed apart do not know of each other. Put behind one another, some of their tokens would have
other keys and values than they have, and most nearly the same. Two layers run for all tokens: the values of the second
one, beside those in the memories, tell which tokens differ most. These alone run through the other layers, and see
there what stands in front of them: memories, text, and each other. A share of 1 is the prefill of everything; a share
of 0 leaves the memories as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from ctxdocs.checks import items, number
from ctxdocs.errors import InputError
from ctxdocs.memory import KVMemory, Memory
from ctxdocs.modeling.attention_layers import check_takes_masks
from ctxdocs.modeling.kv import KeysValues, Recorded
from ctxdocs.modeling.some_tokens import COMPLETE_LAYERS, run_some
from ctxdocs.prompts import Prompt

if TYPE_CHECKING:
    from ctxdocs.compressors.base import Compressor
    from ctxdocs.compressors.kv import KVCompressor
    from ctxdocs.modeling.backbone import Backbone

# Values of the first layer come from the token alone, so they tell whether a memory is one of these tokens. Rounding
# and the codecs of a library move them by a hundredth at most, another token by about their own size.
_SAME_TOKEN = 0.2


def blended(
    compressor: Compressor, prompt: Prompt, documents: Sequence[Sequence[int] | Tensor], share: float
) -> Prompt:
    """Return a prompt whose memories know what stands in front of them.

    Each memory is replaced by one that takes its place: of a share of the tokens the keys and values are computed
    again, behind everything in front of them in this prompt. Text of the prompt stays as it is. A first memory that
    stands where it was computed, right behind the compressor's prefix, is exact already; its tokens do not count.

    Parameters
    ----------
    compressor : Compressor
        Made the memories: a method without training.
    prompt : Prompt
        Parts, 1-D token ids or memories. The memories keep all slots of their documents, at the tokens' places (method
        ``kv``, or ratio 1).
    documents : sequence of (sequence of int or torch.Tensor)
        The token ids each memory was made of.
    share : float
        Which part of the tokens to compute again, from 0 (none: the prompt stays as it is) to 1 (all: keys and values
        become those of a prefill of the whole prompt).

    Returns
    -------
    Prompt
        Of the same parts. Its memories are made for this prompt, and belong nowhere else.

    Raises
    ------
    InputError
        If the memories do not keep everything, the documents are not theirs, or the share is out of range.
    FingerprintMismatch
        If a memory was made by another compressor.
    ContextTooLong
        If the memories, and what is in front of them, need more positions than the model has.
    """
    from ctxdocs.compressors.kv import KVCompressor

    check_share(share)
    if not isinstance(compressor, KVCompressor):
        raise InputError(
            f"blending needs memories of every key and value of a text, and those of {compressor.method} are others",
            "use the method kv, or leave blend out",
        )
    ids = _checked(compressor, prompt, documents)
    if not share or not ids:
        return prompt
    front, exact = _front(compressor, prompt)
    last = max(ids)
    if last < exact or len(compressor.backbone.layers) < COMPLETE_LAYERS:
        return prompt
    again = range(exact, last + 1)
    tokens = [ids[place] if place in ids else cast("Tensor", prompt[place]) for place in again]
    made = _computed_again(compressor, front, _Stretch(prompt[exact : last + 1], tokens), share)
    return [*prompt[:exact], *made, *prompt[last + 1 :]]


def check_share(share: float) -> None:
    """Raise ``InputError`` unless a number is a share of tokens."""
    if not 0 <= number("blend", share) <= 1:
        raise InputError(f"blend is {share}, and must lie between 0 (no token) and 1 (all tokens)")


def _checked(
    compressor: KVCompressor, prompt: Prompt, documents: Sequence[Sequence[int] | Tensor]
) -> dict[int, Tensor]:
    """Return the ids of each memory by its place in the prompt."""
    places = [place for place, part in enumerate(prompt) if isinstance(part, Memory)]
    documents = items("documents", documents)
    if len(documents) != len(places):
        raise InputError(
            f"there are {len(places)} memories to blend, and token ids of {len(documents)} documents",
            "give each memory's own token ids",
        )
    checked = {}
    for index, (place, given) in enumerate(zip(places, documents, strict=True)):
        memory, ids = cast("Memory", prompt[place]), compressor.checked_ids(given, f"document {index}")
        compressor.check_memory(memory)
        if not _keeps_all(memory):
            raise InputError(
                f"memory {index} does not keep every key and value of its document, at their places",
                "compress with the method kv, or ratio 1, or leave blend out",
            )
        if len(ids) != memory.source_tokens:
            raise InputError(
                f"document {index} has {len(ids)} tokens, and its memory was made of {memory.source_tokens}",
                "give the token ids that were compressed; was the tokenizer changed since?",
            )
        checked[place] = ids.cpu()
    return checked


def _keeps_all(memory: Memory) -> bool:
    return (
        isinstance(memory, KVMemory)
        and memory.lengths is None
        and memory.slots == memory.span == memory.source_tokens
        and memory.positions.dim() == 1
        and memory.positions.tolist() == list(range(memory.slots))
    )


def _front(compressor: KVCompressor, prompt: Prompt) -> tuple[list[KVMemory], int]:
    """Return memories of what is exact already, and how many parts of the prompt they stand for."""
    front: list[KVMemory] = []
    prefix = compressor.prefix_ids
    if len(prefix) and not isinstance(prompt[0], Memory) and prompt[0].cpu().equal(prefix):
        front.append(compressor.prefix_memory())
    begun = len(front) == min(len(prefix), 1)
    if begun and len(front) < len(prompt) and isinstance(first := prompt[len(front)], KVMemory):
        front.append(first)
    return front, len(front)


class _Stretch:
    """Parts of a prompt that are computed again: from what is exact already to the end of the last memory.

    Parameters
    ----------
    parts : sequence of (torch.Tensor or KVMemory)
        Text and memories.
    ids : sequence of torch.Tensor
        1-D token ids of each part.
    """

    def __init__(self, parts: Prompt, ids: Sequence[Tensor]) -> None:
        self.parts = parts
        self.ids = torch.cat([each.cpu() for each in ids])
        lengths = torch.tensor([len(each) for each in ids])
        self.is_text = torch.tensor([not isinstance(part, Memory) for part in parts]).repeat_interleave(lengths)
        ends = lengths.cumsum(0).tolist()
        self.where = [slice(end - len(each), end) for end, each in zip(ends, ids, strict=True)]

    def known(self, backbone: Backbone, start: int) -> KeysValues:
        """Return what the memories hold of the tokens, which stand at ``start`` and behind; zeros at text."""
        held = [part.to(backbone.device, backbone.dtype) for part in self.parts if isinstance(part, KVMemory)]
        layers, heads, _, key_size = held[0].keys.shape
        keys = held[0].keys.new_zeros(layers, 1, heads, len(self.ids), key_size)
        values = held[0].values.new_zeros(layers, 1, heads, len(self.ids), held[0].values.shape[-1])
        at_memories = self.is_text.logical_not().to(backbone.device)
        keys[:, 0, :, at_memories] = torch.cat([memory.keys for memory in held], dim=2)
        values[:, 0, :, at_memories] = torch.cat([memory.values for memory in held], dim=2)
        return KeysValues(keys, values, torch.arange(start, start + len(self.ids), device=backbone.device)[None])


def _computed_again(compressor: KVCompressor, front: Sequence[KVMemory], stretch: _Stretch, share: float) -> Prompt:
    """Return the parts of a stretch, its memories computed again in part behind what is exact."""
    backbone = compressor.backbone
    before = sum(memory.span for memory in front)
    compressor.check_room(before + len(stretch.ids), "the documents to be blended take")
    known = stretch.known(backbone, before)
    is_text = stretch.is_text.to(backbone.device)
    of_documents = int(stretch.is_text.logical_not().sum())
    count = len(is_text) - of_documents + max(1, round(share * of_documents))
    if count < len(is_text):
        check_takes_masks(backbone.model, "tokens of which a share is computed again")

    def choose(recorded: Recorded) -> Tensor:
        deviations = [_deviation(recorded.of_layer(layer)[1], known.values[layer]) for layer in range(COMPLETE_LAYERS)]
        _check_tokens(stretch, deviations[0], known.values[0])
        return deviations[1].masked_fill(is_text, torch.inf).topk(count).indices.sort().values

    again = run_some(backbone, backbone.embed(stretch.ids)[None], _in_front(backbone, front, known), known, choose)

    def made(part: Tensor | Memory, here: slice) -> Tensor | Memory:
        if not isinstance(part, KVMemory):
            return part
        keys, values = again.keys[:, 0, :, here].clone(), again.values[:, 0, :, here].clone()
        return replace(part, keys=keys, values=values, positions=part.positions.to(keys.device))

    return [made(part, here) for part, here in zip(stretch.parts, stretch.where, strict=True)]


def _in_front(backbone: Backbone, front: Sequence[KVMemory], known: KeysValues) -> KeysValues:
    if not front:
        return known.part(0, 0)
    memory = KVMemory.join([each.to(backbone.device, backbone.dtype) for each in front])
    return KeysValues(memory.keys[:, None], memory.values[:, None], memory.positions[None])


def _deviation(values: Tensor | None, known: Tensor) -> Tensor:
    """Return the squared distance of each token's values, ``[1, kv_heads, tokens, head_dim]``, from those known."""
    return (cast("Tensor", values).float() - known.float()).square().sum((0, 1, 3))


def _check_tokens(stretch: _Stretch, deviation: Tensor, known: Tensor) -> None:
    """Raise ``InputError`` where the first layer's values are not those of the given token."""
    size = known.float().square().sum((0, 1, 3))
    wrong = (deviation > _SAME_TOKEN**2 * size).cpu() & stretch.is_text.logical_not()
    if bool(wrong.any()):
        place = int(wrong.nonzero()[0])
        raise InputError(
            f"token {int(stretch.ids[place])}, at place {place} of what is to be blended, is not the one that the "
            "memory was made of",
            "give the token ids that were compressed; was the tokenizer changed since?",
        )
