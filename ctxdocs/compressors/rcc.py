"""RCC, recurrent context compression: windows of text become states of every layer (arXiv 2406.06110).

An encoder, a second language model, reads the text in windows, each by itself. At every ``ratio``-th token all its
hidden states are kept. The decoder reads them as slots in front of the prompt: the encoder's embedding, projected,
is a slot's input embedding, and after each of the decoder's layers the encoder's state of that depth, projected, is
added. The published model is a Pythia-1.4b twice, with windows of 2048 tokens at ratio 32.

A text that does not fill its windows is continued to the left by itself, over and over: [... text text text]. A text
of exactly one window is left alone; one of several whole windows gets another window in front, as the authors have
it. So a short text costs a whole window, to compress and to read.

The published checkpoint says nothing of its method, ``ratio`` and ``window``. They are known by its name; a copy of it
needs ``load_compressor(..., method="rcc")``.

The published model also *reconstructs instructions*: compress :func:`with_instruction`, generate behind
``RECONSTRUCTION_PROMPT``, and take :func:`answer_of` what it wrote. Or ask as a library does, with the instruction
in the prompt (``CHAT_FORMAT``).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from ctxdocs.checks import whole_number
from ctxdocs.compressors.base import Compressor
from ctxdocs.compressors.batching import default_batch_tokens
from ctxdocs.compressors.rcc_sessions import RCCSession
from ctxdocs.compressors.reading import Layout
from ctxdocs.compressors.saving import ENCODER_CONFIG
from ctxdocs.errors import CheckpointError, InputError
from ctxdocs.memory import LayerStates, Memory
from ctxdocs.modeling.backbone import Backbone
from ctxdocs.modeling.layers import AddedStates, recorded_layers
from ctxdocs.prompts import PromptFormat
from ctxdocs.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

#: What the published model was trained with; its checkpoint does not say.
PUBLISHED_RATIO = 32
PUBLISHED_WINDOW = 2048

#: Behind the memory of a text and an instruction: the model writes the instruction first, and then the answer.
RECONSTRUCTION_PROMPT = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
#: The instruction written by hand.
CHAT_FORMAT = PromptFormat(
    template="{sources}" + RECONSTRUCTION_PROMPT + "{question}<|im_end|>\n<|im_start|>assistant\n", stop=("<|im_end|>",)
)

# Our modules and their names in the published checkpoint.
_PUBLISHED_NAMES = {
    "encoder.": "gpt_neox.rcc_encoder.gpt_neox.",
    "embedding_projection.": "gpt_neox.rcc_encoder2gpt_embed.",
    "layer_projections.": "gpt_neox.rcc_encoder2gpt_A_matrix.",
}


class RCC(Compressor):
    """Compresses windows of text into the encoder's states at every ``ratio``-th token.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The decoder.
    encoder : transformers.PreTrainedModel
        The encoder, as wide as the decoder; a head of its own is left out.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        For both.
    ratio : int
        Text tokens per slot.
    window : int
        Tokens the encoder reads at once; a multiple of ``ratio``.
    layer_map : {"one", "pairs"}
        Which encoder layers a decoder layer reads: the one of its own depth, or the mean of two in turn, from an
        encoder twice as deep.
    prompt_format : PromptFormat, optional
        Where sources and question stand when a library asks; default ``CHAT_FORMAT``.
    """

    method = "rcc"

    def __init__(
        self,
        model: PreTrainedModel,
        encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        ratio: int = PUBLISHED_RATIO,
        window: int = PUBLISHED_WINDOW,
        layer_map: Literal["one", "pairs"] = "one",
        prompt_format: PromptFormat | None = None,
    ) -> None:
        super().__init__(model, tokenizer, prompt_format=prompt_format or CHAT_FORMAT)
        self.encoder = cast("PreTrainedModel", encoder.base_model)
        self.encoder_backbone = Backbone(self.encoder)
        self.ratio = whole_number("ratio", ratio)
        self.window = whole_number("window", window)
        self.layer_map = layer_map
        self._check_settings()
        width, place = self.backbone.width, {"device": self.backbone.device, "dtype": self.backbone.dtype}
        self.embedding_projection = nn.Linear(width, width, bias=False, **place)
        self.layer_projections = nn.ModuleList(
            nn.Linear(width, width, bias=False, **place) for _ in self.backbone.layers
        )

    @classmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        """Whether ``config.json`` holds a ratio; the published one is that of a plain model."""
        return "mem_len" in config

    @classmethod
    def own_tensors(cls, config: Mapping[str, Any]) -> set[str]:
        """Names of the encoder's tensors and of the projections, as published."""
        from transformers import AutoModel

        with torch.device("meta"):
            encoder = AutoModel.from_config(_encoder_config(config))
        names = [f"encoder.{name}" for name, _ in encoder.named_parameters()]
        names += [f"layer_projections.{layer}.weight" for layer in range(config["num_hidden_layers"])]
        return {_published_name(name) for name in [*names, "embedding_projection.weight"]}

    @classmethod
    def unused_tensors(cls, config: Mapping[str, Any]) -> set[str]:
        """Return the encoder's head, and a second head of the decoder."""
        return {"gpt_neox.rcc_encoder.embed_out.weight", "gpt_neox.embed_out.weight"}

    @classmethod
    def build(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        config: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        **settings: Any,
    ) -> RCC:
        """Build from the published checkpoint, or from ours; ``settings`` replace what ``config.json`` says."""
        stored = {
            "ratio": config.get("mem_len", PUBLISHED_RATIO),
            "window": config.get("rcc_encoder_max_input", PUBLISHED_WINDOW),
            "layer_map": "pairs" if config.get("layers_Equal") else "one",
        }
        prefix = _PUBLISHED_NAMES["encoder."]
        of_encoder = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        encoder = _build_encoder(model, _encoder_config(config), of_encoder)
        compressor = cls(model, encoder, tokenizer, **{**stored, **settings})
        for own_name, weight in compressor.named_parameters():
            if own_name.startswith(("embedding_projection.", "layer_projections.")):
                found = tensors[_published_name(own_name)]
                if found.shape != weight.shape:
                    raise _wrong_shape(own_name, found.shape, weight.shape)
                weight.data.copy_(found)
        return compressor

    @classmethod
    def from_base(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, **settings: Any
    ) -> RCC:
        """Start with a copy of the decoder as encoder, as published."""
        return cls(model, cast("PreTrainedModel", copy.deepcopy(model.base_model)), tokenizer, **settings)

    @property
    def format_settings(self) -> dict[str, Any]:
        """Ratio, window and layer map, as the authors name them."""
        return {"mem_len": self.ratio, "rcc_encoder_max_input": self.window, "layers_Equal": self.layer_map == "pairs"}

    @property
    def run_settings(self) -> dict[str, Any]:
        """Ratio, window and layer map again, by our names: what builds the compressor from the published checkpoint."""
        return {"ratio": self.ratio, "window": self.window, "layer_map": self.layer_map}

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Return the encoder and the projections under their published names."""
        return {_published_name(name): value for name, value in super().own_parameters().items()}

    def save(self, path: str | Path) -> None:
        """Write a folder that ``load_compressor`` loads bit for bit, with the encoder's configuration in it."""
        super().save(path)
        self.encoder.config.to_json_file(Path(path) / ENCODER_CONFIG)

    def forward(self, states: Tensor, input_ids: Tensor) -> Tensor:
        """Read tokens behind states; see :meth:`read`. Returns logits ``[batch, slots + tokens, vocabulary]``."""
        return self.backbone.head(self.read(states, input_ids))

    def read(self, states: Tensor, input_ids: Tensor) -> Tensor:
        """Read tokens behind states, in one plain causal pass; training takes this path with :meth:`encode`'s states.

        Parameters
        ----------
        states : torch.Tensor
            ``[batch, slots, encoder layers + 1, width]``.
        input_ids : torch.Tensor
            ``[batch, tokens]``, int64.

        Returns
        -------
        torch.Tensor
            ``[batch, slots + tokens, width]``, after the decoder's final norm; of slots too.
        """
        slots, added = self.project(states)
        embeds = torch.cat([slots, self.backbone.embed(input_ids)], dim=1)
        place = torch.arange(embeds.shape[1], device=embeds.device)
        marked = (place < slots.shape[1]).expand(len(embeds), -1)
        return self.backbone.run(embeds, place[None], added=AddedStates(added.flatten(1, 2), marked))

    def encode(self, input_ids: Tensor) -> Tensor:
        """Encode whole windows, each by itself.

        Parameters
        ----------
        input_ids : torch.Tensor
            ``[batch, tokens]``, int64, a multiple of ``window`` tokens.

        Returns
        -------
        torch.Tensor
            ``[batch, tokens / ratio, encoder layers + 1, width]``: at every ``ratio``-th token the input embedding and
            every layer's output, the last one after the final norm.

        Raises
        ------
        InputError
            If the tokens do not fill their windows.
        """
        batch, tokens = input_ids.shape
        if tokens % self.window:
            raise InputError(f"{tokens} tokens do not fill windows of {self.window}")
        windows = input_ids.reshape(-1, self.window).split(
            max(1, default_batch_tokens(self.backbone.device) // self.window)
        )
        states = torch.cat([self._encode_windows(part) for part in windows])
        return states.reshape(batch, tokens // self.ratio, *states.shape[2:])

    def project(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Turn the encoder's states into what the decoder reads.

        Parameters
        ----------
        states : torch.Tensor
            ``[..., slots, encoder layers + 1, width]``.

        Returns
        -------
        embeds : torch.Tensor
            ``[..., slots, width]``, the slots' input embeddings.
        added : torch.Tensor
            ``[decoder layers, ..., slots, width]``, added to the layers' outputs.
        """
        depth = len(self.layer_projections)
        if self.layer_map == "pairs":
            sources = states[..., 1 : 2 * depth + 1, :].unflatten(-2, (depth, 2)).mean(-2)
        else:
            sources = states[..., 1 : depth + 1, :]
        added = [project(source) for project, source in zip(self.layer_projections, sources.unbind(-2), strict=True)]
        return self.embedding_projection(states[..., 0, :]), torch.stack(added)

    def fill_windows(self, ids: Tensor) -> Tensor:
        """Continue a text (``[tokens]``) to the left by itself until it fills whole windows, as the authors do.

        A text of several whole windows gets one more; a text that divides the window is tiled, where the authors'
        code fails.
        """
        windows = 1 if len(ids) <= self.window else len(ids) // self.window + 1
        return ids[torch.arange(-windows * self.window, 0, device=ids.device) % len(ids)]

    def compress_batch(self, documents: Sequence[Tensor]) -> list[Memory]:  # type: ignore[override]
        """Compress documents, the windows of all of them in one batch."""
        filled = [self.fill_windows(document) for document in documents]
        states = self.encode(torch.cat(filled)[None])[0].split([len(ids) // self.ratio for ids in filled])
        return [self.as_memory(part.clone(), len(ids)) for part, ids in zip(states, documents, strict=True)]

    def as_memory(self, states: Tensor, source_tokens: int) -> LayerStates:
        """Stamp states ``[slots, encoder layers + 1, width]`` as a memory of this compressor."""
        return LayerStates(states=states, span=len(states), source_tokens=source_tokens, fingerprint=self.fingerprint)

    def add_memory(self, layout: Layout, memory: Memory) -> None:
        """Lay a memory out: its slots run through the decoder, which is given their states on the way."""
        layout.add_states(*self.project(self.states_of(memory)))

    def states_of(self, memory: Memory) -> Tensor:
        """Return a memory's states ``[slots, encoder layers + 1, width]``, where and as the decoder takes them."""
        return memory.tensors()["states"].to(self.backbone.device, self.backbone.dtype)

    def session(  # type: ignore[override]
        self, memories: Sequence[Memory] = (), *, segment_tokens: int | None = None
    ) -> RCCSession:
        """Start a context whose text is compressed window by window.

        Parameters
        ----------
        memories : sequence of Memory
            What the context starts from, in this order.
        segment_tokens : int, optional
            Tokens the decoder reads as text before they are compressed, at most a window; default a window, or half
            the decoder's positions where those are fewer.
        """
        chosen = None if segment_tokens is None else whole_number("segment_tokens", segment_tokens)
        return RCCSession(self, memories, chosen)

    def _encode_windows(self, ids: Tensor) -> Tensor:
        """Encode ``[windows, window]`` to ``[windows, slots, encoder layers + 1, width]``."""
        backbone, every = self.encoder_backbone, slice(self.ratio - 1, None, self.ratio)
        embeds = backbone.embed(ids)
        place = torch.arange(self.window, device=embeds.device)[None]
        with recorded_layers(backbone.layers[:-1], lambda output: output[:, every].contiguous()) as between:
            last = backbone.run(embeds, place)
        return torch.stack([embeds[:, every], *between, last[:, every]], dim=2)

    def _check_settings(self) -> None:
        if self.layer_map not in ("one", "pairs"):
            raise InputError(f"layer_map is 'one' or 'pairs', not {self.layer_map!r}")
        if self.ratio < 1 or self.window < 1 or self.window % self.ratio:
            raise InputError(
                f"a window of {self.window} tokens cannot be compressed at ratio {self.ratio}",
                "the ratio, at least 1, must divide the window",
            )
        if self.window > self.encoder_backbone.max_positions:
            raise InputError(
                f"a window of {self.window} tokens does not fit the encoder's "
                f"{self.encoder_backbone.max_positions} positions",
                "pass a smaller window",
            )
        if self.encoder_backbone.width != self.backbone.width:
            raise InputError(
                f"the encoder's states are {self.encoder_backbone.width} wide, the decoder's {self.backbone.width}"
            )
        layers, given = len(self.backbone.layers), len(self.encoder_backbone.layers)
        wanted = 2 * layers if self.layer_map == "pairs" else layers
        if given < wanted:
            raise InputError(
                f"with layer_map {self.layer_map!r} a decoder of {layers} layers needs an encoder of {wanted}, "
                f"not of {given}"
            )


def with_instruction(text: str, instruction: str) -> str:
    """Return the text to compress for instruction reconstruction."""
    return f"{text}\n\n{instruction}"


def answer_of(generated: str) -> str:
    """Return the answer in what was generated behind ``RECONSTRUCTION_PROMPT``: the text of the assistant's turn."""
    return generated.rpartition("assistant\n")[2]


def _published_name(name: str) -> str:
    own = next(prefix for prefix in _PUBLISHED_NAMES if name.startswith(prefix))
    return _PUBLISHED_NAMES[own] + name.removeprefix(own)


def _encoder_config(config: Mapping[str, Any]) -> PreTrainedConfig:
    """Return the encoder's configuration: the decoder's, unless the checkpoint holds one of its own."""
    from transformers import CONFIG_MAPPING

    values = config.get("encoder_config", config)
    return CONFIG_MAPPING[values["model_type"]].from_dict(dict(values))


def _build_encoder(model: PreTrainedModel, config: PreTrainedConfig, tensors: dict[str, Tensor]) -> PreTrainedModel:
    """Build the encoder where and as the decoder is."""
    from transformers import MODEL_MAPPING

    model_class: Any = MODEL_MAPPING[type(config)]
    with quiet_transformers():
        encoder, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=model.dtype,
            attn_implementation=model.config._attn_implementation,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    for name, found, wanted in sorted(info["mismatched_keys"]):
        raise _wrong_shape(f"encoder.{name}", found, wanted)
    return encoder.to(model.device)


def _wrong_shape(name: str, found: Sequence[int], wanted: Sequence[int]) -> CheckpointError:
    return CheckpointError(f"{_published_name(name)} is {tuple(found)}, not {tuple(wanted)}")
