"""KVzip (Kim et al., arXiv 2505.23416): the slots that the model attends to while it repeats the document.

Behind the document's complete cache the model is asked to repeat it, piece by piece, and is given the answer; the score
of a slot is the highest attention that any token of request or repetition pays it. No question is needed, so the memory
serves them all. Scoring reads the document once more; its attention is computed over the prefix, one piece and its
repetition, so that what is held at once does not grow with the document.

With ``budget="uniform"`` every head keeps its best slots; ``"global"`` is the authors' main setting, one threshold over
all layers and heads. What they call head scores, and the variant that weighs attention by the values' norms, are left
out.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ctxdocs.chat_format import ChatFormat
from ctxdocs.checks import whole_number
from ctxdocs.compressors.kv import Reading
from ctxdocs.compressors.passes import next_pass
from ctxdocs.compressors.pruning import PruningCompressor
from ctxdocs.errors import InputError
from ctxdocs.memory import Memory
from ctxdocs.modeling.attention_layers import Attention, watched_attention
from ctxdocs.modeling.kv import cached_keys, cut_back
from ctxdocs.modeling.rotary import rotate_keys
from ctxdocs.prompts import as_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FIRST_REQUEST = "\n\nRepeat the previous context exactly."
NEXT_REQUEST = "\n\nRepeat the part of the previous context exactly, starting with "
#: Tokens of the piece before that a request for the next one quotes.
QUOTED_TOKENS = 8

_REQUEST = ("first", "next", "suffix")
# Entries of the largest tensor that scoring computes at once (float32): what keeps a GPU busy, or fits a CPU's cache.
_AT_ONCE = {"cuda": 1 << 24, "cpu": 1 << 18}


@dataclass(frozen=True)
class Request:
    """How the model is asked to repeat a document: token ids in front of its first piece, and of later ones.

    Parameters
    ----------
    first, next : torch.Tensor
        The request itself; between ``next`` and ``suffix`` stand the last tokens of the piece before.
    suffix : torch.Tensor
        What ends the request and begins the answer.
    """

    first: Tensor
    next: Tensor
    suffix: Tensor

    def for_piece(self, pieces: Sequence[Tensor], number: int) -> Tensor:
        """Return the ids of a request and the piece it asks for."""
        if not number:
            return torch.cat([self.first, self.suffix, pieces[0]])
        return torch.cat([self.next, pieces[number - 1][-QUOTED_TOKENS:], self.suffix, pieces[number]])


class KVzip(PruningCompressor):
    """Keeps the slots that matter when the model repeats the document.

    Parameters
    ----------
    model, tokenizer, **settings
        Those of :class:`~ctxdocs.compressors.pruning.PruningCompressor`. Without a tokenizer the model repeats the
        document unasked.
    piece_tokens : int
        Length of the pieces that the document is repeated in.
    request : mapping, optional
        Token ids of the request, ``{"first": [...], "next": [...], "suffix": [...]}``, see :class:`Request`. Default:
        the authors' texts and, behind a chat template's header, what ends a user's turn there and begins the answer;
        otherwise a line break.
    """

    method = "kvzip"
    reads_on = True

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        piece_tokens: int = 2000,
        request: Mapping[str, Sequence[int]] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(model, tokenizer, **settings)
        if whole_number("piece_tokens", piece_tokens) < 1:
            raise InputError(f"piece_tokens is {piece_tokens}", "a piece holds at least one token")
        self.piece_tokens = piece_tokens
        self.request = None if request is None else {name: as_ids(ids).tolist() for name, ids in request.items()}
        self.request_ids()

    @property
    def run_settings(self) -> dict[str, Any]:
        """Those of all pruning methods, ``piece_tokens``, and a request that was given."""
        return {**super().run_settings, "piece_tokens": self.piece_tokens, "request": self.request}

    def tokens_at_once(self, tokens: int, **options: Any) -> int:
        """Return how many tokens of a document run at once: all of them, or a piece with the request for it."""
        request = self.request_ids()
        asking = max(len(request.first), len(request.next) + QUOTED_TOKENS) + len(request.suffix)
        return max(super().tokens_at_once(tokens), asking + min(tokens, self.piece_tokens))

    def alike(self, tokens: int) -> int:
        """Documents of as many pieces are scored together."""
        return -(-tokens // self.piece_tokens)

    def scored(
        self, documents: Sequence[Tensor], memories: Sequence[Memory], counts: Sequence[int]
    ) -> tuple[Reading, list[Tensor]]:
        """Read documents, and score them while the model repeats them."""
        pieces = [document.split(self.piece_tokens) for document in documents]
        request = self.request_ids()
        asked = [[request.for_piece(row, number) for row in pieces] for number in range(len(pieces[0]))]
        before = len(self.prefix_ids) + sum(memory.span for memory in memories)
        positions = [before + len(row) + len(each[i]) for each in asked for i, row in enumerate(documents)]
        self.check_room(max(positions), "a document and its repetition take")
        reading = self.read(documents, memories)
        scorer = _Scorer(self, reading)
        with torch.no_grad():  # which slots are best has no gradient
            scores = [scorer.piece(number, ids) for number, ids in enumerate(asked)]
        return reading, [torch.cat(list(parts), dim=2) for parts in zip(*scores, strict=True)]

    def request_ids(self) -> Request:
        """Return how the model is asked: as the setting has it, or in the authors' words."""
        if (given := self.request) is not None:
            if set(given) != set(_REQUEST):
                raise InputError(f"a request has ids for {', '.join(_REQUEST)}, not for {', '.join(sorted(given))}")
            ids = {
                name: self.checked_ids(each, f"the request's {name}", may_be_empty=True) for name, each in given.items()
            }
            return Request(**ids)
        tokenizer: Any = self.tokenizer
        if tokenizer is None:
            nothing = torch.empty(0, dtype=torch.long)
            return Request(nothing, nothing, nothing)
        suffix = "\n"
        if self.chat is not None:
            # The answer begins at once; templates that know no thinking pass over the word.
            suffix = ChatFormat.of_template(tokenizer, enable_thinking=False).turn.template.partition("{question}")[2]
        texts = (FIRST_REQUEST, NEXT_REQUEST, suffix)
        return Request(*(torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]).long() for text in texts))


