"""Documents as the key/value cache that the model itself computes: exact (method ``kv``), or what a subclass keeps.

No training is needed: any causal language model with rotary positions will do. A document is read once behind a
*prefix* (a beginning-of-sequence token, a chat template's header), and its keys, before the rotary embedding, and
values become the memory. The prefix itself is no part of it; it stands in front of all memories once when they are
read, and is the attention sink that they share (StreamingLLM, arXiv 2309.17453).

One exact memory behind its prefix reads like the text itself. Several of them, each computed alone, do not see each
other as their texts would: that is what composition costs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ctxdocs.chat_format import asked_in_chat, header_ids
from ctxdocs.compressors.base import Compressor
from ctxdocs.compressors.blending import blended
from ctxdocs.compressors.kv_sessions import KVSession
from ctxdocs.compressors.passes import BatchInput, batch_input, first_pass
from ctxdocs.compressors.prefixes import prefix_ids, prefix_kind
from ctxdocs.compressors.reading import ModelInput
from ctxdocs.errors import ContextTooLong, InputError
from ctxdocs.memory import KVMemory, Memory
from ctxdocs.modeling.attention_layers import Attention, watched_attention
from ctxdocs.modeling.kv import recorded_keys_values
from ctxdocs.modeling.probe import check_keys
from ctxdocs.prompts import PartLike, Piece, Prompt, PromptFormat, as_memories, encode_pieces

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Reading:
    """Documents that have been read, and what the attention layers computed of them.

    Parameters
    ----------
    documents : sequence of torch.Tensor
        1-D token ids.
    keys, values : torch.Tensor
        ``[layers, batch, kv_heads, tokens, head_dim]``, keys before the rotary embedding.
    start : int
        Tokens in front of each document, which belong to the prefix.
    batch : BatchInput
        The batch as it was read; its cache, if the method reads on, holds the same keys, rotated, and values.
    next_position : torch.Tensor
        ``[batch]``, int64: position behind each document.
    """

    documents: Sequence[Tensor]
    keys: Tensor
    values: Tensor
    start: int
    batch: BatchInput
    next_position: Tensor

    def of(self, row: int) -> tuple[Tensor, Tensor]:
        """Return one document's keys and values, ``[layers, kv_heads, tokens, head_dim]``."""
        here = slice(self.start, self.start + len(self.documents[row]))
        return self.keys[:, row, :, here], self.values[:, row, :, here]


