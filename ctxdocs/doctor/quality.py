"""What costs quality: documents composed without knowing of each other, and memories that keep less."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ctxdocs.doctor.material import Material
from ctxdocs.doctor.prefill import prefill
from ctxdocs.doctor.report import Check, Verdict
from ctxdocs.errors import InputError

if TYPE_CHECKING:
    from ctxdocs.compressors.kv import KVCompressor
    from ctxdocs.memory import Memory

#: The share of tokens that is blended where blending is measured.
BLENDED = 0.15

# A line is "ok" where the likeliest token is the same at so many of the places, and else a note.
_AGREEING = 0.9


@dataclass(frozen=True)
class Distance:
    """How far predictions are from a reference's.

    Parameters
    ----------
    nats : float
        Kullback-Leibler divergence from the reference, nats per token.
    agreement : float
        Share of places at which both find the same token likeliest.
    """

    nats: float
    agreement: float

    def __str__(self) -> str:
        return f"{self.nats:.2g} nats, {self.agreement:.0%} agree"


def distance(logits: Tensor, reference: Tensor) -> Distance:
    """Compare logits ``[tokens, vocabulary]`` with those of a reference."""
    own, other = reference.float().log_softmax(-1), logits.float().log_softmax(-1)
    nats = (own.exp() * (own - other)).sum(-1).clamp(min=0).mean()
    return Distance(float(nats), float((own.argmax(-1) == other.argmax(-1)).float().mean()))


def check_composition(compressor: KVCompressor, material: Material, memories: Sequence[Memory]) -> Check:
    """Return the line on exact memories read together, against their texts read as one."""
    count = len(memories)
    documents, probe = material.documents(count), material.probe(count)
    text = torch.cat([compressor.prefix_ids, *documents, probe])
    joint = prefill(compressor.backbone, text, len(probe)).logits
    apart = distance(_read(compressor, memories, probe), joint)
    values: dict[str, Any] = {"documents": count, "tokens": sum(map(len, documents)), **asdict(apart)}
    try:
        together = compressor.blend(memories, documents, BLENDED)
    except InputError as error:  # a kernel that takes no mask
        values["blended"], said = None, f"not measured, {error}"
    else:
        blended = distance(_read(compressor, together, probe), joint)
        values["blended"], said = {"share": BLENDED, **asdict(blended)}, str(blended)
    message = f"{apart}; {BLENDED:.0%} blended: {said}"
    return Check(f"composed {count}", _verdict(apart), message, values)


def check_ratio(
    compressor: KVCompressor,
    material: Material,
    ratio: int,
    exact: Sequence[Memory],
    pruned: Sequence[Memory],
    counts: Sequence[int],
) -> Check:
    """Return the line on memories at a ratio, against exact ones in their place, for several numbers of documents."""
    found = {}
    for count in counts:
        probe = material.probe(count)
        reference = _read(compressor, exact[:count], probe)
        found[count] = distance(_read(compressor, pruned[:count], probe), reference)
    values = {
        "ratio": ratio,
        "bytes_per_token": sum(m.nbytes for m in pruned) / sum(m.source_tokens for m in pruned),
        "documents": [{"documents": count, **asdict(each)} for count, each in found.items()],
    }
    message = "; ".join(f"{count} read: {each}" for count, each in found.items())
    return Check(f"ratio {ratio}", _verdict(*found.values()), message, values)


def _verdict(*distances: Distance) -> Verdict:
    return "ok" if min(each.agreement for each in distances) >= _AGREEING else "note"


def _read(compressor: KVCompressor, memories: Sequence[Memory], probe: Tensor) -> Tensor:
    return compressor.logits(probe, [compressor.prefix_memory(), *memories])
