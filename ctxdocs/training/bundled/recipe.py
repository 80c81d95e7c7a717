"""What is trained, and how: one preset per kind of machine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Recipe:
    """Sizes of the model and of a training step.

    Parameters
    ----------
    vocabulary, width, inner, layers, heads, kv_heads, positions : int
        The Llama model: tokens, hidden size, feed-forward size, and so on. The head is tied to the token table.
    method : {"kvzip", "beacon", "autocompressor"}
        The documents' own keys and values, those of beacon tokens behind each document, or summary vectors.
    ratios : tuple of int
        Tokens per slot, one drawn per step where that matters to training; the first is the default of the model.
    summary_length : int
        Summary vectors per document.
    document_tokens : tuple of int
        Lengths of compressed documents, one drawn per step.
    read_tokens : int
        Tokens read behind memories: a continuation, the document again, or questions.
    text_tokens : tuple of int
        Lengths of plain rows, one drawn per step.
    most_memories : int
        Memories in front of one row, one to this many, drawn per step.
    rows : int
        Documents of running text per step; half as many are rebuilt.
    asked : int
        Documents per step that are asked about.
    cloze : float
        Share of the documents that are asked about with questions made of running text.
    plain_tokens : int
        Tokens of plain rows per step: text as it stands, and questions behind their document's text.
    matrix_rate, table_rate : float
        Peak learning rates of Muon (matrices of the layers) and AdamW (token table, norms, summary slots).
    warmup, cooldown : float
        Shares of the time in which the rate rises, and in which it falls to zero.
    table : {"random", "minilm"}
        What the token table starts from.
    """

    vocabulary: int
    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    positions: int
    document_tokens: tuple[int, ...]
    read_tokens: int
    text_tokens: tuple[int, ...]
    most_memories: int
    rows: int
    asked: int
    plain_tokens: int
    matrix_rate: float
    table_rate: float
    method: Literal["kvzip", "beacon", "autocompressor"] = "kvzip"
    ratios: tuple[int, ...] = (4, 8)
    summary_length: int = 16
    cloze: float = 0.0
    warmup: float = 0.02
    cooldown: float = 0.4
    table: Literal["random", "minilm"] = "minilm"


PRESETS = {
    "cpu-small": Recipe(
        vocabulary=8192,
        width=256,
        inner=704,
        layers=4,
        heads=4,
        kv_heads=4,
        positions=2048,
        document_tokens=(128, 256),
        read_tokens=96,
        text_tokens=(256, 512, 1024),
        most_memories=3,
        rows=4,
        asked=10,
        plain_tokens=1024,
        matrix_rate=4e-3,
        table_rate=4e-3,
    ),
    "gpu-40m": Recipe(
        vocabulary=16384,
        width=512,
        inner=1536,
        layers=10,
        heads=8,
        kv_heads=4,
        positions=2048,
        document_tokens=(128, 256, 512),
        ratios=(4, 8, 16),
        read_tokens=128,
        text_tokens=(512, 1024, 2048),
        most_memories=4,
        rows=256,
        asked=256,
        plain_tokens=131_072,
        cloze=0.5,
        matrix_rate=4e-3,
        table_rate=3e-3,
    ),
    "tiny": Recipe(
        vocabulary=384,
        width=32,
        inner=64,
        layers=2,
        heads=2,
        kv_heads=1,
        positions=1024,
        document_tokens=(16,),
        ratios=(4,),
        summary_length=4,
        read_tokens=16,
        text_tokens=(32,),
        most_memories=2,
        rows=4,
        asked=2,
        plain_tokens=128,
        matrix_rate=4e-3,
        table_rate=4e-3,
        table="random",
    ),
}
# The same with memories that are trained, for comparison.
PRESETS |= {
    **{f"{name}-beacon": replace(recipe, method="beacon") for name, recipe in PRESETS.items()},
    **{f"{name}-vectors": replace(recipe, method="autocompressor") for name, recipe in PRESETS.items()},
}
