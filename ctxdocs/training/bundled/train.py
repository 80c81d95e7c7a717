"""The training loop: time-boxed, resumable, the same on a CPU and on a GPU."""

from __future__ import annotations

import copy
import logging
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ctxdocs.checkpoints import load_compressor
from ctxdocs.compressors.autocompressor import AutoCompressor
from ctxdocs.compressors.base import Compressor
from ctxdocs.compressors.gist import ActivationBeacon
from ctxdocs.compressors.kvzip import KVzip
from ctxdocs.cpu import multiplies_bfloat16
from ctxdocs.errors import InputError
from ctxdocs.training.bundled.batches import Batch, Batches, Rows
from ctxdocs.training.bundled.checkpoint import LOG, Progress, check_preset, load_checkpoint, save_checkpoint
from ctxdocs.training.bundled.data import load_split
from ctxdocs.training.bundled.losses import losses, total
from ctxdocs.training.bundled.memories import memories_of
from ctxdocs.training.bundled.optimisers import build_optimisers, set_rates
from ctxdocs.training.bundled.recipe import PRESETS, Recipe
from ctxdocs.training.bundled.table import initial_table
from ctxdocs.training.bundled.tokenizer import (
    DOCUMENT,
    PROMPT_FORMAT,
    SPECIAL_TOKENS,
    VECTORS_PROMPT_FORMAT,
    load_tokenizer,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

LOG_SECONDS = 30.0
CHECKPOINT_SECONDS = 240.0
_LARGEST_GRADIENT = 1.0
#: Layers that have been trained already take smaller steps.
_RATE_BEHIND_INIT = 0.6


def build_compressor(recipe: Recipe, tokenizer_file: Path, seed: int = 0, init: Path | None = None) -> Compressor:
    """Return an untrained compressor: a stock Llama model with random layers, or with those of ``init``.

    Parameters
    ----------
    recipe : Recipe
        Sizes and method.
    tokenizer_file : Path
        ``tokenizer.json``.
    seed : int
        Of random weights.
    init : Path, optional
        A folder of an earlier run, of the same sizes and tokenizer; whatever its method, its language model is taken.

    Raises
    ------
    InputError
        If the language model in ``init`` is of other sizes.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    tokenizer = load_tokenizer(tokenizer_file, recipe.positions)
    config = LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.width,
        intermediate_size=recipe.inner,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=recipe.positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    if init is not None:
        weights = load_compressor(init, device="cpu", dtype="float32").model.state_dict()
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise InputError(f"the model in {init} has other sizes than the preset", "choose its preset") from error
    elif recipe.table == "minilm":
        with torch.no_grad():
            model.model.embed_tokens.weight.copy_(initial_table(tokenizer_file, recipe.width))
    longest = max(recipe.document_tokens)
    if recipe.method == "autocompressor":
        return AutoCompressor(
            model,
            tokenizer,
            summary_length=recipe.summary_length,
            segment_tokens=longest,
            prompt_format=VECTORS_PROMPT_FORMAT,
        )
    if recipe.method == "beacon":
        return ActivationBeacon(
            model, tokenizer, window=longest, ratio=recipe.ratios[0], placement="append", prompt_format=PROMPT_FORMAT
        )
    # In training, this is what a document that is to be repeated stands behind.
    repeat = [SPECIAL_TOKENS.index(DOCUMENT)]
    return KVzip(
        model,
        tokenizer,
        ratio=recipe.ratios[0],
        budget="global",  # heads that copy need most of their slots, others hardly any
        prefix="none",
        piece_tokens=longest,
        request={"first": repeat, "next": repeat, "suffix": []},
        prompt_format=PROMPT_FORMAT,
    )


def train(
    cache: Path,
    output: Path,
    preset: str,
    minutes: float,
    device: str = "cpu",
    compile_layers: bool = False,
    seed: int = 0,
    init: Path | None = None,
) -> Progress:
    """Train until ``minutes`` of training are over, counted over all runs into ``output``.

    Parameters
    ----------
    cache : Path
        Prepared data.
    output : Path
        Receives ``checkpoint.safetensors``, from which a later run goes on, and at every checkpoint the compressor
        as ``load_compressor`` loads it.
    preset : str
        One of :data:`PRESETS`.
    minutes : float
        The learning rate falls to zero at this time, so give the same value when going on.
    device : str
        Torch device.
    compile_layers : bool
        Compile norms and feed-forward parts (needs a C++ compiler on a CPU); pays for itself after some minutes.
    seed : int
        For weights and batches.
    init : Path, optional
        See :func:`build_compressor`; of no account where a run goes on.
    """
    recipe = PRESETS[preset]
    output.mkdir(parents=True, exist_ok=True)
    check_preset(output, preset)
    compressor = build_compressor(recipe, cache / "tokenizer.json", seed, init).to(device).train()
    optimisers = build_optimisers(compressor, recipe, scale=_RATE_BEHIND_INIT if init else 1.0)
    progress = load_checkpoint(output, compressor, optimisers) or Progress.behind(preset, device, init)
    batches = Batches(load_split(cache, "train"), recipe, seed)
    frequencies = batches.token_frequencies().to(device)
    in_bfloat16 = torch.device(device).type != "cpu" or multiplies_bfloat16()
    if compile_layers:
        compile_by_token(compressor.model)
    logger.info("%s parameters, from step %d", f"{count_parameters(compressor):,}", progress.step)
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=device))
    last = logged = saved = time.monotonic()
    try:
        while progress.seconds < minutes * 60:
            set_rates(optimisers, recipe, progress.seconds / (minutes * 60))
            batch = _to(batches.batch(progress.step), device)
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=in_bfloat16):
                parts = losses(compressor, batch, frequencies)
                loss = total(parts)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(compressor.parameters(), _LARGEST_GRADIENT)
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            for name, part in parts.items():
                sums[name] += part.detach()
            sums["steps"] += 1
            progress.step += 1
            progress.tokens += slots_of(batch, compressor)
            now = time.monotonic()
            progress.seconds += now - last
            last = now
            if now - logged > LOG_SECONDS:
                _log(progress, sums, now - logged)
                sums.clear()
                logged = now
            if now - saved > CHECKPOINT_SECONDS:
                save_checkpoint(output, compressor, optimisers, progress)
                export(compressor, progress, output)
                saved = time.monotonic()
    except KeyboardInterrupt:
        save_checkpoint(output, compressor, optimisers, progress)
        raise
    if sums:
        _log(progress, sums, time.monotonic() - logged)
    save_checkpoint(output, compressor, optimisers, progress)
    export(compressor, progress, output)
    return progress


def export(compressor: Compressor, progress: Progress, output: Path) -> None:
    """Write the compressor in bfloat16, and the progress."""
    tokenizer = compressor.tokenizer
    exported = copy.deepcopy(compressor).to(torch.bfloat16).eval()
    exported.tokenizer = tokenizer
    exported.save(output)
    progress.save(output / LOG)


def count_parameters(compressor: Compressor) -> int:
    """Return the number of parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in compressor.parameters())