class _Scorer:
    """Scores documents piece by piece behind their complete cache, which is as before after every piece."""

    def __init__(self, compressor: KVzip, reading: Reading) -> None:
        self.compressor = compressor
        self.reading = reading
        self.state = reading.batch.state(reading.next_position)

    def piece(self, number: int, asked: Sequence[Tensor]) -> list[Tensor]:
        """Return each document's scores of one piece, ``[layers, kv_heads, tokens]``; ``asked`` are the requests."""
        backbone = self.compressor.backbone
        lengths = [len(ids) for ids in asked]
        ids = nn.utils.rnn.pad_sequence(list(asked), batch_first=True)
        tokens = ids.shape[1]
        positions = self.reading.next_position[:, None] + torch.arange(tokens, device=backbone.device)
        scores: list[list[Tensor]] = [[] for _ in asked]

        def watch(attention: Attention) -> None:
            cached = cached_keys(self.state.cache, attention.layer)
            queries = rotate_keys(backbone.model, attention.queries, positions)
            for row, length in enumerate(lengths):
                keys = self._keys(cached[row], row, number, tokens, length)
                scores[row].append(_highest(attention, queries[row, :, :length], *keys))

        with watched_attention(backbone.model, watch):
            next_pass(backbone, backbone.embed(ids), positions, self.state)
        cut_back(self.state.cache, tokens)
        if self.state.live is not None:
            self.state.live = self.state.live[:, :-tokens]
        return [torch.stack(layers) for layers in scores]

    def _keys(self, cached: Tensor, row: int, number: int, tokens: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Take the keys of the prefix, the piece, and its repetition from a row's cache, ``[kv_heads, all, head_dim]``.

        Behind slots of memories stand the tokens that were read, the prefix first if it is text, and then those that
        have just been read.
        """
        reading = self.reading
        end = cached.shape[1] - tokens
        document = end - reading.batch.embeds.shape[1] + reading.start
        first = document + number * self.compressor.piece_tokens
        last = min(first + self.compressor.piece_tokens, document + len(reading.documents[row]))
        prefix = len(self.compressor.prefix_ids)
        return cached[:, :prefix], cached[:, first:last], cached[:, end : end + length]


def _highest(attention: Attention, queries: Tensor, prefix: Tensor, piece: Tensor, own: Tensor) -> Tensor:
    """Return the highest attention that each slot of a piece gets.

    Parameters
    ----------
    attention : Attention
        The layer.
    queries : torch.Tensor
        ``[heads, tokens, head_dim]``, rotated: of the request and the repetition.
    prefix, piece, own : torch.Tensor
        ``[kv_heads, slots, head_dim]``, rotated keys. All queries see the prefix and the piece, and their own up to
        themselves.

    Returns
    -------
    torch.Tensor
        ``[kv_heads, slots of the piece]``, float32.
    """
    kv_heads, tokens, size = own.shape
    groups = queries.shape[0] // kv_heads
    queries = queries.reshape(kv_heads, groups, tokens, size)
    keys = torch.cat([prefix, piece, own], dim=1)
    first, last, total = prefix.shape[1], prefix.shape[1] + piece.shape[1], keys.shape[1]
    best = torch.zeros(piece.shape[:2], device=piece.device)
    entries = _AT_ONCE.get(piece.device.type, _AT_ONCE["cuda"])
    rows = min(tokens, max(1, entries // (groups * total)))
    heads = max(1, entries // (groups * rows * total))
    later = torch.ones(rows, rows, dtype=torch.bool, device=piece.device).triu(1)
    for head, start in itertools.product(range(0, kv_heads, heads), range(0, tokens, rows)):
        here, stop = slice(head, head + heads), min(start + rows, tokens)
        scores = attention.scores(queries[here, :, start:stop].flatten(1, 2), keys[here, : last + stop])
        by_query = scores.unflatten(1, (groups, stop - start))
        by_query[..., last + start :].masked_fill_(later[: stop - start, : stop - start], -torch.inf)
        paid = scores.softmax(-1)[..., first:last].amax(1)
        best[here] = torch.maximum(best[here], paid)
    return best
