"""Gist tokens: documents become a short key/value cache.

Activation Beacon (Zhang et al., arXiv 2401.03462; method ``beacon``) and UltraGist (arXiv 2405.16635; ``ultragist``).
The text is read in windows of ``window`` tokens. One gist token for every ``ratio`` tokens, with query, key, value (and
output) projections of its own, stands between the tokens (``placement="interleave"``) or behind the window
(``"append"``); of a finished window only the keys and values of its gist tokens stay. The first ``sink_size`` tokens
stay as they are.

Any rotary model with ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj`` will do. A base model without gist parameters
becomes a compressor ready for training: they start as copies of the model's projections and of an embedding.

A document's last window is closed however short it is. A session keeps its running window open, as the authors do
while generating, and doubles the first tokens while they are both sink and window, as they do.

What differs from the authors' code: every text starts its own draw of ratios, so that memories do not depend on what
was compressed before. Of modes that no published checkpoint uses, ``join`` (several ratios at once), ``rewind``, and
step-expansion or segmentation between interleaved tokens are left out; windows that could run in parallel run one
after the other, with the same result.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ctxdocs.checks import one_of, true_or_false, whole_number, whole_numbers, words
from ctxdocs.compressors.base import Compressor
from ctxdocs.compressors.gist_ratios import RatioChoice
from ctxdocs.compressors.gist_sessions import GistSession
from ctxdocs.compressors.gist_windows import Windows
from ctxdocs.errors import CheckpointError, ContextTooLong, InputError
from ctxdocs.memory import KVMemory, Memory
from ctxdocs.modeling.conditional import Change
from ctxdocs.modeling.probe import check_keys
from ctxdocs.prompts import PromptFormat

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Which of the model's projections gist tokens may have on their own.
PROJECTIONS: dict[str, tuple[str, ...]] = {
    "q": ("q_proj",),
    "k": ("k_proj",),
    "v": ("v_proj",),
    "o": ("o_proj",),
    "mlp": ("up_proj", "down_proj"),
}
ATTENTION = ("full-coverage", "step-expansion", "segmentation")
PLACEMENTS = ("interleave", "append")


class GistCompressor(Compressor):
    """Compresses windows of text into the keys and values of gist tokens.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A rotary model with separate projections.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        Its tokenizer.
    window, stride : int
        Tokens of a window, and how many of them it compresses before the next one starts (default: all).
    ratio : int or sequence of int
        Tokens per gist token; 0 keeps a window as it is.
    ratio_mix : str
        How one of several ratios is chosen, see :class:`~ctxdocs.compressors.gist_ratios.RatioChoice`.
    attention : str, optional
        What of its window a gist token sees: ``full-coverage``, ``step-expansion``, ``segmentation``.
    placement : str, optional
        ``interleave`` or ``append``.
    attend_prev : bool
        Whether gist tokens behind a window see those in front of them; under full coverage they always do.
    sink_size : int, optional
        First tokens that are kept as they are.
    projections : sequence of str, optional
        Which projections gist tokens have on their own: ``q``, ``k``, ``v``, ``o``, ``mlp``.
    embed_init : str
        Whose embedding a new gist token starts from: ``eos`` or ``bos``.
    prompt_format : PromptFormat, optional
        Where sources and question stand when a library asks.

    Notes
    -----
    Settings that are left out are those that the method's models were published with.
    """

    #: Of the method's keys in ``config.json`` and of its tensors.
    prefix: ClassVar[str]
    #: What the authors trained with; the defaults of the constructor.
    published: ClassVar[Mapping[str, Any]]
    #: Whether the sink is taken anew with every step of the first window.
    renews_sink: ClassVar[bool]
    #: Whether segmentation counts the running window's tokens as slots in front of it.
    counts_running_tokens: ClassVar[bool]

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        window: int = 1024,
        stride: int | None = None,
        ratio: int | Sequence[int] = (2, 4, 8),
        ratio_mix: str = "step-random",
        attention: str | None = None,
        placement: str | None = None,
        attend_prev: bool = True,
        sink_size: int | None = None,
        projections: Sequence[str] | None = None,
        embed_init: str = "eos",
        prompt_format: PromptFormat | None = None,
    ) -> None:
        super().__init__(model, tokenizer, prompt_format=prompt_format)
        self.window = whole_number("window", window)
        self.stride = self.window if stride is None else whole_number("stride", stride)
        self.ratio = whole_numbers("ratio", ratio)
        self.ratio_mix = ratio_mix
        #: Of random ratios, while training; otherwise every text starts the same draws.
        self.ratio_generator: np.random.Generator | None = None
        self.attend_prev = true_or_false("attend_prev", attend_prev)
        given: dict[str, Any] = {
            "attention": attention,
            "placement": placement,
            "sink_size": sink_size,
            "projections": projections,
        }
        chosen = {name: self.published[name] if value is None else value for name, value in given.items()}
        self.attention = one_of("attention", chosen["attention"], ATTENTION)
        self.placement = one_of("placement", chosen["placement"], PLACEMENTS)
        self.sink_size = whole_number("sink_size", chosen["sink_size"])
        self.projections = [
            one_of("projections", name, tuple(PROJECTIONS)) for name in words("projections", chosen["projections"])
        ]
        one_of("embed_init", embed_init, ("eos", "bos"))
        self._check_settings()
        layers = {leaf for name in self.projections for leaf in PROJECTIONS[name]}
        #: Names of the model's projections that gist tokens do not use, and what they use instead.
        self.replaced = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in layers]
        self.replacements = nn.ModuleList(copy.deepcopy(model.get_submodule(name)) for name in self.replaced)
        self.embed_gist = nn.Embedding(1, self.backbone.width, device=self.backbone.device, dtype=self.backbone.dtype)
        token = getattr(model.config, f"{embed_init}_token_id", None)
        token = token[0] if isinstance(token, list) else token
        with torch.no_grad():
            self.embed_gist.weight.copy_(self.backbone.embedding.weight[token or 0])

    def _check_settings(self) -> None:
        check_keys(self.backbone)
        model = type(self.model).__name__
        names = {name.rpartition(".")[2] for name, _ in self.model.named_modules()}
        needed = dict.fromkeys(leaf for name in ("q", "k", "v", "o", *self.projections) for leaf in PROJECTIONS[name])
        if missing := [leaf for leaf in needed if leaf not in names]:
            raise InputError(f"{model} has no {', '.join(missing)}, which gist tokens replace")
        if self.placement != self.published["placement"] and "placement" not in self._published_keys():
            raise InputError(f"{self.method} has no placement {self.placement!r}", "only that behind a window")
        if self.interleaves and self.attention != "full-coverage":
            raise InputError(f"interleaved gist tokens cannot use {self.attention}", "append them, or full-coverage")
        kernel = getattr(self.model.config, "_attn_implementation", None) or ""
        if self.attention != "full-coverage" and "flash" in kernel:
            raise InputError(f"{self.attention} needs a mask, which {kernel} does not take", "use sdpa")
        if self.window < 1:
            raise InputError(f"a window holds at least one token, got window={self.window}")
        if not 1 <= self.stride <= self.window or (self.stride < self.window and self.interleaves):
            raise InputError(f"a window of {self.window} tokens cannot move on by {self.stride}")
        if self.sink_size < 0:
            raise InputError(f"sink_size is {self.sink_size}, it cannot be negative")
        self.ratio_choice()
        if self.window > self.backbone.max_positions:
            raise InputError(
                f"a window of {self.window} tokens is {self.window - self.backbone.max_positions} longer than the "
                f"model's {self.backbone.max_positions} positions"
            )

    # Checkpoints.

    @classmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        """Whether ``config.json`` holds the method's keys."""
        return any(name.startswith(f"{cls.prefix}_") for name in config)

    @classmethod
    def own_tensors(cls, config: Mapping[str, Any]) -> set[str]:
        """Name the gist token's embedding and projections; none where ``config.json`` is a base model's."""
        from transformers import AutoConfig, AutoModelForCausalLM

        if not cls.recognises(config):
            return set()
        with torch.device("meta"):  # which projections have biases, only the model itself tells
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
        return set(cls(model, **cls.published_settings(config)).own_parameters())

    @classmethod
    def published_settings(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Read the authors' keys; what ``config.json`` leaves out is the authors' default."""
        if not cls.recognises(config):
            return {}
        keys = {**cls._published_keys(), "ratio_mix": "ratio_mix", "ratio": "ratio", "embed_init": "embed_init"}
        found = {name: config.get(f"{cls.prefix}_{key}") for name, key in keys.items()}
        defaults = cls.code_defaults(config)
        return {**defaults, **{name: value for name, value in found.items() if value is not None}}

    @classmethod
    def code_defaults(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the authors' code assumes where ``config.json`` is silent."""
        raise NotImplementedError

    @classmethod
    def build(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        config: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        **settings: Any,
    ) -> GistCompressor:
        """Build from a checkpoint in the authors' format or in ours, or new around a base model."""
        compressor = cls(model, tokenizer, **{**cls.published_settings(config), **settings})
        own = compressor.own_parameters()
        with torch.no_grad():
            for name, tensor in tensors.items():
                if name not in own:
                    raise CheckpointError(f"{name} has no place under projections={compressor.projections}")
                if tensor.shape != own[name].shape:
                    raise CheckpointError(f"{name} is {tuple(tensor.shape)}, not {tuple(own[name].shape)}")
                own[name].copy_(tensor)
        return compressor

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Return the gist parameters by the authors' names."""
        own: dict[str, Any] = {
            f"{self.model.base_model_prefix}.{self.prefix}_embed_tokens.weight": self.embed_gist.weight
        }
        for name, replacement in zip(self.replaced, self.replacements, strict=True):
            parent, _, leaf = name.rpartition(".")
            for kind, parameter in replacement.named_parameters():
                own[f"{parent}.{self.prefix}_{leaf}.{kind}"] = parameter
        return own

    @property
    def format_settings(self) -> dict[str, Any]:
        """Everything but the ratios, under the authors' keys: memories of any ratio are read alike."""
        return {f"{self.prefix}_{key}": getattr(self, name) for name, key in self._published_keys().items()}

    @property
    def run_settings(self) -> dict[str, Any]:
        """``ratio`` and ``ratio_mix``."""
        return {"ratio": self.ratio, "ratio_mix": self.ratio_mix}

    @property
    def ratios(self) -> range:
        """Up to one gist token for the whole stride of a window."""
        return range(1, self.stride + 1)

    def _settings_at_ratio(self, ratio: int) -> dict[str, Any]:
        return {"ratio": [ratio]}

    @classmethod
    def _published_keys(cls) -> dict[str, str]:
        keys = {name: name for name in ("window", "stride", "attend_prev", "sink_size")}
        return {**keys, "attention": "attn", "projections": "param"}

    # What windows ask for.

    @property
    def interleaves(self) -> bool:
        """Whether gist tokens stand between the tokens of a window."""
        return self.placement == "interleave"

    def ratio_choice(self) -> RatioChoice:
        """Start choosing ratios for a text."""
        return RatioChoice(self.ratio, self.ratio_mix, self.stride, self.reach, self.ratio_generator)

    def reach(self, ratio: int) -> int:
        """Length of the longest text that fits the model's positions with this ratio."""
        positions = self.positions
        return (positions - self.window) * ratio + self.window if ratio else positions

    @property
    def positions(self) -> int:
        """Positions that the choice of an ``adapt`` ratio counts on."""
        return self.backbone.max_positions

    def interval(self, ratio: int) -> int:
        """Return how many tokens of a window one more gist token behind it takes in; ``ratio`` is not 0."""
        raise NotImplementedError

    def changes(self) -> dict[nn.Module, Change]:
        """Return what the model's projections put out at gist tokens."""

        def change(replacement: nn.Module) -> Change:
            return lambda inputs, outputs: replacement(inputs)

        places = zip(self.replaced, self.replacements, strict=True)
        return {self.model.get_submodule(name): change(replacement) for name, replacement in places}

    def empty_slots(self, batch: int) -> Tensor:
        """Return ``[2, layers, batch, kv_heads, 0, head_dim]``."""
        config = self.model.config
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        shape = (2, config.num_hidden_layers, batch, heads, 0, size)
        return torch.empty(shape, device=self.backbone.device, dtype=self.backbone.dtype)

    # Compressing.

    def forward(self, input_ids: Tensor, *, last_window: str = "compressed") -> Tensor:
        """Read a batch of texts window by window.

        Parameters
        ----------
        input_ids : torch.Tensor
            ``[batch, tokens]``, int64, without padding.
        last_window : str
            ``"plain"`` puts no gist tokens into the window that reaches the end, as the authors train.

        Returns
        -------
        torch.Tensor
            Logits, ``[batch, tokens, vocabulary]``.
        """
        return self.backbone.head(self.encode(input_ids, last_window=last_window))

    def encode(self, input_ids: Tensor, *, last_window: str = "compressed") -> Tensor:
        """Like :meth:`forward`, with states ``[batch, tokens, width]`` in place of logits."""
        ids = input_ids.to(self.backbone.device)
        return Windows(self, len(ids)).read(ids, last_window=last_window)

    def tokens_at_once(self, tokens: int) -> int:  # type: ignore[override]
        """Return the length of a window, or less."""
        return min(tokens, self.window)

    def compress_batch(self, documents: Sequence[Tensor]) -> list[Memory]:  # type: ignore[override]
        """Compress documents whole: the last window too, however short it is."""
        groups: dict[int, list[int]] = {}
        for index, document in enumerate(documents):
            groups.setdefault(self.ratio_choice().draw(len(document)), []).append(index)
        slots: dict[int, Tensor] = {}
        for group in groups.values():
            slots.update(zip(group, self._compress_alike([documents[index] for index in group]), strict=True))
        return [self.as_memory(slots[index], len(document)) for index, document in enumerate(documents)]

    def _compress_alike(self, documents: Sequence[Tensor]) -> list[Tensor]:
        """Compress documents whose windows have the same ratios; rows that have ended leave the batch."""
        device = self.backbone.device
        lengths = torch.tensor([len(document) for document in documents], device=device)
        ids = nn.utils.rnn.pad_sequence(list(documents), batch_first=True).to(device)
        rows, windows = torch.arange(len(documents), device=device), Windows(self, len(ids), tokens=len(documents[0]))
        self._check_reach(windows, int(lengths.max()))
        closed: dict[int, Tensor] = {}
        while len(rows):
            start, room = windows.tokens_read, windows.room
            left = lengths[rows] - start
            ends = left < room
            if bool(ends.any()):
                last = ids[rows[ends], start : start + int(left[ends].max())]
                closed.update(zip(rows[ends].tolist(), windows.take(ends).close(last, left[ends]), strict=True))
                rows, windows = rows[~ends], windows.take(~ends)
            if len(rows):
                windows.read(ids[rows, start : start + room])
        return [closed[index] for index in range(len(documents))]

    def _check_reach(self, windows: Windows, tokens: int) -> None:
        needed, limit = windows.positions_for(tokens), self.backbone.max_positions
        if needed > limit:
            raise ContextTooLong(
                f"a document of {tokens} tokens takes up to {needed} positions, {needed - limit} more than "
                f"{self.backbone.limit}",
                "compress it in parts, or at a higher ratio",
            )

    def as_memory(self, slots: Tensor, source_tokens: int) -> KVMemory:
        """Stamp slots ``[2, layers, kv_heads, slots, head_dim]`` as a memory of this compressor."""
        count = slots.shape[-2]
        positions = torch.arange(count, device=slots.device)
        return KVMemory(
            keys=slots[0],
            values=slots[1],
            positions=positions,
            span=count,
            source_tokens=source_tokens,
            fingerprint=self.fingerprint,
        )

    def session(self, memories: Sequence[Memory] = ()) -> GistSession:  # type: ignore[override]
        """Start a context whose windows are compressed as they fill, behind memories."""
        return GistSession(self, memories)


class ActivationBeacon(GistCompressor):
    """Activation Beacon (arXiv 2401.03462), as published for Qwen2, Mistral and Llama-3."""

    method = "beacon"
    prefix = "beacon"
    published = MappingProxyType(
        {"attention": "full-coverage", "placement": "interleave", "sink_size": 0, "projections": ("q", "k", "v")}
    )
    renews_sink = True
    counts_running_tokens = True

    @classmethod
    def code_defaults(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Gist tokens are interleaved and have no projections of their own."""
        return {"ratio": [2, 4, 8, 16, 32], "projections": []}

    @classmethod
    def _published_keys(cls) -> dict[str, str]:
        return {**super()._published_keys(), "placement": "pos"}

    @property
    def positions(self) -> int:
        """The model's positions, stretched as far as its rotary embedding is scaled."""
        scaling = getattr(self.model.config, "rope_parameters", None) or {}
        positions = self.backbone.max_positions
        unscaled = scaling.get("original_max_position_embeddings") or positions
        return max(positions, int(unscaled * (scaling.get("factor") or 1)))

    def interval(self, ratio: int) -> int:
        """Return the ratio itself."""
        return ratio


class UltraGist(GistCompressor):
    """UltraGist (arXiv 2405.16635), as published for Llama-2 and Mistral: gist tokens behind the window."""

    method = "ultragist"
    prefix = "ultragist"
    published = MappingProxyType(
        {"attention": "step-expansion", "placement": "append", "sink_size": 1, "projections": ("q", "k", "v", "o")}
    )
    renews_sink = False
    counts_running_tokens = False

    @classmethod
    def code_defaults(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """They depend on the model: what was published for Mistral reads longer windows."""
        is_mistral = config.get("model_type") == "mistral"
        window = 2048 if is_mistral else 1024
        return {"window": window, "ratio": [2, 4, 8, 16, 32], "attend_prev": not is_mistral, "sink_size": 0}

    def interval(self, ratio: int) -> int:
        """Share the stride evenly among a full window's gist tokens."""
        return self.stride // (self.stride // ratio)
