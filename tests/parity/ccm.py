"""Run CCM cases: the recursion and the form that trains in one pass, the loss and gradients of both, conversations and
streams, and the masks and positions of one pass without a model."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import ctxdocs
from ctxdocs.compressors.ccm import ATTENTION_TYPES, CCM
from ctxdocs.compressors.ccm_parallel import Specials, one_pass
from ctxdocs.compressors.ccm_sessions import CCMStream, Window
from ctxdocs.memory import KVMemory
from ctxdocs.modeling.rotary import rotate_keys

from .case import Case, Outcome, Unsupported

#: Longer than any turn of a case.
WHOLE_TURNS = 10**6


def run(case: Case, outcome: Outcome) -> None:
    if not (case.folder / "config.json").is_file():
        _masks(case, outcome)
        return
    if case.settings["attn_type"] not in ATTENTION_TYPES:
        raise Unsupported(f"{case.settings['attn_type']} is a baseline, no method of ctxdocs")
    compressor = _load(case)
    if case.settings.get("stream"):
        _streams(case, outcome, compressor)
    elif case.has("turn0_query"):
        _conversation(case, outcome, compressor)
    else:
        _recursion(case, outcome, compressor)
        if case.has("input_ids", "expected_logits"):
            _one_pass(case, outcome, compressor)


def _masks(case: Case, outcome: Outcome) -> None:
    """Compare positions, masks and what is merged, of every type there is."""
    first, size = case.settings["comp_token_ids"][0], case.settings["num_comp_tokens"]
    suffix = "_expected_position_ids"
    for attn_type in [name.removesuffix(suffix) for name in case.tensors if name.endswith(suffix)]:
        ids, live = case.tensors[f"{attn_type}_input_ids"], case.tensors[f"{attn_type}_attention_mask"].bool()
        specials = Specials.of(ids, first, size)
        unseen, sink = ids == case.settings["pad_token_id"], ids == case.settings["sink_token_id"]
        actual = {
            "position_ids": specials.positions(live),
            "comp_mask": specials.marked,
            "mask": specials.visible(attn_type, unseen)[:, None],
            "mask_sink": specials.visible(attn_type, unseen, sink)[:, None],
            "merge_matrix": specials.merging(),
        }
        for kind, tensor in actual.items():
            if case.has(name := f"{attn_type}_expected_{kind}"):
                outcome.compare(name, tensor)


def _load(case: Case) -> CCM:
    settings = case.settings
    compressor = ctxdocs.load_compressor(
        case.folder / "adapter",
        method="ccm",
        dtype="float32",
        device="cpu",
        base_model=case.folder,
        finetune=case.folder / "finetune" if settings.get("merged_finetune_adapter") else None,
        attn_type=settings["attn_type"],
        num_comp_tokens=settings["num_comp_tokens"],
        sink=settings["sink"],
    )
    # The authors' code reads on beyond a model's positions, ctxdocs refuses to; here it has to.
    longest = sum(tensor.numel() for name, tensor in case.tensors.items() if tensor.dtype == torch.long)
    compressor.model.config.max_position_embeddings = max(compressor.backbone.max_positions, longest)
    return compressor


def _recursion(case: Case, outcome: Outcome, compressor: CCM) -> None:
    trains = any(name.startswith("expected_grad.") for name in case.tensors)
    compressor.requires_grad_(trains)
    rows = [""] if case.has("context_0") else [f"_row{row}" for row in range(len(case.tensors["input_ids"]))]
    answers, generated = [], []
    for row, suffix in enumerate(rows):
        segments = _segments(case, suffix)
        query, target = case.tensors[f"query{suffix}"][0], case.tensors[f"target{suffix}"][0]
        memories = _memories(case, outcome, compressor, segments, suffix)[-1:]
        logits = compressor.logits(torch.cat([query, target]), memories)
        outcome.compare(f"expected_query_logits{suffix}", logits.detach()[None])
        answers.append((logits[len(query) - 1 : -1], target))
        if case.has(name := f"expected_generated_ids_from_memory{suffix}"):
            outcome.compare_ids(name, [_greedy(case, compressor, query, memories, name)])
        if case.has(name := "expected_generated_ids"):
            generated.append(_greedy(case, compressor, query, memories, name))
        if case.has("expected_logits"):
            _session_logits(case, outcome, compressor, row, [*segments, torch.cat([query, target])])
    if generated:
        outcome.compare_ids("expected_generated_ids", generated)
    if case.has("expected_loglikelihood_sum"):
        _scores(case, outcome, answers)
    if case.has("expected_loss"):
        loss = cross_entropy(torch.cat([logits for logits, _ in answers]), torch.cat([target for _, target in answers]))
        outcome.compare("expected_loss", loss.detach()[None])
        if trains:
            loss.backward()
            _gradients(case, outcome, compressor)


def _segments(case: Case, suffix: str) -> list[Tensor]:
    names = [f"context_{index}{suffix}" for index in range(len(case.tensors))]
    return [case.tensors[name][0] for name in names if name in case.tensors]


def _memories(case: Case, outcome: Outcome, compressor: CCM, segments: list[Tensor], suffix: str) -> list[KVMemory]:
    """Compare the memory after every step, and return them."""
    memories = []
    for step in range(len(segments)):
        read = segments[: step + 1]
        memories += compressor.compress_ids([torch.cat(read)], segment_lengths=[len(segment) for segment in read])
        at = f"_step{step}" if step < len(segments) - 1 else ""
        _compare_memory(case, outcome, compressor, memories[-1], f"expected_memory_{{}}{at}{suffix}")
    return memories


def _one_pass(case: Case, outcome: Outcome, compressor: CCM) -> None:
    """Compare the logits of rows that hold their special tokens, and the loss and gradients of one pass."""
    ids, live = case.tensors["input_ids"], case.tensors["attention_mask"].bool()
    specials = Specials.of(ids, compressor.backbone.vocabulary, compressor.num_comp_tokens)
    if case.has("expected_position_ids"):
        outcome.compare("expected_position_ids", specials.positions(live))
    compressor.zero_grad()
    logits = compressor.backbone.head(one_pass(compressor, ids, live, unseen=ids == case.settings["pad_token_id"]))
    outcome.compare("expected_logits", logits.detach(), live)
    if case.has("expected_loss"):
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), case.tensors["labels"][:, 1:].flatten())
        outcome.compare("expected_loss", loss.detach()[None])
        if loss.requires_grad:
            loss.backward()
            _gradients(case, outcome, compressor)


def _compare_memory(case: Case, outcome: Outcome, compressor: CCM, memory: KVMemory, name: str) -> None:
    """Compare keys where they stand, and values; ``name`` has a place for which of the two."""
    keys = rotate_keys(compressor.model, memory.keys, memory.positions)
    outcome.compare(name.format("key"), keys[:, None].detach())
    outcome.compare(name.format("value"), memory.values[:, None].detach())


def _greedy(case: Case, compressor: CCM, query: Tensor, memories: list[KVMemory], name: str) -> list[int]:
    """Generate as long as the tensor ``name``, padded behind the end token."""
    width = case.tensors[name].shape[1]
    eos, pad = case.settings["eos_token_id"], case.settings["pad_token_id"]
    ids = compressor.generate_ids(query, memories, max_new_tokens=width, eos_token_ids=(eos,))
    return [*ids, eos, *[pad] * width][:width]


def _session_logits(case: Case, outcome: Outcome, compressor: CCM, row: int, segments: list[Tensor]) -> None:
    """Compare a row's text tokens, read by a session."""
    ids, live = case.tensors["input_ids"][row], case.tensors["attention_mask"][row]
    text = live.bool() & (ids < compressor.backbone.vocabulary)
    session = compressor.session(segment_tokens=WHOLE_TURNS)
    logits = []
    with torch.no_grad():
        for segment in segments:
            session.end_turn()
            logits.append(session.feed(segment))
    actual = torch.zeros_like(case.tensors["expected_logits"])
    actual[row, text] = torch.cat(logits)
    where = torch.zeros(actual.shape[:2], dtype=torch.bool)
    where[row] = text
    if not compressor.is_recurrent:  # there, only what follows the last segment sees the memory
        where[row, : -len(segments[-1])] = False
    outcome.compare("expected_logits", actual, where)


