"""CCM, Compressed Context Memory: the keys and values of a few special tokens per segment (arXiv 2312.03414).

A document is read in segments. Behind each stand ``num_comp_tokens`` special tokens, which see the memory and the
segment; what they leave in every layer's key/value cache is kept, and the segment is dropped. Special tokens have
embeddings of their own and a LoRA that is switched on for them alone: text runs through the base model unchanged.
They do not count as positions, so the text that follows continues where the segment ended.

``attn_type`` says how the groups of all segments become one memory: ``concat_recur`` (CCM-concat) keeps them side by
side, ``merge_recur`` (CCM-merge) keeps their mean, a memory of constant size. ``concat`` and ``merge`` do the same,
but read every segment without the memory. With ``sink`` the first token (a bos, in training) stays in the memory.

The authors publish adapter folders (``adapter_config.json`` and weights). The base of those in ``ctxdocs.published`` is
known; others need ``base_model=...``. A folder's name carries what its files do not say:
``llama-7b-no-online-merge_recur-ntok8-sink`` is CCM-merge with eight special tokens and a sink, on top of the LoRA
adapter ``llama-7b-no``, which is looked for beside it (or pass ``finetune=...``). In a folder of another name pass
``attn_type=...`` and ``sink=...``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ctxdocs.compressors.base import Compressor
from ctxdocs.compressors.ccm_sessions import CCMSession, CCMStream, Context, Window
from ctxdocs.compressors.segments import longest_piece, segments_of, slots_behind_text
from ctxdocs.errors import CheckpointError, ContextTooLong, InputError
from ctxdocs.memory import KVMemory, Memory
from ctxdocs.modeling.conditional import Change, changed_rows
from ctxdocs.modeling.kv import KeysValues, recorded_keys_values
from ctxdocs.modeling.lora import Adapter, Lora
from ctxdocs.modeling.probe import check_keys
from ctxdocs.prompts import PromptFormat

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

ATTENTION_TYPES = ("concat_recur", "merge_recur", "concat", "merge")
#: Longest turn of a dialog in training.
PUBLISHED_SEGMENT_TOKENS = 128

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_NAME = re.compile(r"(?:(?P<finetune>.+-no)|.+)-online-(?P<attn>(?:concat|merge)(?:_recur)?)(?:-ntok(?P<n>\d+))?")
_FACTOR = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.self_attn\.(\w+)\.(lora_[AB])(?:\.default)?\.weight")
_TABLE = re.compile(r"base_model\.model\.model\.embed_tokens\.(comp|gist)_embeddings\.weight")
_OWN_TABLE = "comp_embeddings.weight"


class CCM(Compressor):
    """Compresses segments of text into the keys and values of special tokens.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A Llama or Mistral model (or another one with separate q, k, v and o projections and rotary positions).
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        Its tokenizer.
    num_comp_tokens : int
        Special tokens per segment; the published models use 2 (concat) and 8 (merge).
    attn_type : str
        ``"concat_recur"``, ``"merge_recur"``, ``"concat"`` or ``"merge"``.
    sink : bool
        Keep the first token's keys and values.
    lora_rank : int
        Rank of the LoRA on special tokens.
    lora_alpha : float
        Its scale is ``lora_alpha / lora_rank``.
    segment_tokens : int, optional
        Length of the segments documents are compressed in; default 128, or less where the model has fewer positions.
    prompt_format : PromptFormat, optional
        Where sources and question stand when a library asks.
    """

    method = "ccm"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        num_comp_tokens: int,
        attn_type: str = "concat_recur",
        sink: bool = False,
        lora_rank: int = 8,
        lora_alpha: float = 16,
        segment_tokens: int | None = None,
        prompt_format: PromptFormat | None = None,
    ) -> None:
        super().__init__(model, tokenizer, prompt_format=prompt_format)
        if attn_type not in ATTENTION_TYPES:
            raise InputError(f"unknown attn_type {attn_type!r}", f"one of: {', '.join(ATTENTION_TYPES)}")
        if num_comp_tokens < 1:
            raise InputError(f"a segment is compressed into at least one token, got num_comp_tokens={num_comp_tokens}")
        self.num_comp_tokens = num_comp_tokens
        self.attn_type = attn_type
        self.sink = sink
        self.lora_alpha = lora_alpha
        room = self.backbone.max_positions - num_comp_tokens
        self.segment_tokens = min(PUBLISHED_SEGMENT_TOKENS, room) if segment_tokens is None else segment_tokens
        if not 1 <= self.segment_tokens <= room:
            raise InputError(
                f"segments of {self.segment_tokens} tokens do not fit the model: with {num_comp_tokens} special tokens "
                f"its {self.backbone.max_positions} positions hold between 1 and {room} tokens"
            )
        self.comp_embeddings = self._new_embeddings(num_comp_tokens * _groups(attn_type))
        self.lora = nn.ModuleList(
            nn.ModuleDict({name: Lora(layer[name], lora_rank, lora_alpha / lora_rank) for name in _PROJECTIONS})
            for layer in self._projections()
        )
        check_keys(self.backbone)

    @classmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        """Whether ``config.json``, or an adapter, tells of special tokens."""
        return "num_comp_tokens" in config

    @classmethod
    def own_tensors(cls, config: Mapping[str, Any]) -> set[str]:
        """``comp_embeddings.weight``, and two LoRA factors for each of four projections per layer."""
        if not cls.recognises(config):
            return set()
        layers = range(config["num_hidden_layers"])
        return {_OWN_TABLE} | {
            _own_name(layer, name, side) for layer in layers for name in _PROJECTIONS for side in "AB"
        }

    @classmethod
    def adapter_settings(cls, adapter: Adapter) -> dict[str, Any]:
        """Return what the folder's name says, and the alpha of its LoRA."""
        if not any(map(_TABLE.fullmatch, adapter.tensors)):
            return {}
        settings = {"num_comp_tokens": None, "lora_alpha": adapter.config.get("lora_alpha", 16)}
        if match := _NAME.match(adapter.name):
            settings["finetune"] = match["finetune"]
            settings["attn_type"] = match["attn"]
            settings["num_comp_tokens"] = int(match["n"] or 1)
            settings["sink"] = adapter.name[match.end() :].startswith("-sink")
        return settings

    @classmethod
    def adapter_tensors(cls, model: PreTrainedModel, adapter: Adapter, own_names: set[str]) -> dict[str, Tensor]:
        """Rename the adapter's tensors; its LoRA stays apart from the model, because it is for special tokens alone."""
        own: dict[str, Tensor] = {}
        for name, tensor in adapter.tensors.items():
            if match := _FACTOR.fullmatch(name):
                own[_own_name(int(match[1]), match[2], match[3][-1])] = tensor
            elif _TABLE.fullmatch(name):
                own[_OWN_TABLE] = tensor
            else:
                raise CheckpointError(f"{adapter.name} holds {name}, which no CCM adapter has")
        if strange := sorted(own.keys() - own_names):
            raise CheckpointError(
                f"{adapter.name} holds {strange[0]}, for which the base model has no place",
                "is this the adapter's base model?",
            )
        return own

    @classmethod
    def build(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        config: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        **settings: Any,
    ) -> CCM:
        """Build from an adapter in the authors' format, or from ours. Own tensors stay in the dtype they came in."""
        if _OWN_TABLE not in tensors:
            raise CheckpointError(
                "there is no CCM adapter here", "give the adapter's folder, and its base model as base_model=..."
            )
        known = ("num_comp_tokens", "attn_type", "sink", "lora_alpha")
        settings = {**{name: config[name] for name in known if config.get(name) is not None}, **settings}
        if "attn_type" not in settings:
            raise CheckpointError(
                "neither the adapter nor the name of its folder says how memories are joined",
                f"pass attn_type=..., one of: {', '.join(ATTENTION_TYPES)}",
            )
        own = dict(tensors)
        groups = _groups(settings["attn_type"])
        rows = len(own[_OWN_TABLE])
        wanted = settings.setdefault("num_comp_tokens", rows // groups) * groups
        if not 0 < wanted <= rows:
            raise CheckpointError(f"the adapter has embeddings of {rows} special tokens, not {wanted}")
        own[_OWN_TABLE] = own[_OWN_TABLE][:wanted]  # as in the authors' loader
        compressor = cls(model, tokenizer, lora_rank=len(own[_own_name(0, "q_proj", "A")]), **settings)
        for name, parameter in compressor.own_parameters().items():
            if own[name].shape != parameter.shape:
                raise CheckpointError(
                    f"the adapter's {name} is {tuple(own[name].shape)}, not {tuple(parameter.shape)}",
                    "is this the adapter's base model?",
                )
            own[name] = own[name].to(parameter.device)
        compressor.load_state_dict(own, strict=False, assign=True)
        return compressor

    @property
    def format_settings(self) -> dict[str, Any]:
        """``attn_type``, ``num_comp_tokens``, ``sink`` and ``lora_alpha``."""
        return {name: getattr(self, name) for name in ("attn_type", "num_comp_tokens", "sink", "lora_alpha")}

    @property
    def run_settings(self) -> dict[str, Any]:
        """``segment_tokens``; and again what builds the compressor from an adapter that does not say it."""
        names = ("segment_tokens", "attn_type", "num_comp_tokens", "sink")
        return {name: getattr(self, name) for name in names}

    @property
    def ratios(self) -> range:
        """One segment of so many tokens for every special token; a merged memory does not grow with its segments."""
        longest = (self.backbone.max_positions - self.num_comp_tokens) // self.num_comp_tokens
        return range(0) if self.merges else range(1, longest + 1)

    def _settings_at_ratio(self, ratio: int) -> dict[str, Any]:
        return {"segment_tokens": ratio * self.num_comp_tokens}

    @property
    def is_recurrent(self) -> bool:
        """Whether segments are read with the memory of those before."""
        return self.attn_type.endswith("_recur")

    @property
    def merges(self) -> bool:
        """Whether the memory is a mean, and stays as large as it is after one step."""
        return self.attn_type.startswith("merge")

    def run(
        self,
        embeds: Tensor,
        positions: Tensor,
        *,
        cache: Cache | None = None,
        special: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> tuple[Tensor, KeysValues]:
        """Run the layers in one plain causal pass.

        Parameters
        ----------
        embeds : torch.Tensor
            ``[batch, tokens, width]``.
        positions : torch.Tensor
            ``[1, tokens]``, int64.
        cache : transformers.Cache, optional
            Extended in place, unless it is a fixed one.
        special : torch.Tensor, optional
            ``[batch, tokens]``, bool: the special tokens, for which the LoRA is on; None where there are none.
        kept : torch.Tensor, optional
            ``[batch, kept]``, int64: the tokens whose keys and values are returned; default all.

        Returns
        -------
        states : torch.Tensor
            ``[batch, tokens, width]``, after the final norm.
        written : KeysValues
            Of the tokens that are kept.
        """
        lora: AbstractContextManager[None] = nullcontext()
        if special is not None:
            pairs = zip(self._projections(), self.lora, strict=True)
            changes: dict[nn.Module, Change] = {
                layer[name]: factors.get_submodule(name) for layer, factors in pairs for name in _PROJECTIONS
            }
            lora = changed_rows(changes, special)
        with lora, recorded_keys_values(self.model, kept) as recorded:
            states = self.backbone.run(embeds, positions, cache=cache)
        positions = positions.expand(len(embeds), -1)
        positions = positions if kept is None else positions.gather(1, kept)
        return states, KeysValues(recorded.keys, recorded.values, positions)

    def write(self, cache: Cache, position: int) -> KeysValues:
        """Run special tokens on a cache that holds memory and segment, and leave the cache as it was.

        Returns
        -------
        KeysValues
            Of the special tokens, at ``position`` and after.
        """
        embeds = self.special_embeds(1)
        places = torch.arange(position, position + embeds.shape[1], device=embeds.device)[None]
        _, new = self.run(embeds, places, cache=cache, special=torch.ones_like(places, dtype=torch.bool))
        cache.crop(-embeds.shape[1])
        return new

    def special_embeds(self, batch: int) -> Tensor:
        """Return the special tokens' embeddings, ``[batch, num_comp_tokens, width]``."""
        # Behind them lie, for merging, those of tokens that only the authors' one-pass training form runs.
        return self.comp_embeddings.weight[: self.num_comp_tokens].to(self.backbone.dtype).expand(batch, -1, -1)

    def fold(self, memory: KeysValues | None, new: KeysValues, steps: int) -> KeysValues:
        """Take the special tokens of one more step into the memory of ``steps`` steps."""
        if memory is None:
            return new
        if not self.merges:
            return KeysValues.join(memory, new)
        share = 1 / (steps + 1)
        keys, values = memory.keys.lerp(new.keys, share), memory.values.lerp(new.values, share)
        return KeysValues(keys, values, memory.positions)

    def next_context(self, context: Context, new: KeysValues, first: KeysValues | None) -> Context:
        """Return the context after a step; ``first`` are the keys and values of the very first token."""
        sink = first if self.sink and not context.steps else context.sink
        # Keys from different positions have a mean only where they are rotated.
        new = new.rotated(self.model) if self.merges else new
        return Context(sink, self.fold(context.memory, new, context.steps), context.steps + 1)

    def segment(self, ids: Tensor, lengths: Tensor, start: int, context: Context) -> Context:
        """Compress one segment of every row, text and special tokens in one pass.

        Parameters
        ----------
        ids : torch.Tensor
            ``[batch, tokens]``, int64, padded on the right. Padding goes behind a row's special tokens, where causal
            attention never looks, so the pass needs no mask.
        lengths : torch.Tensor
            ``[batch]``, real tokens per row.
        start : int
            Position of the first token.
        context : Context
            Of the segments before.
        """
        n = self.num_comp_tokens
        embeds = torch.cat([self.backbone.embed(ids), self.special_embeds(len(ids))], dim=1)
        embeds, special = slots_behind_text(embeds, lengths, n)
        place = torch.arange(embeds.shape[1], device=embeds.device)
        seen = context.slots() if self.is_recurrent else context.sink
        cache = seen.fixed_cache(self.model) if seen is not None else None
        # Of the text only the first token may stay, as the sink.
        kept = nn.functional.pad(lengths[:, None] + place[:n], (1, 0))
        _, written = self.run(embeds, start + place[None], cache=cache, special=special, kept=kept)
        return self.next_context(context, written.part(1), written.part(0, 1))

    def tokens_at_once(  # type: ignore[override]
        self, tokens: int, *, segment_lengths: int | Sequence[int] | None = None
    ) -> int:
        """Return the length of its longest segment."""
        return longest_piece(tokens, self.segment_tokens if segment_lengths is None else segment_lengths)

    def compress_batch(  # type: ignore[override]  # a method's options are its own
        self, documents: Sequence[Tensor], *, segment_lengths: int | Sequence[int] | None = None
    ) -> list[Memory]:
        """Compress documents segment by segment; rows that have ended leave the batch.

        ``segment_lengths`` is one length or, for documents of equal length, all of them; default ``segment_tokens``.
        """
        longest, limit = max(map(len, documents)), self.backbone.max_positions
        if longest > limit:
            raise ContextTooLong(
                f"a document of {longest} tokens takes {longest - limit} positions more than the model's {limit}",
                "CCM keeps the positions of its text: compress in parts, or stream it through session(window=Window())",
            )
        context = Context()
        finished: dict[int, Memory] = {}
        given = self.segment_tokens if segment_lengths is None else segment_lengths
        for segment in segments_of(documents, given, self.backbone.device):
            context = self.segment(segment.ids, segment.lengths, segment.start, context)
            for document, row in zip(segment.documents, segment.ends.nonzero(), strict=True):
                length = len(documents[document])
                finished[document] = self.as_memory(context.rows(row).slots(), length, length)
            context = context.rows(~segment.ends)
        return [finished[index] for index in range(len(documents))]

    def as_memory(self, slots: KeysValues | None, span: int, source_tokens: int) -> KVMemory:
        """Stamp the slots of one row, placed from position 0 on, as a memory of this compressor."""
        if slots is None:
            raise InputError("nothing has been read that could become a memory", "feed the session first")
        return KVMemory(
            keys=slots.keys[:, 0].clone(),
            values=slots.values[:, 0].clone(),
            positions=slots.positions[0].clone(),
            span=span,
            source_tokens=source_tokens,
            fingerprint=self.fingerprint,
        )

    def session(  # type: ignore[override]
        self,
        memories: Sequence[Memory] = (),
        *,
        segment_tokens: int | None = None,
        window: Window | Mapping[str, Any] | None = None,
    ) -> CCMSession | CCMStream:
        """Start a context that is compressed turn by turn, or through a sliding window.

        Parameters
        ----------
        memories : sequence of Memory
            What the context starts from, in this order; a sliding window starts empty.
        segment_tokens : int, optional
            A longer turn is compressed in several steps; default the compressor's.
        window : Window or mapping, optional
            Compress what leaves a sliding window, and keep a bounded memory of an endless stream.
        """
        if window is None:
            return CCMSession(self, memories, self.segment_tokens if segment_tokens is None else segment_tokens)
        if memories:
            raise InputError("a sliding window starts empty", "start a session without a window from the memories")
        return CCMStream(self, window if isinstance(window, Window) else Window(**window))

    def streaming_session(self) -> CCMStream | CCMSession:
        """Start a sliding window of the published sizes; methods that read no memory as they go end with a session."""
        return self.session(window=Window()) if self.is_recurrent else self.session()

    def _projections(self) -> list[dict[str, nn.Linear]]:
        """Return the linear layers that the LoRA acts on, by name, for every decoder layer."""
        try:
            layers: Any = self.model.get_decoder().layers
            return [{name: getattr(layer.self_attn, name) for name in _PROJECTIONS} for layer in layers]
        except AttributeError as error:
            raise InputError(f"{type(self.model).__name__} has no separate q, k, v and o projections") from error

    def _new_embeddings(self, rows: int) -> nn.Embedding:
        """Start from means of the base table, as the authors do: row ``rows - 1 - k`` from its rows k, k + rows ..."""
        base = self.backbone.embedding.weight.detach()
        means = torch.stack([base[k::rows].mean(0, dtype=torch.float32) for k in reversed(range(rows))])
        return nn.Embedding.from_pretrained(means.to(base), freeze=False)


def _groups(attn_type: str) -> int:
    """Kinds of special tokens: merging has a second one."""
    return 2 if attn_type.startswith("merge") else 1


def _own_name(layer: int, projection: str, side: str) -> str:
    return f"lora.{layer}.{projection}.lora_{side}.weight"
