"""What compression is measured against: one plain batched forward of the same model over the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from ctxdocs.compressors.base import Compressor


class PlainForward:
    """The base model over the very batches the compressor makes of the same documents.

    Padding is on the right, where plain causal attention needs no mask: the fastest forward there is.

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
        self.compressor = compressor
        self.batches: list[list[Tensor]] = []
        compress_batch = compressor.compress_batch

        def record(documents: Sequence[Tensor], **options: Any) -> Any:
            self.batches.append(list(documents))
            return compress_batch(documents, **options)

        with mock.patch.object(compressor, "compress_batch", record):
            self.slots = sum(memory.slots for memory in compressor.compress_ids(documents, batch_tokens=batch_tokens))

    def backbone(self) -> None:
        """Run all layers."""
        self._run(self.compressor.model.base_model)

    def with_head(self) -> None:
        """Run all layers and project every token onto the vocabulary."""
        self._run(self.compressor.model)

    def _run(self, model: nn.Module) -> None:
        with torch.inference_mode():
            for documents in self.batches:
                ids = nn.utils.rnn.pad_sequence(documents, batch_first=True)
                model(input_ids=ids.to(self.compressor.backbone.device), use_cache=False)
