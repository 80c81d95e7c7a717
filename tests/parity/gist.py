"""Run Activation Beacon and UltraGist cases: one text after another through sessions, call by call."""

from __future__ import annotations

import torch
from torch import Tensor

import ctxdocs
from ctxdocs.compressors.gist import GistCompressor
from ctxdocs.compressors.gist_sessions import GistSession
from ctxdocs.training.steps.gist import GistStep

from .case import CALL, Case, Outcome, Unsupported


def run(case: Case, outcome: Outcome) -> None:
    settings, method = case.settings, case.method
    calls = settings["calls"]
    if any(set(call) - CALL for call in calls) or any(name.startswith("attention_mask") for name in case.tensors):
        raise Unsupported("padding and rewinding are left out")
    if settings.get(f"{method}_ratio_mix") == "join":
        raise Unsupported("several ratios at once are left out")
    if settings.get("beacon_pos") == "interleave" and settings.get("beacon_attn") != "full-coverage":
        raise Unsupported("interleaved beacons have full coverage only")
    compressor = ctxdocs.load_compressor(case.folder, method=method, dtype="float32", device="cpu")
    assert isinstance(compressor, GistCompressor)
    names = ["input_ids"] if "input_ids" in case.tensors else [f"input_ids_{index}" for index in range(len(calls))]
    inputs = [case.tensors[name] for name in names]
    sessions = [compressor.session() for _ in inputs[0]]
    for session in sessions:  # the authors' code reads on beyond a model's positions
        session._check_room = lambda tokens: None
    last = _prompt(case, outcome, sessions, inputs)
    if case.has("expected_generated_ids"):
        _greedy(case, outcome, sessions, last)
    if len(inputs) == 1 and not any(set(call) - {"len"} for call in calls):
        _batch(case, outcome, compressor, inputs[0])


def _prompt(case: Case, outcome: Outcome, sessions: list[GistSession], inputs: list[Tensor]) -> list[Tensor]:
    """Feed the calls; compare what every token was told and what is kept."""
    rows = []
    for row, session in enumerate(sessions):
        logits = []
        for ids, call in zip(inputs, case.settings["calls"], strict=True):
            skip = {"skip_first": call.get("beacon_skip_first") or 0, "skip_last": call.get("beacon_skip_last")}
            logits.append(session.feed(ids[row], **skip))
        rows.append(torch.cat(logits))
    outcome.compare("expected_all_logits", torch.stack(rows))
    if case.has("expected_logits"):
        returned = case.tensors["expected_logits"].shape[1]
        outcome.compare("expected_logits", torch.stack(rows)[:, -returned:])
    _memory(case, outcome, sessions, "expected_memory")
    return [logits[-1] for logits in rows]


def _greedy(case: Case, outcome: Outcome, sessions: list[GistSession], last: list[Tensor]) -> None:
    new, seen = [], []
    for session, logits in zip(sessions, last, strict=True):
        row = [logits]
        for _ in range(case.settings["generated_tokens"] - 1):
            row.append(session.feed([int(row[-1].argmax())])[-1])
        new.append([int(logits.argmax()) for logits in row])
        seen.append(torch.stack(row))
    outcome.compare_ids("expected_generated_ids", new)
    outcome.compare("expected_generation_logits", torch.stack(seen))
    _memory(case, outcome, sessions, "expected_memory_after_generation")
    slots = torch.cat([session.windows.slots for session in sessions], dim=2)
    outcome.compare("expected_get_memory_after_generation", slots.transpose(0, 1))


def _memory(case: Case, outcome: Outcome, sessions: list[GistSession], prefix: str) -> None:
    """Compare every recorded part; a part that was empty is not recorded."""
    for part in ("sink", "gist", "raw"):
        slots = torch.cat([getattr(session.windows, part) for session in sessions], dim=2)
        published = case.method if part == "gist" and case.method == "beacon" else part
        recorded = 0
        for kind, tensors in zip(("key", "value"), slots, strict=True):
            for layer, tensor in enumerate(tensors):
                name = f"{prefix}.layer{layer}.{published}_{kind}"
                if case.has(name):
                    recorded += 1
                    outcome.compare(name, tensor)
        if not recorded and slots.shape[-2]:
            outcome.differing.append(f"{prefix}: {part} is not empty")


def _batch(case: Case, outcome: Outcome, compressor: GistCompressor, ids: Tensor) -> None:
    """Read the whole batch at once; take the losses, and the gradients of training."""
    logits = compressor(ids)
    outcome.compare("expected_all_logits", logits)
    if len(compressor.ratio) > 1 and compressor.ratio_mix.endswith("random"):
        # The authors' generator goes on from text to text, and which draws the losses had is not recorded.
        outcome.leave(*(name for name in case.tensors if name.startswith(("expected_eval_", "expected_train_"))))
        return
    outcome.compare("expected_eval_loss", _loss(logits, ids)[None])
    rows = zip(logits.split(1), ids.split(1), strict=True)
    outcome.compare("expected_eval_batch_loss", torch.stack([_loss(*row) for row in rows]))
    if not case.has("expected_train_loss"):
        return
    for parameter in compressor.own_parameters().values():
        parameter.requires_grad_(True)
    loss = GistStep(compressor, GistStep.Options())({"input_ids": ids, "labels": ids})["loss"]
    outcome.compare("expected_train_loss", loss.detach()[None])
    loss.backward()
    for name, parameter in compressor.own_parameters().items():
        if case.has(f"expected_train_grad.{name}"):
            outcome.compare_relative(f"expected_train_grad.{name}", parameter.grad)


def _loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean over all tokens of how unlikely the next one was."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
