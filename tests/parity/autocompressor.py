"""Run AutoCompressor cases. What a case asks for is told by the tensors it holds, never by its name."""

from __future__ import annotations

import torch
from torch import Tensor

import ctxdocs
from ctxdocs.compressors.autocompressor import AutoCompressor
from ctxdocs.memory import Memory
from ctxdocs.training.steps.autocompressor import AutoCompressorOptions, AutoCompressorStep, random_segment_lengths

from .case import Case, Outcome


def run(case: Case, outcome: Outcome) -> None:
    compressor = ctxdocs.load_compressor(case.folder, method="autocompressor", dtype="float32", device="cpu")
    if case.has("expected_losses"):
        _training_step(case, outcome, compressor)
        return
    if case.has("expected_softprompt_length_per_step"):
        _summary_steps(case, outcome, compressor)
        return
    memories = _memories(case, outcome, compressor)
    prompts = _rows(case, "prompt_ids") if "prompt_ids" in case.tensors else []
    if case.has("expected_logits", "prompt_ids"):
        logits = [compressor.logits(prompt, memory) for prompt, memory in zip(prompts, memories, strict=True)]
        padded = torch.zeros_like(case.tensors["expected_logits"])
        live = _mask_of(case, "prompt_ids")
        padded[live] = torch.cat(logits)
        outcome.compare("expected_logits", padded, live)
    if case.has("expected_generated_ids"):
        _greedy(case, outcome, compressor, prompts, memories)


def _memories(case: Case, outcome: Outcome, compressor: AutoCompressor) -> list[list[Memory]]:
    """Compress what the case compresses, compare it, and return the memories each prompt row reads."""
    segment_lengths = case.settings.get("segment_lengths")
    if case.has("doc0_ids"):
        return _fused(case, outcome, compressor)
    name = "context_ids" if case.has("context_ids") else "input_ids"
    if not case.has(name):
        return [[] for _ in case.tensors["prompt_ids"]]
    ids = case.tensors[name]
    live = _mask_of(case, name)
    whole, summarise = bool(live.all()), case.settings.get("output_softprompt", True)
    logits, softprompt = compressor(
        ids, None if whole else live.long(), segment_lengths=segment_lengths, output_softprompt=summarise
    )
    for expected in ("expected_context_logits", "expected_segment_logits"):
        outcome.compare(expected, logits, live)
    outcome.compare("expected_memory", softprompt)
    if whole and summarise:  # the batched path must give the same
        stored = _compress(ids, compressor, segment_lengths)
        outcome.compare("expected_memory", torch.stack([memory.vectors for memory in stored]))
        return [[memory] for memory in stored]
    return [[compressor.as_memory(vectors, ids.shape[1])] for vectors in softprompt]


def _fused(case: Case, outcome: Outcome, compressor: AutoCompressor) -> list[list[Memory]]:
    """Compress documents one by one; every row of the prompt reads its row of all of them."""
    documents: list[list[Memory]] = []
    for index, settings in enumerate(case.settings["documents"]):
        rows = _compress(case.tensors[f"doc{index}_ids"], compressor, settings.get("segment_lengths"))
        outcome.compare(f"expected_memory_doc{index}", torch.stack([memory.vectors for memory in rows]))
        documents.append(rows)
    fused = [list(row) for row in zip(*documents, strict=True)]
    outcome.compare("expected_memory", torch.stack([torch.cat([m.vectors for m in row]) for row in fused]))
    return fused


def _compress(ids: Tensor, compressor: AutoCompressor, segment_lengths: int | list[int] | None) -> list[Memory]:
    return compressor.compress_ids(list(ids), segment_lengths=segment_lengths or ids.shape[1])


def _greedy(
    case: Case, outcome: Outcome, compressor: AutoCompressor, prompts: list[Tensor], memories: list[list[Memory]]
) -> None:
    new, logits, live = [], [], torch.ones_like(case.tensors["expected_generated_ids"], dtype=torch.bool)
    most, end = case.settings["max_new_tokens"], case.settings.get("eos_token_id")
    for row, (prompt, read) in enumerate(zip(prompts, memories, strict=True)):
        ids = compressor.generate_ids(prompt, read, max_new_tokens=most, eos_token_ids=())
        if end in ids:  # behind it the authors' row is padded, whatever with
            stop = ids.index(end) + 1
            ids, live[row, stop:] = [*ids[:stop], *case.tensors["expected_generated_ids"][row, stop:].tolist()], False
        new.append(ids)
        logits.append(compressor.logits(torch.cat([prompt, torch.tensor(ids)]), read)[len(prompt) - 1 : -1])
    outcome.compare_ids("expected_generated_ids", new)
    outcome.compare("expected_generated_logits", torch.stack(logits), live)


