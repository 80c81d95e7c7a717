"""Run KVzip cases: the authors' scores, their uniform budgets, and their threshold over all layers and heads."""

from __future__ import annotations

import torch

import ctxdocs
from ctxdocs.compressors.kvzip import QUOTED_TOKENS, KVzip

from .case import Case, Outcome, Unsupported
from .selections import compare_full, compare_selection, leave_out, shares

MODES = {"authors.uniform": "uniform", "authors.pair": "global"}


def run(case: Case, outcome: Outcome) -> None:
    if case.settings["previous_chunk_ids"] != QUOTED_TOKENS:
        raise Unsupported(f"requests quote {QUOTED_TOKENS} tokens")
    given = {"first": "instruction_first_ids", "next": "instruction_next_ids", "suffix": "suffix_ids"}
    compressor = ctxdocs.load_compressor(
        case.folder,
        method="kvzip",
        dtype="float32",
        device="cpu",
        prefix=case.tensors["prefix_ids"].flatten().tolist(),
        piece_tokens=case.settings["chunk_size"],
        request={name: case.tensors[ids].flatten().tolist() for name, ids in given.items()},
    )
    assert isinstance(compressor, KVzip)
    context = case.tensors["context_ids"][0]
    pieces = context.split(compressor.piece_tokens)
    asked = torch.cat([compressor.request_ids().for_piece(pieces, number) for number in range(len(pieces))])
    if asked.tolist() != case.tensors["scoring_ids"].flatten().tolist():
        outcome.differing.append("scoring_ids")
    outcome.compare("authors.scores", compressor.score_ids(context))
    compare_full(case, outcome, compressor, compressor.compress_ids([context], ratio=1)[0])
    for mode, budget in MODES.items():
        for name, share in shares(case, mode).items():
            memory = compressor.compress_ids([context], ratio=1 / share, budget=budget)[0]
            compare_selection(case, outcome, compressor, memory, f"{mode}.{name}")
    leave_out(case, outcome, "authors.head", "kvpress", "kvpress_plus")
