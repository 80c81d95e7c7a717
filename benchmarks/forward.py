"""What compression is measured against: one plain batched forward of the same model over the same tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from ctxdocs.compressors.base import Compressor
from ctxdocs.compressors.batching import batches_by_length, default_batch_tokens
from ctxdocs.modeling.backbone import Backbone


class PlainForward:
    """The base model over batches of documents.

    Padding is on the right, where plain causal attention needs no mask: the fastest forward there is.

    Parameters
    ----------
    compressor : Compressor
        Whose model to take.
    batches : sequence of (sequence of torch.Tensor)
        1-D token ids of the documents of each batch.
    """

    def __init__(self, compressor: Compressor, batches: Sequence[Sequence[Tensor]]) -> None:
        self.compressor = compressor
        self.batches = batches

    @classmethod
    def over(cls, compressor: Compressor, documents: Sequence[Tensor]) -> PlainForward:
        """Take documents whole, as many in a batch as keep the device busy."""
        batches = batches_by_length(list(map(len, documents)), default_batch_tokens(compressor.backbone.device))
        return cls(compressor, [[documents[index] for index in batch] for batch in batches])

    def backbone(self) -> None:
        """Run all layers."""
        self._run(self.compressor.model.base_model)

    def with_head(self) -> None:
        """Run all layers and project every token onto the vocabulary."""
        self._run(self.compressor.model)

    def _run(self, model: nn.Module) -> None:
        with torch.inference_mode():
            for documents in self.batches:
                ids = nn.utils.rnn.pad_sequence(list(documents), batch_first=True)
                model(input_ids=ids.to(self.compressor.backbone.device), use_cache=False)


class SameBatches(PlainForward):
    """The base model over the very batches the compressor makes of the same documents.

    Parameters
    ----------
    compressor : Compressor
        Whose model and batches to take.
    documents : sequence of torch.Tensor
        1-D token ids.
    batch_tokens : int, optional
        As for ``compress_ids``.
    """

    def __init__(self, compressor: Compressor, documents: Sequence[Tensor], batch_tokens: int | None = None) -> None:
        batches: list[list[Tensor]] = []
        compress_batch = compressor.compress_batch

        def record(documents: Sequence[Tensor], **options: Any) -> Any:
            batches.append(list(documents))
            return compress_batch(documents, **options)

        with mock.patch.object(compressor, "compress_batch", record):
            self.slots = sum(memory.slots for memory in compressor.compress_ids(documents, batch_tokens=batch_tokens))
        super().__init__(compressor, batches)


@contextmanager
def counted_tokens() -> Iterator[list[int]]:
    """Count what runs through the layers of any compressor while the block runs, pass by pass."""
    counts: list[int] = []
    run = Backbone.run

    def counting(self: Backbone, inputs_embeds: Tensor, *args: Any, **options: Any) -> Tensor:
        counts.append(inputs_embeds.shape[:2].numel())
        return run(self, inputs_embeds, *args, **options)

    with mock.patch.object(Backbone, "run", counting):
        yield counts
