"""Small data and configurations of training runs."""

from __future__ import annotations

import json
import random
from pathlib import Path

from ctxdocs.training import TrainingConfig, load_config

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
NEOX = {
    "model_type": "gpt_neox",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
#: Per method: a model's configuration, settings, and changes to the configuration.
METHODS: dict[str, tuple[dict, dict, list[str]]] = {
    "autocompressor": (LLAMA, {"summary_length": 2, "segment_tokens": 16}, []),
    "beacon": (LLAMA, {"window": 16, "ratio": [2, 4]}, []),
    "ultragist": (LLAMA, {"window": 16, "ratio": [2, 4]}, []),
    "ccm": (LLAMA, {"num_comp_tokens": 2, "segment_tokens": 16}, ["data.packing=documents"]),
    "rcc": (NEOX, {"window": 16, "ratio": 4}, ["published.target_tokens=16", "published.cue=[2,4]"]),
}
_WORDS = ("lighthouse", "keeper", "ferry", "harbour", "school", "gull", "island", "stone", "pier", "winter", "captain")


def write_documents(path: Path, count: int = 40, seed: int = 0) -> Path:
    """Write documents of 30 to 80 words."""
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            text = " ".join(rng.choice(_WORDS) for _ in range(rng.randint(30, 80)))
            file.write(json.dumps({"title": f"text {number}", "text": f"{text}."}) + "\n")
    return path


def write_questions(path: Path, count: int = 20, seed: int = 1) -> Path:
    """Write questions that their contexts answer."""
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            thing, doors = rng.choice(_WORDS), rng.randint(2, 99)
            context = f"The {rng.choice(_WORDS)} is old. The {thing} has {doors} doors."
            value = {"question": f"How many doors has the {thing}?", "answers": [str(doors)], "context": context}
            file.write(json.dumps({"title": f"question {number}", **value}) + "\n")
    return path


def tiny_config(method: str, folder: Path, tokenizer_folder: Path, *changes: str, **given) -> TrainingConfig:
    """A run of a few steps from nothing, over the files in ``folder``."""
    init, settings, own = METHODS[method]
    objective = next((change.partition("=")[2] for change in changes if change.startswith("objective=")), "published")
    common = ["train=full", "data.sequence_tokens=64", "steps=4", "batch_size=4", "optimizer.lr=1e-2", "device=cpu"]
    return load_config(
        changes=[*common, "logging.every=1", *(own if objective == "published" else []), *changes],
        method=method,
        init=given.pop("init", init),
        settings=settings,
        tokenizer=str(tokenizer_folder),
        data_files=given.pop("data_files", [str(folder / "documents.jsonl")]),
        output=given.pop("output", str(folder / "output")),
        **given,
    )
