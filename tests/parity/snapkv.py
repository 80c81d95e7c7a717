"""Run SnapKV cases: uniform budgets over everything that is read."""

from __future__ import annotations

import torch

import ctxdocs

from .case import Case, Outcome
from .selections import compare_full, compare_selection, leave_out, shares

MODE = "kvpress.uniform"


def run(case: Case, outcome: Outcome) -> None:
    text = torch.cat([case.tensors["prefix_ids"][0], case.tensors["context_ids"][0]])
    compressor = ctxdocs.load_compressor(
        case.folder,
        method="snapkv",
        dtype="float32",
        device="cpu",
        prefix="none",  # the reference has no prefix: all of the text competes
        window=case.settings["window_size"],
        kernel=case.settings["kernel_size"],
    )
    compare_full(case, outcome, compressor, compressor.compress_ids([text], ratio=1)[0])
    outcome.compare(f"{MODE}.scores", compressor.score_ids(text))
    for name, share in shares(case, MODE).items():
        memory = compressor.compress_ids([text], ratio=1 / share)[0]
        compare_selection(case, outcome, compressor, memory, f"{MODE}.{name}")
    leave_out(case, outcome, "kvpress.adakv")
