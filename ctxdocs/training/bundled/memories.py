"""How the model under training writes a batch of documents and reads them: as summary vectors, or as keys and values.

Both go through the compressors' own paths; what is here arranges whole batches, without a loop over rows.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ctxdocs.compressors.autocompressor import AutoCompressor
from ctxdocs.compressors.base import Compressor
from ctxdocs.compressors.gist import GistCompressor
from ctxdocs.compressors.gist_windows import Windows
from ctxdocs.compressors.kvzip import KVzip
from ctxdocs.errors import InputError
from ctxdocs.modeling.kv import fill_cache, recorded_keys_values
from ctxdocs.modeling.rotary import rotate_keys
from ctxdocs.training.bundled.tokenizer import END, SPECIAL_TOKENS


class Memories(Protocol):
    """Writes and reads batches of documents."""

    def write(self, documents: Tensor, ratio: int) -> tuple[Tensor, Tensor]:
        """Compress ``[documents, tokens]``; return the tokens' states ``[documents, tokens, width]``, and memories."""

    def read(self, memories: Tensor, which: Tensor, ids: Tensor, *, closed: bool) -> Tensor:
        """Read rows behind memories.

        Parameters
        ----------
        memories : torch.Tensor
            Of :meth:`write`.
        which : torch.Tensor
            int64 ``[rows, memories]``: the documents in front of each row.
        ids : torch.Tensor
            int64 ``[rows, tokens]``.
        closed : bool
            Whether the end token follows every memory.

        Returns
        -------
        torch.Tensor
            ``[rows, tokens, width]``, states of the tokens.
        """

    def slots(self, tokens: int, ratio: int) -> int:
        """Return how many slots a document of so many tokens becomes."""


class SummaryVectors:
    """Memories of an AutoCompressor: ``[documents, summary_length, width]``.

    Parameters
    ----------
    compressor : AutoCompressor
        Under training.
    """

    def __init__(self, compressor: AutoCompressor) -> None:
        self.compressor = compressor

    def write(self, documents: Tensor, ratio: int) -> tuple[Tensor, Tensor]:
        """See :class:`Memories`; the number of vectors does not depend on the ratio."""
        return self.compressor.segment(documents, self.compressor.empty_softprompt(len(documents)))

    def read(self, memories: Tensor, which: Tensor, ids: Tensor, *, closed: bool) -> Tensor:
        """See :class:`Memories`."""
        softprompt = memories[which]
        if closed:
            end = torch.full((*which.shape, 1), SPECIAL_TOKENS.index(END), device=ids.device)
            softprompt = torch.cat([softprompt, self.compressor.backbone.embed(end).to(softprompt)], dim=2)
        return self.compressor.segment(ids, softprompt.flatten(1, 2), summarise=False)[0]

    def slots(self, tokens: int, ratio: int) -> int:
        """See :class:`Memories`."""
        return self.compressor.summary_length


class CachedKeys:
    """Memories that are read as a cache: keys and values, ``[2, layers, documents, kv_heads, slots, head_dim]``.

    Parameters
    ----------
    compressor : GistCompressor or KVzip
        Under training.
    """

    def __init__(self, compressor: Any) -> None:
        self.compressor = compressor

    def read(self, memories: Tensor, which: Tensor, ids: Tensor, *, closed: bool) -> Tensor:
        """See :class:`Memories`; nothing ever follows a memory."""
        backbone = self.compressor.backbone
        # [2, layers, rows, memories, heads, slots, size], the memories of a row side by side
        keys, values = memories[:, :, which].movedim(3, 4).flatten(4, 5)
        slots = keys.shape[-2]
        place = torch.arange(slots + ids.shape[1], device=ids.device)
        cache = fill_cache(rotate_keys(self.compressor.model, keys, place[:slots]), values)
        return backbone.run(backbone.embed(ids), place[slots:][None], cache=cache)


class GistKeys(CachedKeys):
    """Those of gist tokens, which stand behind the window."""

    def write(self, documents: Tensor, ratio: int) -> tuple[Tensor, Tensor]:
        """See :class:`Memories`."""
        compressor = self.compressor
        compressor.ratio = [ratio]
        windows = Windows(compressor, len(documents))
        states = windows.read(documents)
        nothing = documents[:, :0]
        return states, torch.stack(windows.close(nothing, nothing.sum(1)), dim=2)

    def slots(self, tokens: int, ratio: int) -> int:
        """See :class:`Memories`."""
        return -(-tokens // ratio)


class OwnKeys(CachedKeys):
    """Those of the documents' own tokens, all of them: what a method without training keeps the best of.

    No gradient is needed for choosing, and what is chosen is read like the whole. So the model learns to read
    documents that were computed apart, and to repeat them, by which KVzip tells what to keep.
    """

    def write(self, documents: Tensor, ratio: int) -> tuple[Tensor, Tensor]:
        """See :class:`Memories`; the ratio is of no account."""
        backbone = self.compressor.backbone
        place = torch.arange(documents.shape[1], device=documents.device)[None]
        with recorded_keys_values(self.compressor.model) as recorded:
            states = backbone.run(backbone.embed(documents), place)
        return states, torch.stack([recorded.keys, recorded.values])

    def slots(self, tokens: int, ratio: int) -> int:
        """No more run through the layers than the document has tokens."""
        return 0


def memories_of(compressor: Compressor) -> Memories:
    """Return how a compressor's memories are written and read.

    Raises
    ------
    InputError
        If it is of a method that this script does not train.
    """
    if isinstance(compressor, AutoCompressor):
        return SummaryVectors(compressor)
    if isinstance(compressor, GistCompressor) and not compressor.interleaves:
        return GistKeys(compressor)
    if isinstance(compressor, KVzip):
        return OwnKeys(compressor)
    raise InputError(f"the bundled model is no {compressor.method} compressor", "choose another preset")