class KVCompressor(Compressor):
    """Keeps every key and value of a document.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model whose layers all turn their keys by one rotary embedding.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        Its tokenizer.
    prefix : str or sequence of int
        What documents are read behind, and memories with them: ``"chat"`` is what the tokenizer's chat template puts
        in front of a user's first words, ``"bos"`` the beginning-of-sequence token, ``"none"`` nothing; or token ids.
        ``"auto"`` is ``"chat"`` where questions are asked in a chat template, else ``"bos"`` where the tokenizer puts
        that token in front of texts, else ``"none"``.
    prompt_format : PromptFormat, optional
        Where sources and question stand when a library asks. Default: where the tokenizer's chat template puts a user's
        text, or in plain text.

    Attributes
    ----------
    prefix : str or list of int
        The prefix, ``"auto"`` as what it came to.
    chat : PromptFormat or None
        How the chat template has questions asked, where documents are read behind its header.
    """

    method = "kv"
    is_trained = False
    #: Whether the method reads something behind a document before it is done with it.
    reads_on: ClassVar[bool] = False

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        prefix: str | Sequence[int] = "auto",
        prompt_format: PromptFormat | None = None,
    ) -> None:
        chat = asked_in_chat(tokenizer)
        # Behind memories stands what would stand behind their texts.
        prompt_format = prompt_format or chat or PromptFormat(memories_end="\n\n")
        super().__init__(model, tokenizer, prompt_format=prompt_format)
        check_keys(self.backbone)
        self.prefix: str | list[int]
        self.prefix_ids: Tensor
        if isinstance(prefix, str):
            self.prefix = prefix_kind(prefix, tokenizer, prompt_format, chat)
            self.prefix_ids = prefix_ids(self.prefix, tokenizer, getattr(model.config, "bos_token_id", None), chat)
        else:
            self.prefix_ids = self.checked_ids(prefix, "the prefix", may_be_empty=True)
            self.prefix = self.prefix_ids.tolist()
        self.chat = chat if self.prefix == "chat" else None
        self._prefix_memory: KVMemory | None = None

    # Checkpoints.

    @classmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        """Nothing in ``config.json`` tells of the method: any causal language model will do."""
        return False

    @classmethod
    def own_tensors(cls, config: Mapping[str, Any]) -> set[str]:
        """None."""
        return set()

    @classmethod
    def build(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        config: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        **settings: Any,
    ) -> KVCompressor:
        """Build around any model."""
        return cls(model, tokenizer, **settings)

    @property
    def format_settings(self) -> dict[str, Any]:
        """The ids of the prefix."""
        return {"kv_prefix_ids": self.prefix_ids.tolist()}

    @property
    def run_settings(self) -> dict[str, Any]:
        """``prefix``, because nothing in a base model's folder says it."""
        return {"prefix": self.prefix}

    # Compressing.

    def tokens_at_once(self, tokens: int, **options: Any) -> int:
        """Return how many tokens of a document run at once: all of them, behind the prefix."""
        return len(self.prefix_ids) + tokens

    def compress_batch(self, documents: Sequence[Tensor]) -> list[Memory]:  # type: ignore[override]
        """Read documents padded on the right, without a mask, and keep all."""
        return self.compress_behind((), [document.cpu() for document in documents])

    def compress_behind(self, memories: Sequence[Memory], documents: Sequence[Tensor], **options: Any) -> list[Memory]:
        """Compress documents (1-D ids) that are read behind memories; ``options`` are those of :meth:`compress_ids`."""
        return self.everything(self.read(documents, memories))

    def everything(self, reading: Reading) -> list[Memory]:
        """Return memories that keep every slot of what was read."""
        memories: list[Memory] = []
        for row, document in enumerate(reading.documents):
            keys, values = reading.of(row)
            memories.append(
                KVMemory(
                    keys=keys.clone(),
                    values=values.clone(),
                    positions=torch.arange(len(document), device=keys.device),
                    span=len(document),
                    source_tokens=len(document),
                    fingerprint=self.fingerprint,
                )
            )
        return memories

    def read(
        self,
        documents: Sequence[Tensor],
        memories: Sequence[Memory] = (),
        watch: Callable[[Attention], None] | None = None,
    ) -> Reading:
        """Read a batch of documents behind the prefix, and behind memories.

        Parameters
        ----------
        documents : sequence of torch.Tensor
            1-D token ids, none empty.
        memories : sequence of Memory
            Read in front of every document.
        watch : callable, optional
            Called for every attention layer as soon as it has run.

        Raises
        ------
        ContextTooLong
            If the longest document does not fit the model's positions.
        """
        prefix = self.prefix_ids
        self.check_room(len(prefix) + sum(memory.span for memory in memories) + max(map(len, documents)))
        if memories:
            rows = [self.model_input([prefix, *memories, document]) for document in documents]
            batch = batch_input(self.model, rows)
            following = torch.tensor([row.next_position for row in rows], device=self.backbone.device)
        else:
            batch = self._texts([torch.cat([prefix, document]) for document in documents])
            following = batch.lengths
        with ExitStack() as stack:
            recorded = stack.enter_context(recorded_keys_values(self.model))
            if watch is not None:
                stack.enter_context(watched_attention(self.model, watch))
            first_pass(self.backbone, batch)
        return Reading(documents, recorded.keys, recorded.values, 0 if memories else len(prefix), batch, following)

    def _texts(self, texts: Sequence[Tensor]) -> BatchInput:
        """Return texts (1-D ids) as a batch, padded on the right, with a cache if something is read behind them."""
        from transformers import DynamicCache

        lengths = torch.tensor([len(text) for text in texts], device=self.backbone.device)
        embeds = self.backbone.embed(nn.utils.rnn.pad_sequence(list(texts), batch_first=True))
        positions = torch.arange(embeds.shape[1], device=embeds.device).expand(len(texts), -1)
        live = positions < lengths[:, None]
        return BatchInput(
            embeds=embeds,
            positions=positions,
            lengths=lengths,
            # Nothing slides out of it; within the model's positions nothing would have to.
            cache=DynamicCache() if self.reads_on else None,
            mask=None,
            live=None if bool(live.all()) else live,
            masks=None,
            added=None,
        )

    def check_room(self, positions: int, what: str = "a document behind its prefix takes") -> None:
        """Raise ``ContextTooLong`` unless the model has so many positions."""
        limit = self.backbone.max_positions
        if positions > limit:
            raise ContextTooLong(
                f"{what} {positions} positions, {positions - limit} more than {self.backbone.limit}",
                "compress it in parts",
            )

    def session(self, memories: Sequence[Memory] = ()) -> KVSession:  # type: ignore[override]
        """Start a context that begins with the prefix and memories, and grows as it is."""
        return KVSession(self, memories)

    @contextmanager
    def configured(self, **settings: Any) -> Iterator[None]:
        """Use other run settings inside the block; all but the prefix.

        Raises
        ------
        InputError
            If a setting is none of :attr:`run_settings`, or the prefix, behind which memories have to be read too.
        """
        if "prefix" in settings:
            raise InputError("the prefix of a compressor cannot be changed", "load another one")
        with super().configured(**settings):
            yield

    def blend(
        self, memories: Sequence[Memory], documents: Sequence[Sequence[int] | Tensor], share: float = 0.15
    ) -> list[Memory]:
        """Return memories that know of each other, for reading them behind the prefix in this order.

        The values that differ most once the documents stand together are computed again, and all that depends on them:
        see :func:`ctxdocs.compressors.blending.blended`, which also says what is raised.

        Parameters
        ----------
        memories : sequence of Memory
            They keep every key and value of their documents.
        documents : sequence of (sequence of int or torch.Tensor)
            The token ids each of them was made of.
        share : float
            Which part of the tokens to compute again: from 0 (the memories themselves) to 1 (one prefill of them all).
        """
        prompt: Prompt = [*([self.prefix_ids] if len(self.prefix_ids) else []), *as_memories(memories)]
        return [part for part in blended(self, prompt, documents, share) if isinstance(part, Memory)]

    # The prefix.

    def prefix_memory(self) -> KVMemory:
        """Return the prefix as a memory, to be read in front of others; without a prefix it has no slots."""
        known, weights = self._prefix_memory, self.backbone.embedding.weight
        is_trained = any(parameter.requires_grad for parameter in self.model.parameters())
        if known is None or is_trained or (known.keys.device, known.keys.dtype) != (weights.device, weights.dtype):
            known = self._prefix_memory = self._read_prefix()
        return known

    def forget_fingerprint(self) -> None:
        """Have the fingerprint, and the prefix's keys and values, computed anew; call it after changing weights."""
        super().forget_fingerprint()
        self._prefix_memory = None

    def model_input(self, prompt: Prompt) -> ModelInput:
        """Lay a prompt out; a prefix in front of memories comes from the cache, so that nothing needs a mask."""
        behind_prefix = len(prompt) > 1 and isinstance(prompt[1], Memory) and len(self.prefix_ids) > 0
        if behind_prefix and not isinstance(prompt[0], Memory) and prompt[0].equal(self.prefix_ids):
            prompt = [self.prefix_memory(), *prompt[1:]]
        return super().model_input(prompt)

    def opened(self, text: str) -> KVCompressor:
        """Return the compressor as it reads a conversation that begins with ``text``, in place of the chat's header.

        It reads the same memories, behind that text. Where the prefix is no chat header, it is this compressor.
        """
        if self.chat is None or text == self.chat.head:
            return self
        fingerprint, other = self.fingerprint, copy.copy(self)
        other.prefix_ids = header_ids(other._tokenizer(), text)
        other._prefix_memory, other._fingerprint = None, fingerprint
        return other

    def _prompt(self, prompt: str | Sequence[PartLike], memories: Sequence[Memory]) -> Prompt:
        """Behind a chat's header stands the user's text; what ends it, and begins the answer, follows."""
        made = super()._prompt(prompt, memories)
        if self.chat is None or not made or made[0] is not self.prefix_ids:  # who writes the header writes everything
            return made
        return [*made, encode_pieces(self._tokenizer(), [Piece(self.chat.template.partition("{question}")[2])])]

    def _read_prefix(self) -> KVMemory:
        slots = len(self.prefix_ids)
        ids = self.prefix_ids if slots else torch.zeros(1, dtype=torch.long)  # the shapes come from a token at least
        batch = self._texts([ids])
        with recorded_keys_values(self.model) as recorded:
            first_pass(self.backbone, batch)
        return KVMemory(
            keys=recorded.keys[:, 0, :, :slots],
            values=recorded.values[:, 0, :, :slots],
            positions=torch.arange(slots, device=self.backbone.device),
            span=slots,
            source_tokens=slots,
            fingerprint=self.fingerprint,
        )
