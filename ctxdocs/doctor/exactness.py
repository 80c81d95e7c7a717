"""What has to be exact: an exact memory is the text, in the cache, in the logits, and in what is generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ctxdocs.doctor.material import ANSWER_TOKENS, Material
from ctxdocs.doctor.prefill import Prefill, Rounding, by_layer, farthest, prefill, rounding
from ctxdocs.doctor.report import Check

if TYPE_CHECKING:
    from ctxdocs.compressors.kv import KVCompressor
    from ctxdocs.memory import Memory

# One document behind its prefix shows whether memories are exact; a second one, that it was no luck.
_DOCUMENTS = 2


@dataclass(frozen=True, eq=False)
class _Case:
    """A document read as text and as a memory."""

    text: Tensor
    probe: Tensor
    memory: Memory
    own: Prefill
    allowed: Rounding


def check_exactness(compressor: KVCompressor, material: Material, memories: Sequence[Memory]) -> list[Check]:
    """Return the lines on what has to be exact; ``memories`` are exact ones of the material's documents."""
    cases = []
    for index, memory in enumerate(memories[:_DOCUMENTS]):
        probe = material.probe(index + 1)
        text = torch.cat([compressor.prefix_ids, material.documents(index + 1)[-1], probe])
        own = prefill(compressor.backbone, text, len(probe))
        cases.append(_Case(text, probe, memory, own, rounding(compressor.backbone, own, text, len(probe))))
    checks = [_cache(compressor, cases), _logits(compressor, cases), _tokens(compressor, cases)]
    return checks if len(memories) < 2 else [*checks, _moved(compressor, material, memories)]


def check_blending(compressor: KVCompressor, material: Material, memories: Sequence[Memory]) -> Check:
    """Return the line on documents that are blended in full: they are one prefill."""
    probe, documents = material.probe(len(memories)), material.documents(len(memories))
    text = torch.cat([compressor.prefix_ids, *documents, probe])
    own = prefill(compressor.backbone, text, len(probe))
    allowed = rounding(compressor.backbone, own, text, len(probe)).logits
    read = compressor.logits(probe, [compressor.prefix_memory(), *compressor.blend(memories, documents, 1)])
    return _judged(f"all of {len(memories)} blended", "a joint prefill", [float(farthest(read, own.logits))], [allowed])


def _cache(compressor: KVCompressor, cases: Sequence[_Case]) -> Check:
    """Compare what reading a memory puts into the cache with what the model itself put there."""
    placed = []
    for case in cases:
        row = compressor.model_input([compressor.prefix_memory(), case.memory, case.probe])
        behind = slice(0, len(case.text) - len(case.probe))
        placed.append(
            (_slots(row.keys, row.values, behind), _slots(case.own.keys, case.own.values, behind), case.allowed)
        )
    return _judged_cache("cache", placed)


def _moved(compressor: KVCompressor, material: Material, memories: Sequence[Memory]) -> Check:
    """Compare where the last of several memories has come to with where the model puts its tokens.

    Keys and values of the first layer depend on the token and its position alone, so that nothing in front is needed
    for comparison. The keys of all layers are turned alike.
    """
    document = material.documents(len(memories))[-1]
    start = len(compressor.prefix_ids) + sum(memory.span for memory in memories[:-1])
    own = prefill(compressor.backbone, document, 1, start)
    allowed = rounding(compressor.backbone, own, document, 1, start)
    row = compressor.model_input([compressor.prefix_memory(), *memories, material.probe(len(memories))])
    found = _slots(row.keys, row.values, slice(start, start + len(document)))
    return _judged_cache("moved", [(found, _slots(own.keys, own.values, slice(None)), allowed)], layers=1)


def _slots(keys: Tensor | None, values: Tensor | None, which: slice) -> dict[str, Tensor]:
    return {kind: each[:, :, which] for kind, each in (("keys", keys), ("values", values)) if each is not None}


def _judged_cache(
    name: str, placed: Sequence[tuple[dict[str, Tensor], dict[str, Tensor], Rounding]], layers: int | None = None
) -> Check:
    """Judge cached slots of the first layers (or all) by the model's own, and by what rounding may move."""
    worst, where = 0.0, "keys of layer 0"
    for found, wanted, allowed in placed:
        for kind, own in wanted.items():
            if kind not in found or found[kind].shape != own.shape:
                return Check(name, "FAIL", f"the {kind} of the memory are not as many as the model caches")
            least = torch.finfo(own.dtype).eps * own.float().abs().amax()  # for a layer that nothing moved
            shares = by_layer(found[kind], own)[:layers] / getattr(allowed, kind)[:layers].clamp(min=least)
            share, layer = (float(each) for each in shares.max(0))
            if not share <= worst:
                worst, where = share, f"{kind} of layer {int(layer)}"
    values = {"share_of_allowed": worst, "farthest": where}
    if worst <= 1:
        message = f"keys and values are the model's own: at most {worst:.2f} of what rounding may move ({where})"
        return Check(name, "ok", message, values)
    message = f"{where} are not what the model itself caches: {worst:.3g} times as far as rounding may move them"
    return Check(name, "FAIL", message, values)


def _logits(compressor: KVCompressor, cases: Sequence[_Case]) -> Check:
    differences = []
    for case in cases:
        read = compressor.logits(case.probe, [compressor.prefix_memory(), case.memory])
        differences.append(float(farthest(read, case.own.logits)))
    return _judged("logits", "the prefill", differences, [case.allowed.logits for case in cases])


def _judged(name: str, reference: str, differences: Sequence[float], allowed: Sequence[float]) -> Check:
    share, difference, most = max((d / max(a, 1e-30), d, a) for d, a in zip(differences, allowed, strict=True))
    values = {"largest_difference": difference, "allowed": most}
    fine = share <= 1 and most < float("inf")  # logits that are no numbers are infinitely far from everything
    message = f"off {reference} by {difference:.2g} at most; rounding may move a logit by {most:.2g}"
    return Check(name, "ok" if fine else "FAIL", message, values)


def _tokens(compressor: KVCompressor, cases: Sequence[_Case]) -> Check:
    """Ask the model itself whether each token generated behind a memory is the likeliest behind the text."""
    same, ties, wrong = 0, 0, 0
    for case in cases:
        answer = torch.tensor(
            compressor.generate_ids(
                case.probe, [compressor.prefix_memory(), case.memory], max_new_tokens=ANSWER_TOKENS, eos_token_ids=()
            )
        )
        own = prefill(compressor.backbone, torch.cat([case.text, answer]), len(answer) + 1).logits[:-1].cpu()
        behind = own.amax(1) - own.gather(1, answer[:, None])[:, 0]
        likeliest = own.argmax(1) == answer
        is_tie = likeliest.logical_not() & (behind <= 2 * case.allowed.logits)  # which rounding may decide
        same, ties = same + int(likeliest.sum()), ties + int(is_tie.sum())
        wrong += int((likeliest | is_tie).logical_not().sum())
    message = f"{same} of {same + ties + wrong} greedy tokens are the prefill's"
    message += f", {ties} as likely but for rounding" if ties else ""
    message += f", {wrong} others" if wrong else ""
    return Check("tokens", "FAIL" if wrong else "ok", message, {"same": same, "ties": ties, "wrong": wrong})
