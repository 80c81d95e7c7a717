"""Run RCC cases: the encoder's states, the decoder's logits behind them (at slots too), generated ids, gradients."""

from __future__ import annotations

import torch
from torch import Tensor

import ctxdocs
from ctxdocs.compressors.rcc import RCC
from ctxdocs.memory import Memory
from ctxdocs.training.steps.rcc import RCCOptions, RCCStep

from .case import Case, Outcome, Unsupported

#: The authors' script keeps this many tokens of a prompt, times the ratio.
_PROMPT_TOKENS_PER_RATIO = 600


def run(case: Case, outcome: Outcome) -> None:
    compressor = ctxdocs.load_compressor(
        case.folder,
        method="rcc",
        dtype="float32",
        device="cpu",
        ratio=case.settings["mem_len"],
        window=case.settings["rcc_encoder_max_input"],
        layer_map="pairs" if case.settings["layers_Equal"] else "one",
    )
    if case.has("expected_loss"):
        _training_step(case, outcome, compressor)
        return
    if any(not mask.bool().all() for name, mask in case.tensors.items() if name.startswith("attention_mask")):
        raise Unsupported("padding that moves a prompt away from its memory")
    documents = case.tensors["compressed_ids"]
    memories = compressor.compress_ids(list(documents))
    states = torch.stack([memory.states for memory in memories])
    outcome.compare("expected_memory", states)
    filled = torch.stack([compressor.fill_windows(ids) for ids in documents])
    outcome.compare_ids("expected_encoder_ids", filled.tolist())
    prompts = case.tensors["prompt_ids"][:, : _PROMPT_TOKENS_PER_RATIO * compressor.ratio]
    if case.has("expected_logits"):
        read = [compressor.logits(prompt, [memory]) for prompt, memory in zip(prompts, memories, strict=True)]
        outcome.compare("expected_logits", torch.stack(read))
    if case.has("expected_prefix_logits"):
        outcome.compare("expected_prefix_logits", compressor(states, prompts)[:, : states.shape[1]])
    if case.has("expected_generated_ids"):
        _greedy(case, outcome, compressor, prompts, memories)


def _greedy(case: Case, outcome: Outcome, compressor: RCC, prompts: Tensor, memories: list[Memory]) -> None:
    """Generate until the end token, which the authors' loop looks for from the second token on and does not return."""
    most, new, logits = case.settings["max_new_tokens"], [], []
    if not most:
        outcome.compare_ids("expected_generated_ids", [[] for _ in prompts])
        return
    for prompt, memory in zip(prompts, memories, strict=True):
        ids = compressor.generate_ids(prompt, [memory], most, eos_token_ids=())
        end = next((at for at, token in enumerate(ids) if at and token == case.settings["eos_token"]), len(ids))
        new.append(ids[:end])
        read = compressor.logits(torch.cat([prompt, torch.tensor(ids)]), [memory])[len(prompt) - 1 : -1]
        logits.append(read[: end + 1])  # the last step may have chosen the end
    outcome.compare_ids("expected_generated_ids", new)
    outcome.compare("expected_generated_logits", torch.stack(logits))


def _training_step(case: Case, outcome: Outcome, compressor: RCC) -> None:
    """Run the training step on a context of whole windows; compare what it passes through, too."""
    compressor.requires_grad_(True)
    context, span = case.tensors["input_ids"].tensor_split([case.settings["rcc_encoder_length"]], dim=1)
    labels = case.tensors["labels"]
    slots = labels.shape[1] - span.shape[1]
    step = RCCStep(compressor, RCCOptions(target_tokens=span.shape[1], cue=[1, 2]))
    loss = step({"context": context, "span": span, "labels": labels[:, slots:]})["loss"]
    loss.backward()
    states = compressor.encode(context)
    outcome.compare("expected_memory", states)
    outcome.compare("expected_logits", compressor(states, span))
    outcome.compare("expected_loss", loss.detach()[None])
    weights = {
        "rcc_encoder2gpt_embed": compressor.embedding_projection.weight,
        "encoder_embed_in": compressor.encoder_backbone.embedding.weight,
    }
    for layer, projection in enumerate(compressor.layer_projections):
        weights[f"rcc_encoder2gpt_A_matrix_{layer}"] = projection.weight
    for name, weight in weights.items():
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
        outcome.compare_relative(f"expected_grad_{name}", gradient)
