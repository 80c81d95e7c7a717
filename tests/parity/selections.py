"""What cases of methods without training have in common: selections, and what is read behind them."""

from __future__ import annotations

import torch
from torch import Tensor

from ctxdocs.compressors.kv import KVCompressor
from ctxdocs.memory import KVMemory
from ctxdocs.modeling.rotary import rotate_keys

from .case import Case, Outcome

#: Of every selection; two letters in front of a share of kept slots name it: ``r2``, ``r60``.
_PARTS = ("kept_mask", "kept_positions", "kept_lens", "keys", "values", "logits", "greedy")


def shares(case: Case, mode: str) -> dict[str, float]:
    """Return which selections of a mode the case holds, ``{"r2": 0.5, ...}``."""
    found = {}
    for name, told in case.settings.items():
        share = name.removeprefix("ratio_")
        if share != name and case.has(f"{mode}.{share}.kept_mask"):
            top, _, bottom = told.removeprefix("keep ").partition("/")
            found[share] = float(top) / float(bottom or 1)
    return found


def leave_out(case: Case, outcome: Outcome, compared: set[str]) -> None:
    """Note the modes that are not compared."""
    modes = {".".join(name.split(".")[:2]) for name in case.tensors if name.endswith((".kept_mask", ".scores"))}
    outcome.left_out = modes - compared - {"authors.scores"}


def compare_full(case: Case, outcome: Outcome, compressor: KVCompressor, memory: KVMemory) -> None:
    """Compare the complete cache, and what is read behind it and behind nothing."""
    keys, values = (torch.cat(parts, dim=2) for parts in zip(*_parts(compressor, memory), strict=True))
    outcome.compare("full.keys", keys)
    outcome.compare("full.values", values)
    _read(case, outcome, compressor, memory, "full")


def compare_selection(case: Case, outcome: Outcome, compressor: KVCompressor, memory: KVMemory, name: str) -> None:
    """Compare which slots survive, their keys and values, and what is read behind them."""
    (front_keys, front_values), (keys, values) = _parts(compressor, memory)
    apart = memory.by_head()
    lengths = apart.lengths
    before = front_keys.shape[2]
    front = torch.arange(before)
    mask = torch.zeros(case.tensors[f"{name}.kept_mask"].shape, dtype=torch.uint8)
    kept: list[tuple[Tensor, ...]] = []
    heads = apart.positions.split(lengths.flatten().tolist())
    for number, (places, some_keys, some_values) in enumerate(zip(heads, keys, values, strict=True)):
        layer, head = divmod(number, lengths.shape[1])
        positions = torch.cat([front, before + places])
        mask[layer, head, positions] = 1
        some_keys = torch.cat([front_keys[layer, head], some_keys])
        kept.append((positions, some_keys, torch.cat([front_values[layer, head], some_values])))
    positions, all_keys, all_values = (torch.cat(part) for part in zip(*kept, strict=True))
    outcome.compare(f"{name}.kept_mask", mask.long())
    outcome.compare(f"{name}.kept_lens", lengths + before)
    outcome.compare(f"{name}.kept_positions", positions)
    outcome.compare(f"{name}.keys", all_keys)
    outcome.compare(f"{name}.values", all_values)
    _read(case, outcome, compressor, memory, name)


def _parts(compressor: KVCompressor, memory: KVMemory) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return keys, rotated, and values of the prefix ``[layers, heads, slots, size]`` and of the memory.

    A selection's are a list of tensors ``[slots, size]``, one for each head.
    """
    front = compressor.prefix_memory()
    first = rotate_keys(compressor.model, front.keys, front.positions)
    if memory.slots == memory.source_tokens:
        return (first, front.values), (
            rotate_keys(compressor.model, memory.keys, front.span + memory.positions),
            memory.values,
        )
    apart = memory.by_head()
    keys = rotate_keys(compressor.model, apart.keys, front.span + apart.positions)
    lengths = apart.lengths.flatten().tolist()
    return (first, front.values), (keys.split(lengths), apart.values.split(lengths))


def _read(case: Case, outcome: Outcome, compressor: KVCompressor, memory: KVMemory, name: str) -> None:
    front = [compressor.prefix_memory()] if len(compressor.prefix_ids) else []
    for probe, ids in (("", "probe_ids"), ("probe2_", "probe2_ids")):
        read = [*front, memory]
        if case.has(f"{name}.{probe}logits"):
            outcome.compare(f"{name}.{probe}logits", compressor.logits(case.tensors[ids][0], read))
        if case.has(f"{name}.{probe}greedy"):
            wanted = len(case.tensors[f"{name}.{probe}greedy"])
            new = compressor.generate_ids(case.tensors[ids][0], read, max_new_tokens=wanted, eos_token_ids=())
            outcome.compare_ids(f"{name}.{probe}greedy", new)