def _summary_steps(case: Case, outcome: Outcome, compressor: AutoCompressor) -> None:
    """Generate through a session whose running segment is summarised whenever it is full."""
    start: list[Memory] = []
    if case.has("context_ids"):
        start = _compress(case.tensors["context_ids"], compressor, None)
        outcome.compare("expected_context_memory", start[0].vectors[None])
    session = compressor.session(start, segment_tokens=case.settings["segment_lengths"], published=True)
    last = session.feed(case.tensors["prompt_ids"][0])[-1]
    lengths, logits, new = [], [], []
    for step in range(case.settings["max_new_tokens"]):
        lengths.append(session.softprompt.shape[1])
        logits.append(last)
        new.append(int(last.argmax()))
        if step < case.settings["max_new_tokens"] - 1:
            last = session.feed(new[-1:])[-1]
    outcome.compare("expected_generated_logits", torch.stack(logits)[None])
    outcome.compare("expected_memory", session.softprompt)
    outcome.compare_ids("expected_generated_ids", [new])
    outcome.compare_ids("expected_softprompt_length_per_step", lengths)


class _GivenLengths(AutoCompressorStep):
    """The training step, with the segment lengths of the case in place of drawn ones."""

    def __init__(self, compressor: AutoCompressor, lengths: list[list[int]]) -> None:
        super().__init__(compressor, AutoCompressorOptions(substeps=len(lengths)))
        self.lengths = lengths

    def part_of(self, tokens: int, part: int) -> tuple[slice, list[int]]:
        start = sum(map(sum, self.lengths[:part]))
        return slice(start, start + sum(self.lengths[part])), self.lengths[part]


def _training_step(case: Case, outcome: Outcome, compressor: AutoCompressor) -> None:
    """Run the training step: every substep's loss is back-propagated alone, and the soft prompt handed on as it is."""
    compressor.requires_grad_(True)
    step = _GivenLengths(compressor, case.settings["segment_lengths_per_substep"])
    batch = {name: case.tensors[name] for name in ("input_ids", "labels", "attention_mask")}
    losses, carried = [], None
    for part in range(step.parts):
        result = step(batch, part, carried)
        result["loss"].backward()
        losses.append(result["loss"].detach())
        carried = result["carried"]
        outcome.compare(f"expected_memory_substep{part}", carried)
    outcome.compare("expected_losses", torch.stack(losses))
    first = compressor.model.get_decoder().layers[0].self_attn.q_proj
    outcome.compare_relative("expected_grad_embed_summary", compressor.embed_summary.weight.grad)
    outcome.compare_relative("expected_grad_q_proj_layer0", first.weight.grad)
    for drawn in case.settings.get("random_segment_lengths_examples", []):
        torch.manual_seed(drawn["torch_manual_seed"])
        lengths = random_segment_lengths(drawn["tokens"], drawn["segments"], drawn["max_position_embeddings"])
        outcome.equal_ids = lengths == drawn["lengths"] and outcome.equal_ids is not False
        if lengths != drawn["lengths"]:
            outcome.differing.append(f"segment lengths {lengths}, not {drawn['lengths']}")


def _mask_of(case: Case, name: str) -> Tensor:
    """Return the case's attention mask if it is that of tensor ``name``, else all ones."""
    ids, mask = case.tensors[name], case.tensors.get("attention_mask")
    owner = next((n for n in ("input_ids", "prompt_ids", "context_ids") if n in case.tensors), None)
    belongs = mask is not None and mask.shape == ids.shape and (owner == name or not case.has("input_ids"))
    return mask.bool() if belongs else torch.ones_like(ids, dtype=torch.bool)


def _rows(case: Case, name: str) -> list[Tensor]:
    return [row[live] for row, live in zip(case.tensors[name], _mask_of(case, name), strict=True)]
