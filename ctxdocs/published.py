"""The model that comes with the package, the checkpoints that authors have published, and which of them are here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

#: Name of the model that comes with the package.
BUNDLED = "bundled"


def bundled_path() -> Path:
    """Return the folder of the model that comes with the package."""
    return Path(__file__).parent / "models" / BUNDLED


@dataclass(frozen=True)
class PublishedCheckpoint:
    """A checkpoint on the Hugging Face hub that ``load_compressor`` reads.

    Parameters
    ----------
    name : str
        Its name on the hub, ``owner/model``.
    method : str
        The method that reads it, a key of ``ctxdocs.compressors.METHODS``.
    base : str
        The language model it was fine-tuned from.
    slots : int
        Memory slots that a segment of text becomes; 0 for a baseline without memory.
    window : int or None
        Positions the model has, in tokens; None where its configuration could not be consulted.
    trained_tokens : int
        Length of the sequences it was fine-tuned on, in tokens.
    licence : str
        What its model card declares; the licence of ``base`` applies as well.
    note : str
        What sets it apart from its neighbours.
    """

    name: str
    method: str
    base: str
    slots: int
    window: int | None
    trained_tokens: int
    licence: str
    note: str


def _autocompressor(
    model: str, base: str, slots: int, window: int | None, trained_tokens: int, note: str
) -> PublishedCheckpoint:
    """One of the models of arXiv 2305.14788; all of them declare the same licence."""
    name = f"princeton-nlp/{model}"
    return PublishedCheckpoint(name, "autocompressor", base, slots, window, trained_tokens, "apache-2.0", note)


_LLAMA, _OPT_LARGE, _OPT_SMALL = "meta-llama/Llama-2-7b-hf", "facebook/opt-2.7b", "facebook/opt-1.3b"
_ALL_SEGMENTS = "keeps the vectors of all segments"
_LAST_SEGMENT = "RMT baseline: keeps the last segment's vectors"
_NO_MEMORY = "full-attention baseline: no memory"

#: Every published checkpoint, method by method.
PUBLISHED: tuple[PublishedCheckpoint, ...] = (
    _autocompressor("AutoCompressor-Llama-2-7b-6k", _LLAMA, 50, 4096, 6144, _ALL_SEGMENTS),
    _autocompressor("FullAttention-Llama-2-7b-6k", _LLAMA, 0, None, 6144, _NO_MEMORY),
    _autocompressor("AutoCompressor-2.7b-6k", _OPT_LARGE, 50, 2048, 6144, _ALL_SEGMENTS),
    _autocompressor("RMT-2.7b-8k", _OPT_LARGE, 50, 2048, 8192, _LAST_SEGMENT),
    _autocompressor("FullAttention-2.7b-4k", _OPT_LARGE, 0, 4096, 4096, _NO_MEMORY),
    _autocompressor("AutoCompressor-2.7b-30k", _OPT_LARGE, 50, 2048, 30720, _ALL_SEGMENTS),
    _autocompressor("AutoCompressor-1.3b-30k", _OPT_SMALL, 50, 2048, 30720, _ALL_SEGMENTS),
    _autocompressor("RMT-1.3b-30k", _OPT_SMALL, 50, 2048, 30720, _LAST_SEGMENT),
)


def cached_folder(name: str) -> Path | None:
    """Return the folder of a hub checkpoint in the local cache; asks nothing of the network.

    Returns
    -------
    pathlib.Path or None
        None unless the configuration and all weights are there.
    """
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json")
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    return folder if any(map(_has_weights, [folder / "model.safetensors", folder / "pytorch_model.bin"])) else None


def _has_weights(weights: Path) -> bool:
    """Whether the file is there, or every shard that the index beside it names."""
    if weights.is_file():
        return True
    try:
        index = json.loads(Path(f"{weights}.index.json").read_text(encoding="utf-8"))
        shards = set(index["weight_map"].values())
        return bool(shards) and all((weights.parent / shard).is_file() for shard in shards)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # no index, or a damaged one
        return False
