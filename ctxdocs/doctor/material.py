"""What the model is examined on: documents, and for each number of them a text that is read behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ctxdocs.checks import items
from ctxdocs.errors import ContextTooLong, InputError
from ctxdocs.library import Library
from ctxdocs.prompts import encode_text

if TYPE_CHECKING:
    from ctxdocs.compressors.base import Compressor

#: Tokens of the text that is read behind documents, and of the answer that is generated behind it.
PROBE_TOKENS, ANSWER_TOKENS = 64, 16

_PLACES = ("Gannet Rock", "the north pier", "Alder Mill", "the old school", "Fennel Street", "the ferry house")
_PEOPLE = ("Maud Ferris", "the harbour master", "Jonas Pike", "her nephew", "the lock keeper", "a young surveyor")
_THINGS = ("the tide gauge", "a brass lamp", "the parish clock", "an iron stove", "the long rope", "a map of the bay")
_DEEDS = ("was mended by", "was sold to", "was first drawn by", "had been kept by", "was lost by", "was bought for")


@dataclass(frozen=True)
class Material:
    """Texts as token ids.

    Parameters
    ----------
    pieces : list of torch.Tensor
        1-D int64, at least two. The documents are the first ones; behind ``n`` of them the end of piece ``n`` is read.
    source : str
        Where they come from.
    document_tokens : int
        The length that documents are cut to.
    """

    pieces: list[Tensor]
    source: str
    document_tokens: int

    @property
    def most(self) -> int:
        """How many documents there are."""
        return len(self.pieces) - 1

    def documents(self, count: int) -> list[Tensor]:
        """Return the first documents."""
        return [piece[: self.document_tokens] for piece in self.pieces[:count]]

    def probe(self, count: int) -> Tensor:
        """Return what is read behind the first ``count`` documents."""
        return self.pieces[count][-PROBE_TOKENS:]

    def fitting(self, compressor: Compressor, count: int) -> int:
        """Return how many documents, up to ``count``, fit the model's positions together with what follows.

        Raises
        ------
        ContextTooLong
            If not even one does.
        """
        room, prefix = compressor.backbone.max_positions, compressor.prefix_ids
        for some in range(min(count, self.most), 0, -1):
            parts = [*self.documents(some), self.probe(some)]
            if (0 if prefix is None else len(prefix)) + sum(map(len, parts)) + ANSWER_TOKENS <= room:
                return some
        raise ContextTooLong(
            f"a document of {self.document_tokens} tokens and what is read behind it do not fit {room} positions",
            "take shorter documents: document_tokens=... in Python, --document-tokens on the command line",
        )


def material(
    compressor: Compressor, documents: Sequence[str] | Library | None, count: int, document_tokens: int
) -> Material:
    """Return at most ``count`` documents of at most ``document_tokens`` tokens.

    Parameters
    ----------
    compressor : Compressor
        Its tokenizer cuts the texts; without one the documents are random tokens.
    documents : sequence of str, or Library, or None
        Texts; or a library, of which chunks are taken all over it; None makes texts up.
    count, document_tokens : int
        How many, and how long.

    Raises
    ------
    InputError
        If there is no text, or no tokenizer to read it with.
    """
    tokenizer = compressor.tokenizer
    if documents is None and tokenizer is None:
        random = torch.Generator().manual_seed(0)
        shape = (count + 1, document_tokens)
        pieces = list(torch.randint(compressor.backbone.vocabulary, shape, generator=random))
        return Material(pieces, "random tokens, for want of a tokenizer", document_tokens)
    if tokenizer is None:
        raise InputError("the model has no tokenizer to read texts with", "examine it without documents")
    if documents is None:
        texts: Sequence[str] = [made_up(seed, document_tokens // 16 + 1) for seed in range(count + 1)]
        source = "made-up texts"
    elif isinstance(documents, Library):
        texts, source = _chunks(documents, count + 1), f"chunks of {documents.path}"
    else:
        texts, source = items("documents", documents), "the given texts"
        if strange := next((text for text in texts if not isinstance(text, str)), None):
            raise InputError(f"documents are strings, got {type(strange).__name__}")
    pieces = [ids for text in texts if len(ids := encode_text(tokenizer, text))][: count + 1]
    if documents is None:
        pieces = [piece[:document_tokens] for piece in pieces]
    if len(pieces) == 1 and len(pieces[0]) > 1:
        pieces = list(pieces[0].tensor_split(2))
    if len(pieces) < 2:
        raise InputError("there is too little text to examine a model on", "give documents, or none at all")
    return Material(pieces, source, document_tokens)


def made_up(seed: int, sentences: int) -> str:
    """Return sentences, of more than 16 words each, about things that are nowhere known."""
    draw = Random(seed)
    made = []
    for _ in range(sentences):
        place, other = draw.sample(_PLACES, 2)
        made.append(
            f"In {draw.randint(1700, 1990)} {draw.choice(_THINGS)} at {place} {draw.choice(_DEEDS)} "
            f"{draw.choice(_PEOPLE)}, who came from {other} with {draw.randint(2, 90)} shillings."
        )
    return " ".join(made)


def _chunks(library: Library, count: int) -> list[str]:
    ids = library.store.chunk_ids([document.uri for document in library.store.documents()])
    if not len(ids):
        return []
    chosen = np.linspace(0, len(ids) - 1, min(count, len(ids))).round().astype(int)
    return [chunk.text for chunk in library.store.chunks(ids[chosen].tolist())]
