"""What cases of methods without training have in common: selections, and what is read behind them."""

from __future__ import annotations

from dataclasses import replace

import torch

from ctxdocs.compressors.kv import KVCompressor
from ctxdocs.memory import KVMemory
from ctxdocs.modeling.rotary import rotate_keys

from .case import Case, Outcome


def shares(case: Case, mode: str) -> dict[str, float]:
    """Return the selections of a mode and which share of the slots each keeps: ``{"r2": 0.5, "r60": 0.6}``."""
    found = {}
    for selection in (name.removesuffix(".kept_mask") for name in case.tensors if name.endswith(".kept_mask")):
        its_mode, _, name = selection.rpartition(".")
        if its_mode == mode:
            number = int(name.removeprefix("r"))
            told = case.settings.get(f"ratio_{name}", f"{number}/100" if number > 9 else f"1/{number}")
            top, _, bottom = told.removeprefix("keep ").partition("/")
            found[name] = float(top) / float(bottom or 1)
    return found


def leave_out(case: Case, outcome: Outcome, *modes: str) -> None:
    """Leave modes out: what starts with their names."""
    outcome.leave(*(name for name in case.tensors if name.startswith(tuple(f"{mode}." for mode in modes))))


def compare_full(case: Case, outcome: Outcome, compressor: KVCompressor, memory: KVMemory) -> None:
    """Compare the complete cache, and what is read behind it and behind nothing at the same positions."""
    front = compressor.prefix_memory()
    whole = KVMemory.join([front, memory])
    outcome.compare("full.keys", rotate_keys(compressor.model, whole.keys, whole.positions))
    outcome.compare("full.values", whole.values)
    _read(case, outcome, compressor, memory, "full")
    apart = whole.by_head()
    nothing = {name: tensor[:0] for name, tensor in apart.tensors().items() if name != "lengths"}
    nowhere = replace(apart, **nothing, lengths=torch.zeros_like(apart.lengths))
    outcome.compare("nomemory.logits", compressor.logits(case.tensors["probe_ids"][0], [nowhere]))


def compare_selection(case: Case, outcome: Outcome, compressor: KVCompressor, memory: KVMemory, name: str) -> None:
    """Compare which slots survive, the prefix's first, their keys and values, and what is read behind them."""
    whole = KVMemory.join([compressor.prefix_memory().by_head(), memory])
    heads = torch.arange(whole.lengths.numel()).repeat_interleave(whole.lengths.flatten())
    mask = torch.zeros(whole.lengths.numel(), whole.span, dtype=torch.uint8)
    mask[heads, whole.positions] = 1
    outcome.compare(f"{name}.kept_mask", mask.view(*whole.lengths.shape, -1))
    outcome.compare(f"{name}.kept_lens", whole.lengths)
    outcome.compare(f"{name}.kept_positions", whole.positions)
    outcome.compare(f"{name}.keys", rotate_keys(compressor.model, whole.keys, whole.positions))
    outcome.compare(f"{name}.values", whole.values)
    _read(case, outcome, compressor, memory, name)


def _read(case: Case, outcome: Outcome, compressor: KVCompressor, memory: KVMemory, name: str) -> None:
    """Compare what follows one question and, where there is one, another; reading leaves a memory as it is."""
    front = [compressor.prefix_memory()] if len(compressor.prefix_ids) else []
    for part in (tensor.removeprefix(f"{name}.") for tensor in case.tensors if tensor.startswith(f"{name}.")):
        probe = case.tensors["probe2_ids" if part.startswith("probe2") else "probe_ids"][0]
        if part.endswith("logits"):
            outcome.compare(f"{name}.{part}", compressor.logits(probe, [*front, memory]))
        elif part.endswith("greedy"):
            wanted = len(case.tensors[f"{name}.{part}"])
            new = compressor.generate_ids(probe, [*front, memory], max_new_tokens=wanted, eos_token_ids=())
            outcome.compare_ids(f"{name}.{part}", new)
