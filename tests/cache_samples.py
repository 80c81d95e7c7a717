"""Small libraries for the tests of ctxdocs.cache."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch

from ctxdocs.cache import NewChunk, Store, Writer
from ctxdocs.memory import KVMemory, LayerStates, Memory, SoftPrompt

FINGERPRINT = "f" * 64
DIMENSION = 8
STAMP = {"span": 3, "source_tokens": 40, "fingerprint": FINGERPRINT}


def create(path: Path, **settings: object) -> Store:
    settings = {"compressor": {"fingerprint": FINGERPRINT}} | settings
    return Store.create(path, embedder={"name": "test", "dimension": DIMENSION}, **settings)


def embedding(text: str) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
    return np.random.default_rng(seed).standard_normal(DIMENSION).astype(np.float32)


def memory(seed: int = 0, kind: str = "soft_prompt", dtype: torch.dtype = torch.float32) -> Memory:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    if kind == "kv":
        return KVMemory(keys=normal(2, 2, 3, 4), values=normal(2, 2, 3, 4), positions=torch.tensor([0, 7, 9]), **STAMP)
    if kind == "kv by head":
        lengths = torch.tensor([[3, 0], [1, 4]])
        return KVMemory(keys=normal(8, 4), values=normal(8, 4), positions=torch.arange(8), lengths=lengths, **STAMP)
    if kind == "layer_states":
        return LayerStates(states=normal(3, 5, 4), **STAMP)
    return SoftPrompt(vectors=normal(3, 16), **STAMP)


def chunk(document_id: int, text: str, ordinal: int = 0, made: Memory | None = None) -> NewChunk:
    made = memory(ordinal) if made is None else made
    return NewChunk(document_id, ordinal, 0, len(text), text, len(text.split()), embedding(text), made)


def add(writer: Writer, uri: str, *texts: str, sha256: str = "1") -> None:
    document_id = writer.begin(uri, sha256, {"title": uri})
    writer.write([chunk(document_id, text, ordinal) for ordinal, text in enumerate(texts)], [document_id])


def nearest(store: Store, text: str, k: int = 1) -> list[str]:
    """Return the texts nearest to the embedding of ``text``."""
    ids, _ = store.nearest(embedding(text)[None], k)
    return [found.text for found in store.chunks(ids[0])]


def equal(one: Memory, other: Memory) -> bool:
    same = (one.kind, one.span, one.source_tokens, one.fingerprint) == (
        other.kind,
        other.span,
        other.source_tokens,
        other.fingerprint,
    )
    tensors, others = one.tensors(), other.tensors()
    return (
        same
        and tensors.keys() == others.keys()
        and all(tensor.dtype == others[name].dtype and tensor.equal(others[name]) for name, tensor in tensors.items())
    )
