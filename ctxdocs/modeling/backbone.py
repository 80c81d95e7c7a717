"""A causal language model seen as three stages: embed tokens, run the layers, project onto the vocabulary.

Compressors put memories between these stages. Nothing here copies or patches a model; every call goes through the
public interface of a stock ``transformers`` model.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ctxdocs.errors import ContextTooLong, InputError
from ctxdocs.modeling.attention import causal_attention
from ctxdocs.modeling.layers import AddedStates, added_to_layers
from ctxdocs.modeling.recompute import entered_again, recomputed, replayable

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


class Backbone:
    """The three stages of a causal language model.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Any decoder-only model with a language-modelling head.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        parameters = inspect.signature(model.base_model.forward).parameters
        #: What the model calls the cache it is given; transformers 5.24 renamed it, model by model.
        self.cache_argument = "cache" if "cache" in parameters else "past_key_values"
        #: Whether ``ctxdocs.modeling.probe.check_keys`` has passed.
        self.keys_checked = False
        #: Whether layers compute their activations again for the gradient, which saves memory in training.
        self.recomputes = False

    @property
    def embedding(self) -> nn.Embedding:
        """The token table; its width is the width of ``inputs_embeds`` (not always ``hidden_size``)."""
        return cast(nn.Embedding, self.model.get_input_embeddings())

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder's layers, first to last."""
        layers = getattr(self.model.get_decoder(), "layers", None)
        if layers is None:
            raise InputError(f"{type(self.model).__name__} has no list of layers", "use a model like Llama or GPT-NeoX")
        return cast(nn.ModuleList, layers)

    @property
    def vocabulary(self) -> int:
        """Number of rows of the token table."""
        return self.embedding.num_embeddings

    @property
    def width(self) -> int:
        """Width of an input embedding."""
        return self.embedding.embedding_dim

    @property
    def device(self) -> torch.device:
        """Where the token table lies, which is where inputs have to be."""
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the token table."""
        return self.embedding.weight.dtype

    @property
    def max_positions(self) -> int:
        """Positions at which everything that is read is seen, at the angles it was read with.

        Those the model was built for, or fewer: layers that slide see no further than their window, and LongRoPE
        changes all angles beyond the length of pretraining.
        """
        config = self.model.config
        scaling = getattr(config, "rope_parameters", None) or {}
        limits = [config.max_position_embeddings, *self._windows]
        if scaling.get("rope_type") == "longrope":
            limits.append(scaling["original_max_position_embeddings"])
        return min(limits)

    @property
    def limit(self) -> str:
        """:attr:`max_positions` as part of a message: "the model's 2048"."""
        positions = self.max_positions
        return f"the {positions} of its sliding window" if positions in self._windows else f"the model's {positions}"

    @property
    def slides(self) -> bool:
        """Whether layers see no further than a window, so that padding between keys pushes others out of it."""
        return bool(self._windows)

    @property
    def keeps_keys_only(self) -> bool:
        """Whether every layer keeps keys and values, and none of them a running state."""
        return not any(hasattr(layer, "update_recurrent_state") for layer in self._cache_layers)

    @property
    def counts_slots(self) -> bool:
        """Whether slots without text take up positions.

        True for rotary models. OPT adds rows of a learned table instead, and a slot without text gets the row of
        "no position" (its padding row), which its module reaches as position -1.
        """
        return self.model.config.model_type != "opt"

    def embed(self, ids: Tensor) -> Tensor:
        """Look up token embeddings: ids ``[...]`` to ``[..., width]``."""
        return self.embedding(ids.to(self.device))

    def run(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        *,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        added: AddedStates | None = None,
    ) -> Tensor:
        """Run the layers and the final norm.

        Parameters
        ----------
        inputs_embeds : torch.Tensor
            ``[batch, tokens, width]``.
        position_ids : torch.Tensor
            ``[batch or 1, tokens]``, int64; -1 is "no position" where slots are not counted.
        mask : torch.Tensor, optional
            ``[batch, cached + tokens]``, 1 = live; or ``[batch or 1, 1, masked, cached + tokens]``, added to the scores
            of the last ``masked`` tokens. None means plain causal attention, which keeps the fast kernels.
        cache : transformers.Cache, optional
            Extended in place, unless it is a fixed one.
        added : AddedStates, optional
            Added to the layers' outputs.

        Returns
        -------
        torch.Tensor
            ``[batch, tokens, width]``, after the final norm (and OPT's ``project_out``).

        Raises
        ------
        ContextTooLong
            If cached keys would fall out of the sliding window of a layer.
        """
        if cache is not None and self.slides:
            self._check_window(cache.get_seq_length() + inputs_embeds.shape[1])
        recomputes = self.recomputes and torch.is_grad_enabled()
        slots = 0 if cache is None else cache.get_seq_length()
        if recomputes and cache is not None:
            cache = replayable(cache)
        cached: dict[str, Any] = {self.cache_argument: cache}
        given = (self.model, inputs_embeds.shape[1], slots, mask)
        attending, mask = causal_attention(*given)
        with (
            entered_again(lambda: causal_attention(*given)[0]) if recomputes else attending,
            nullcontext() if added is None else added_to_layers(self.layers, added),
            recomputed(self.layers) if recomputes else nullcontext(),
        ):
            output = self.model.base_model(
                inputs_embeds=inputs_embeds,
                position_ids=position_ids,
                attention_mask=mask,
                use_cache=cache is not None,
                **cached,
            )
        return output.last_hidden_state

    def head(self, hidden: Tensor) -> Tensor:
        """Project states ``[..., width]`` onto the vocabulary: logits ``[..., vocabulary]``, scaled as by the model."""
        logits = self.model.get_output_embeddings()(hidden)
        config = self.model.config
        if (factor := getattr(config, "logit_scale", None)) is not None:  # Cohere
            logits = logits * factor
        if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
            logits = logits / divisor
        if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma 2
            logits = (logits / cap).tanh() * cap
        return logits

    def _check_window(self, places: int) -> None:
        if places > (window := min(self._windows)):
            raise ContextTooLong(
                f"slots and tokens (of a batch: padded to one length) take {places} places, {places - window} more "
                f"than the {window} of the model's sliding window",
                "read fewer of them, or prompts one by one",
            )

    @cached_property
    def _windows(self) -> set[int]:
        """Lengths of the windows that layers slide over what they read."""
        return {layer.sliding_window for layer in self._cache_layers if getattr(layer, "is_sliding", False)}

    @cached_property
    def _cache_layers(self) -> list[Any]:
        """What transformers caches for every layer."""
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config).layers