def slots_of(batch: Batch, compressor: Compressor) -> int:
    """Return how many tokens, and slots written behind them, the model runs over in a step."""
    count, tokens = batch.documents.shape
    slots = memories_of(compressor).slots(tokens, batch.ratio)
    return count * (tokens + slots) + batch.reads.ids.numel() + batch.plain.ids.numel()


def compile_by_token(model: PreTrainedModel) -> None:
    """Compile what is computed token by token. Attention is watched by hooks, which a compiled module passes over."""
    for name, module in model.named_modules():
        if name.endswith((".mlp", "norm")):
            module.compile(dynamic=True)


def _log(progress: Progress, sums: dict[str, Tensor], seconds: float) -> None:
    steps = float(sums.pop("steps"))
    means = {name: round(float(value) / steps, 3) for name, value in sums.items()}
    entry = {"step": progress.step, "minutes": round(progress.seconds / 60, 2), "tokens": progress.tokens, **means}
    slots = (progress.tokens - (progress.log[-1]["tokens"] if progress.log else 0)) / seconds
    progress.log.append(entry)
    logger.info("%s  (%.0f tokens/s)", "  ".join(f"{name} {value}" for name, value in entry.items()), slots)


def _to(batch: Batch, device: str) -> Batch:
    def rows(rows: Rows) -> Rows:
        return Rows(rows.ids.to(device, non_blocking=True), rows.weights.to(device, non_blocking=True))

    return replace(
        batch,
        documents=batch.documents.to(device, non_blocking=True),
        reads=rows(batch.reads),
        memories=batch.memories.to(device, non_blocking=True),
        plain=rows(batch.plain),
        plain_answers=batch.plain_answers.to(device, non_blocking=True),
    )
