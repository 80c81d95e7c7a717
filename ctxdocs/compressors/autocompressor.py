"""AutoCompressor: documents become summary vectors, a soft prompt (Chevalier et al., arXiv 2305.14788).

The text is read in segments. Behind each one stand ``summary_length`` summary slots; what the model's final norm
puts out there is fed back, unchanged, as input embeddings in front of the next segment. With
``accumulate_summary`` the vectors of all segments are kept, without it only the latest (the RMT baseline,
arXiv 2207.06881). ``summary_length = 0`` is the full-attention baseline: its memories are empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ctxdocs.checks import true_or_false, whole_number
from ctxdocs.compressors.autocompressor_sessions import AutoCompressorSession
from ctxdocs.compressors.base import Compressor
from ctxdocs.compressors.segments import longest_piece, segments_of, slots_behind_text, split_lengths
from ctxdocs.errors import CheckpointError, ContextTooLong, InputError
from ctxdocs.memory import Memory, SoftPrompt
from ctxdocs.prompts import PromptFormat

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Segment length of the published models: 6144 tokens in four compression steps.
PUBLISHED_SEGMENT_TOKENS = 1536


class AutoCompressor(Compressor):
    """Compresses segments of text into summary vectors.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A Llama or OPT model (or another rotary decoder).
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        Its tokenizer.
    summary_length : int
        Summary vectors per segment; the published models use 50.
    accumulate_summary : bool
        Keep the vectors of all segments (AutoCompressor) or of the last one (RMT).
    segment_tokens : int, optional
        Length of the segments documents are compressed in; default 1536, or less where the model has fewer positions.
    prompt_format : PromptFormat, optional
        Where sources and question stand when a library asks.
    """

    method = "autocompressor"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        summary_length: int,
        accumulate_summary: bool = True,
        segment_tokens: int | None = None,
        prompt_format: PromptFormat | None = None,
    ) -> None:
        super().__init__(model, tokenizer, prompt_format=prompt_format)
        self.summary_length = whole_number("summary_length", summary_length)
        if summary_length < 0:
            raise InputError(f"summary_length is {summary_length}, it cannot be negative")
        self.accumulate_summary = true_or_false("accumulate_summary", accumulate_summary)
        room = self.backbone.max_positions - (summary_length if self.backbone.counts_slots else 0)
        preset = min(PUBLISHED_SEGMENT_TOKENS, room)
        self.segment_tokens = whole_number("segment_tokens", preset if segment_tokens is None else segment_tokens)
        if not 1 <= self.segment_tokens <= room:
            raise InputError(
                f"segments of {self.segment_tokens} tokens do not fit the model: with {summary_length} summary slots "
                f"its {self.backbone.max_positions} positions hold between 1 and {room} tokens"
            )
        self.embed_summary = nn.Embedding(
            summary_length, self.backbone.width, device=self.backbone.device, dtype=self.backbone.dtype
        )
        nn.init.normal_(self.embed_summary.weight, std=getattr(model.config, "initializer_range", 0.02))

    @classmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        """Whether ``config.json`` names summary vectors or one of the authors' architectures."""
        names = config.get("architectures") or []
        return "summary_length" in config or any(name.endswith("AutoCompressorModel") for name in names)

    @classmethod
    def own_tensors(cls, config: Mapping[str, Any]) -> set[str]:
        """``embed_summary.weight``, unless ``summary_length`` is 0."""
        return {"embed_summary.weight"} if config.get("summary_length") else set()

    @classmethod
    def build(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        config: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        **settings: Any,
    ) -> AutoCompressor:
        """Build from a checkpoint in the authors' format, or in ours."""
        stored = {
            "summary_length": config.get("summary_length", 0),
            "accumulate_summary": config.get("accumulate_summary", False),
        }
        compressor = cls(model, tokenizer, **{**stored, **settings})
        if (weight := tensors.get("embed_summary.weight")) is not None:
            wanted = tuple(compressor.embed_summary.weight.shape)
            if tuple(weight.shape) != wanted:
                raise CheckpointError(f"embed_summary.weight is {tuple(weight.shape)}, not {wanted}")
            compressor.embed_summary.weight = nn.Parameter(weight.to(compressor.embed_summary.weight))
        return compressor

    @property
    def format_settings(self) -> dict[str, Any]:
        """``summary_length`` and ``accumulate_summary``, as the authors' ``config.json`` names them."""
        return {"summary_length": self.summary_length, "accumulate_summary": self.accumulate_summary}

    @property
    def run_settings(self) -> dict[str, Any]:
        """``segment_tokens``."""
        return {"segment_tokens": self.segment_tokens}

    @property
    def ratios(self) -> range:
        """A segment of so many tokens for every summary vector, where vectors accumulate and segments fit the model."""
        if not (self.accumulate_summary and self.summary_length):
            return range(0)
        room = self.backbone.max_positions - (self.summary_length if self.backbone.counts_slots else 0)
        return range(1, room // self.summary_length + 1)

    def _settings_at_ratio(self, ratio: int) -> dict[str, Any]:
        return {"segment_tokens": ratio * self.summary_length}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        softprompt: Tensor | None = None,
        segment_lengths: int | Sequence[int] | None = None,
        output_softprompt: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Read a batch segment by segment; arguments are named as in the authors' model.

        Parameters
        ----------
        input_ids : torch.Tensor
            ``[batch, tokens]``, int64.
        attention_mask : torch.Tensor, optional
            ``[batch, tokens]``, 1 = real; padding may lie anywhere. Each row equals its unpadded self.
        softprompt : torch.Tensor, optional
            ``[batch, vectors, width]``, read in front of the first segment.
        segment_lengths : int or sequence of int, optional
            One length (the last segment may be shorter) or all of them; default: one segment.
        output_softprompt : bool
            Summarise the last segment too; the others always are.

        Returns
        -------
        logits : torch.Tensor
            ``[batch, tokens, vocabulary]``; zeros at padding.
        softprompt : torch.Tensor
            ``[batch, vectors, width]``. With accumulation it starts with the one handed in.

        Raises
        ------
        InputError
            If the segment lengths do not add up to the number of tokens.
        """
        states, softprompt = self.encode(input_ids, attention_mask, softprompt, segment_lengths, output_softprompt)
        logits = self.backbone.head(states)
        if attention_mask is not None:
            logits = logits * attention_mask[..., None].to(logits)
        return logits, softprompt

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        softprompt: Tensor | None = None,
        segment_lengths: int | Sequence[int] | None = None,
        output_softprompt: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Like :meth:`forward`, with token states ``[batch, tokens, width]`` in place of logits.

        Training losses on few tokens, and compression, need no projection onto the vocabulary.
        """
        batch, tokens = input_ids.shape
        pieces = split_lengths(tokens, segment_lengths)
        softprompt = self.empty_softprompt(batch) if softprompt is None else softprompt.to(self.backbone.dtype)
        masks = [None] * len(pieces) if attention_mask is None else attention_mask.bool().split(pieces, dim=1)
        states = []
        for index, (ids, mask) in enumerate(zip(input_ids.split(pieces, dim=1), masks, strict=True)):
            summarise = output_softprompt or index < len(pieces) - 1
            state, summary = self._padded_segment(ids, mask, softprompt, summarise)
            states.append(state)
            softprompt = self.next_softprompt(softprompt, summary)
        return torch.cat(states, dim=1), softprompt

    def segment(
        self, input_ids: Tensor, softprompt: Tensor, *, lengths: Tensor | None = None, summarise: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Run one segment: ``[soft prompt; tokens; summary slots]`` in one plain causal pass.

        Parameters
        ----------
        input_ids : torch.Tensor
            ``[batch, tokens]``, int64, padded on the right.
        softprompt : torch.Tensor
            ``[batch, vectors, width]``; ``vectors`` may be 0.
        lengths : torch.Tensor, optional
            ``[batch]``, real tokens per row; None when all rows are full. Padding goes behind a row's summary slots,
            where causal attention never looks, so the pass needs no mask.
        summarise : bool
            Whether summary slots follow the tokens.

        Returns
        -------
        states : torch.Tensor
            ``[batch, tokens, width]``, after the final norm; meaningless at padding.
        summary : torch.Tensor
            ``[batch, summary_length, width]``, or no vectors where ``summarise`` is False.
        """
        batch, tokens = input_ids.shape
        before, slots = softprompt.shape[1], self.summary_length if summarise else 0
        summary_slots = self.embed_summary.weight[:slots].expand(batch, -1, -1)
        embeds = torch.cat([softprompt, self.backbone.embed(input_ids), summary_slots], dim=1)
        place = torch.arange(embeds.shape[1], device=embeds.device)
        first_slot = place.new_full((batch,), before + tokens) if lengths is None else before + lengths
        if lengths is not None:
            embeds, _ = slots_behind_text(embeds, first_slot, slots)
        if self.backbone.counts_slots:
            positions = place[None]
        else:
            is_token = (place >= before) & (place < first_slot[:, None])
            positions = torch.where(is_token, place - before, -1)
        hidden = self.backbone.run(embeds, positions)
        states = hidden[:, before : before + tokens]
        if lengths is None:
            return states, hidden[:, before + tokens :]
        at = first_slot[:, None] + torch.arange(slots, device=embeds.device)
        return states, hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[-1]))

    def next_softprompt(self, softprompt: Tensor, summary: Tensor) -> Tensor:
        """Return the soft prompt after a segment: accumulated, or replaced by a summary that is not empty."""
        if self.accumulate_summary:
            return torch.cat([softprompt, summary], dim=1)
        return summary if summary.shape[1] else softprompt

    def empty_softprompt(self, batch: int) -> Tensor:
        """Return ``[batch, 0, width]``."""
        return torch.empty(batch, 0, self.backbone.width, device=self.backbone.device, dtype=self.backbone.dtype)

    def tokens_at_once(  # type: ignore[override]
        self, tokens: int, *, segment_lengths: int | Sequence[int] | None = None
    ) -> int:
        """Return the length of its longest segment."""
        return longest_piece(tokens, self.segment_tokens if segment_lengths is None else segment_lengths)

    def compress_batch(  # type: ignore[override]  # a method's options are its own
        self, documents: Sequence[Tensor], *, segment_lengths: int | Sequence[int] | None = None
    ) -> list[Memory]:
        """Compress documents, every segment summarised; rows that have ended leave the batch.

        ``segment_lengths`` is one length or, for documents of equal length, all of them; default ``segment_tokens``.
        """
        softprompt = self.empty_softprompt(len(documents))
        finished: dict[int, Tensor] = {}
        given = self.segment_tokens if segment_lengths is None else segment_lengths
        self._check_positions(split_lengths(max(map(len, documents)), given))
        for segment in segments_of(documents, given, self.backbone.device):
            lengths = None if segment.is_full else segment.lengths
            _, summary = self.segment(segment.ids, softprompt, lengths=lengths)
            softprompt = self.next_softprompt(softprompt, summary)
            for document, vectors in zip(segment.documents, softprompt[segment.ends], strict=True):
                finished[document] = vectors.clone()
            softprompt = softprompt[~segment.ends]
        return [self.as_memory(finished[index], len(document)) for index, document in enumerate(documents)]

    def as_memory(self, vectors: Tensor, source_tokens: int) -> SoftPrompt:
        """Stamp summary vectors ``[slots, width]`` as a memory of this compressor."""
        span = len(vectors) if self.backbone.counts_slots else 0
        return SoftPrompt(vectors=vectors, span=span, source_tokens=source_tokens, fingerprint=self.fingerprint)

    def session(  # type: ignore[override]
        self, memories: Sequence[Memory] = (), *, segment_tokens: int | None = None, published: bool = False
    ) -> AutoCompressorSession:
        """Start a context that is summarised whenever its running segment is full.

        Parameters
        ----------
        memories : sequence of Memory
            What the context starts from, in this order.
        segment_tokens : int, optional
            Length of the running segment; default the compressor's.
        published : bool
            Keep a quirk of the authors' code: a first feed that ends exactly at a segment border leaves that segment
            open for good, and it is never summarised.
        """
        chosen = whole_number("segment_tokens", self.segment_tokens if segment_tokens is None else segment_tokens)
        if chosen < 1:
            raise InputError(f"a segment holds at least one token, got segment_tokens={chosen}")
        return AutoCompressorSession(self, memories, chosen, published=published)

    def _check_positions(self, segments: Sequence[int]) -> None:
        """Refuse a document of which a segment, vectors in front of it and slots behind it outgrow the positions."""
        slots = self.summary_length if self.backbone.counts_slots else 0
        before = (slots * (index if self.accumulate_summary else min(index, 1)) for index in range(len(segments)))
        needed = max(vectors + tokens + slots for vectors, tokens in zip(before, segments, strict=True))
        if needed > (limit := self.backbone.max_positions):
            raise ContextTooLong(
                f"a document of {sum(segments)} tokens takes up to {needed} positions with its summary vectors, "
                f"{needed - limit} more than {self.backbone.limit}",
                "compress it in parts",
            )

    def _padded_segment(
        self, ids: Tensor, mask: Tensor | None, softprompt: Tensor, summarise: bool
    ) -> tuple[Tensor, Tensor]:
        """Run a segment whose padding may lie anywhere: move real tokens to the left, and states back."""
        if mask is None or bool(mask.all()):
            return self.segment(ids, softprompt, summarise=summarise)
        order = mask.logical_not().argsort(dim=1, stable=True)
        states, summary = self.segment(ids.gather(1, order), softprompt, lengths=mask.sum(1), summarise=summarise)
        back = order.argsort(dim=1)
        return states.gather(1, back[..., None].expand_as(states)), summary