def _scores(case: Case, outcome: Outcome, answers: list[tuple[Tensor, Tensor]]) -> None:
    """Compare log-likelihoods of the answers, without the end token."""
    chosen = [logits.detach().log_softmax(-1).gather(1, target[:, None])[:-1, 0] for logits, target in answers]
    sums = torch.stack([each.double().sum() for each in chosen])
    lengths = torch.tensor([len(each) for each in chosen], dtype=torch.double)
    outcome.compare("expected_loglikelihood_sum", sums)
    outcome.compare("expected_loglikelihood_mean", sums / lengths)
    outcome.compare("expected_label_length", lengths)


def _gradients(case: Case, outcome: Outcome, compressor: CCM) -> None:
    names = [name for name in case.tensors if name.startswith("expected_grad.")]
    prefix = "expected_grad.base_model.model.model."
    for name in names:
        own = name.removeprefix(prefix).replace("embed_tokens.", "")
        own = own.replace("layers.", "lora.").replace("self_attn.", "")
        parameter = compressor.own_parameters()[own]
        # What special tokens put out in the last layer is never read.
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        outcome.compare_relative(name, gradient)


def _conversation(case: Case, outcome: Outcome, compressor: CCM) -> None:
    session = compressor.session(segment_tokens=WHOLE_TURNS)
    for turn, _ in enumerate(case.settings["turns"]):
        query = case.tensors[f"turn{turn}_query"][0]
        expected = case.tensors[f"turn{turn}_expected_sequence"][0]
        last = session.feed(query)[-1]
        new = [int(last.argmax())]
        while len(query) + len(new) < len(expected):
            last = session.feed(new[-1:])[-1]
            new.append(int(last.argmax()))
        outcome.compare_ids(f"turn{turn}_expected_sequence", [[*query.tolist(), *new]])
        session.end_turn()
        _compare_memory(case, outcome, compressor, session.memory(), f"turn{turn}_expected_memory_{{}}")
    outcome.compare("expected_probe_logits", compressor.logits(case.tensors["probe"][0], [session.memory()])[None])
    outcome.compare("expected_probe_logits", session.feed(case.tensors["probe"][0])[None])


