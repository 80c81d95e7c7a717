"""What a step minimises. Gradients flow through the memories into everything."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ctxdocs.compressors.base import Compressor
from ctxdocs.training.bundled.batches import Batch, Rows
from ctxdocs.training.bundled.memories import SummaryVectors, memories_of

#: How much each loss counts.
LOSS_WEIGHTS = {"text": 1.0, "text_answers": 0.5, "continuation": 1.0, "rebuilt": 0.5, "answers": 0.7, "words": 0.3}
#: Words of this frequency count half in the words loss; rarer ones more, commoner ones less.
_COMMON = 1e-3
_ROWS_AT_ONCE = 1024


def losses(compressor: Compressor, batch: Batch, frequencies: Tensor) -> dict[str, Tensor]:
    """Return the losses of a batch, in nats per token.

    ``text``: plain rows and the documents themselves; ``text_answers``: questions behind text. ``continuation``,
    ``rebuilt``, ``answers``: rows behind memories. ``words``, of summary vectors: each one, put through the head, names
    words of the document; reading a memory is learnt much sooner when there is something in it to read.

    Parameters
    ----------
    compressor : Compressor
        In training mode.
    batch : Batch
        On the compressor's device.
    frequencies : torch.Tensor
        float32 ``[vocabulary]``, share of every token in the text.
    """
    memories, backbone, documents, plain = memories_of(compressor), compressor.backbone, batch.documents, batch.plain
    document_states, written = memories.write(documents, batch.ratio)
    read_states = memories.read(written, batch.memories, batch.reads.ids, closed=batch.closed)
    place = torch.arange(plain.ids.shape[1], device=plain.ids.device)[None]
    plain_states = backbone.run(backbone.embed(plain.ids), place)
    table = backbone.embedding.weight
    ones = torch.ones_like(documents, dtype=torch.float32)
    result = {"text": _next_token(table, [(document_states, Rows(documents, ones)), (plain_states, plain)])}
    result["text_answers"] = _next_token(table, [(plain_states, Rows(plain.ids, batch.plain_answers))])
    if isinstance(memories, SummaryVectors):
        result["words"] = _words(table, written, documents, frequencies)
    for name, rows in batch.kinds.items():
        result[name] = _next_token(table, [(read_states[rows], Rows(batch.reads.ids[rows], batch.reads.weights[rows]))])
    return result


def total(parts: dict[str, Tensor]) -> Tensor:
    """Return the weighted sum of the losses."""
    return torch.stack([LOSS_WEIGHTS[name] * loss for name, loss in parts.items()]).sum()


def _next_token(table: Tensor, groups: list[tuple[Tensor, Rows]]) -> Tensor:
    states = torch.cat([states[:, :-1].flatten(0, 1) for states, _ in groups])
    targets = torch.cat([rows.ids[:, 1:].flatten() for _, rows in groups])
    weights = torch.cat([rows.weights[:, 1:].flatten() for _, rows in groups])
    return weighted_cross_entropy(states, table, targets[:, None], weights[:, None])


def _words(table: Tensor, vectors: Tensor, documents: Tensor, frequencies: Tensor) -> Tensor:
    """Half of what a vector names are words of the whole document (soon learnt), half those of its own stretch."""
    slots, tokens = vectors.shape[1], documents.shape[1]
    rarity = _COMMON / (_COMMON + frequencies[documents])
    stretch = torch.arange(tokens, device=documents.device) * slots // tokens
    own = stretch == torch.arange(slots, device=documents.device)[:, None]
    targets = documents[:, None].expand(-1, slots, -1)
    weights = rarity[:, None] * (1 + slots * own)
    return weighted_cross_entropy(vectors.flatten(0, 1), table, targets.flatten(0, 1), weights.flatten(0, 1))


def weighted_cross_entropy(states: Tensor, table: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean cross-entropy of ``states @ table.T`` against several targets per row.

    Logits exist for a few rows at a time, and their gradient is taken while they are there: the whole matrix would
    take more memory than the rest of the step, and on a CPU most of its time.

    Parameters
    ----------
    states : torch.Tensor
        ``[rows, width]``.
    table : torch.Tensor
        ``[vocabulary, width]``.
    targets : torch.Tensor
        int64 ``[rows, targets per row]``.
    weights : torch.Tensor
        float32, like ``targets``.
    """
    live = (weights > 0).any(dim=1)
    loss: Tensor = _CrossEntropy.apply(states[live], table, targets[live], weights[live])
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, table: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype(states.device.type) if _autocast(states) else table.dtype
        small_table = table.to(dtype)
        weights = weights / weights.sum().clamp(min=1e-8)
        loss = states.new_zeros((), dtype=torch.float32)
        states_grad = torch.empty_like(states, dtype=torch.float32)
        table_grad = torch.zeros_like(table, dtype=torch.float32)
        for start in range(0, len(states), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            small = states[rows].to(dtype)
            logits = (small @ small_table.T).float()
            # What remains of the logits after this line is their gradient.
            norm = torch.logsumexp(logits, dim=1, keepdim=True)
            loss += ((norm - logits.gather(1, targets[rows])) * weights[rows]).sum()
            logits.sub_(norm).exp_().mul_(weights[rows].sum(dim=1, keepdim=True))
            logits.scatter_add_(1, targets[rows], -weights[rows])
            grad = logits.to(dtype)
            states_grad[rows] = grad @ small_table
            table_grad += grad.T @ small
        ctx.save_for_backward(states_grad.to(states.dtype), table_grad.to(table.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        states_grad, table_grad = ctx.saved_tensors
        return states_grad * grads[0], table_grad * grads[0], None, None


def _autocast(tensor: Tensor) -> bool:
    return torch.is_autocast_enabled(tensor.device.type)
