"""A causal language model seen as three stages: embed tokens, run the layers, project onto the vocabulary.

Compressors put memories between these stages. Nothing here copies or patches a model; every call goes through the
public interface of a stock ``transformers`` model.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ctxdocs.modeling.attention import causal_attention
from ctxdocs.modeling.layers import AddedStates, added_to_layers

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
        # transformers 5.24 renamed the argument, model by model.
        parameters = inspect.signature(model.base_model.forward).parameters
        self._cache_argument = "cache" if "cache" in parameters else "past_key_values"

    @property
    def embedding(self) -> nn.Embedding:
        """The token table; its width is the width of ``inputs_embeds`` (not always ``hidden_size``)."""
        return cast(nn.Embedding, self.model.get_input_embeddings())

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder's layers, first to last."""
        return cast(nn.ModuleList, self.model.get_decoder().layers)

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
        """Positions the model was built for."""
        return self.model.config.max_position_embeddings

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
        """
        cached: dict[str, Any] = {self._cache_argument: cache}
        slots = 0 if cache is None else cache.get_seq_length()
        attending, mask = causal_attention(self.model, inputs_embeds.shape[1], slots, mask)
        adding = nullcontext() if added is None else added_to_layers(self.layers, added)
        with attending, adding:
            output = self.model.base_model(
                inputs_embeds=inputs_embeds,
                position_ids=position_ids,
                attention_mask=mask,
                use_cache=cache is not None,
                **cached,
            )
        return output.last_hidden_state

    def head(self, hidden: Tensor) -> Tensor:
        """Project states ``[..., width]`` onto the vocabulary: logits ``[..., vocabulary]``."""
        return self.model.get_output_embeddings()(hidden)
