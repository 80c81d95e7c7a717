"""Run Expected Attention cases: uniform budgets over everything that is read."""

from __future__ import annotations

import torch

import ctxdocs

from .case import Case, Outcome
from .selections import compare_full, compare_selection, leave_out, shares

MODES = {
    "kvpress.uniform": {},
    "kvpress.uniform_nocov": {"covariance": "off"},
    "kvpress.uniform_novnorm": {"value_norm": "off"},
}


def run(case: Case, outcome: Outcome) -> None:
    settings = case.settings
    text = torch.cat([case.tensors["prefix_ids"][0], case.tensors["context_ids"][0]])
    compressor = ctxdocs.load_compressor(
        case.folder,
        method="expected_attention",
        dtype="float32",
        device="cpu",
        prefix="none",  # the reference has no prefix: all of the text competes
        sink_tokens=settings["n_sink"],
        future_tokens=settings["n_future_positions"],
        epsilon=settings["epsilon"]["uniform"],
    )
    compare_full(case, outcome, compressor, compressor.compress_ids([text], ratio=1)[0])
    for mode, changes in MODES.items():
        if not case.has(f"{mode}.scores"):
            continue
        with compressor.configured(**changes):
            outcome.compare(f"{mode}.scores", compressor.score_ids(text))
            for name, share in shares(case, mode).items():
                memory = compressor.compress_ids([text], ratio=1 / share)[0]
                compare_selection(case, outcome, compressor, memory, f"{mode}.{name}")
    leave_out(case, outcome, "kvpress.adakv", "kvpress.adakv_eps")