def _streams(case: Case, outcome: Outcome, compressor: CCM) -> None:
    sizes = {name: case.settings[name] for name in ("window_size", "comp_size", "comp_cache_size", "sink_size")}
    # Of a merging stream the case holds the authors' numbers, which mistake keys for values, and repaired ones.
    if compressor.merges and not case.has("fixedvalue_expected_logits"):
        raise Unsupported("a merging stream that takes keys for values")
    if compressor.merges:
        outcome.leave(*(name for name in case.tensors if name.startswith("expected_")))
    _stream(case, outcome, compressor.session(window=Window(**sizes)), "fixedvalue_" if compressor.merges else "")
    if case.has("baseline_expected_logits"):
        _stream(case, outcome, compressor.session(window=Window(**sizes, keeps="text")), "baseline_")


def _stream(case: Case, outcome: Outcome, session: CCMStream, prefix: str) -> None:
    ids = case.tensors["stream_ids"][0]
    before, events, logits = [], [], []
    for index, token in enumerate(ids[:-1]):
        before.append(session.cached)
        done = session.compressions
        logits.append(session.feed(token[None]))
        if session.compressions > done:
            events.append(index)
            outcome.compare(f"{prefix}expected_cache_key_{done}", session.held.keys)
            outcome.compare(f"{prefix}expected_cache_value_{done}", session.held.values)
    outcome.compare(f"{prefix}expected_logits", torch.cat(logits))
    session.reset()
    outcome.compare(f"{prefix}expected_logits", session.feed(ids[:-1]))
    outcome.compare_relative(f"{prefix}expected_ppl", cross_entropy(torch.cat(logits), ids[1:]).exp()[None])
    outcome.compare_ids(f"{prefix}expected_kv_len_before", before)
    if case.has(name := f"{prefix}expected_compression_steps"):
        case.tensors[name] = case.tensors[name][:, 0]  # the tokens after which something was compressed
        outcome.compare_ids(name, events)
