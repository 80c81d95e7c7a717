"""What methods share that keep the best-scored slots of a document and delete the others."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ctxdocs.checks import one_of
from ctxdocs.compressors.kv import KVCompressor, Reading
from ctxdocs.compressors.kv_sessions import KVSession
from ctxdocs.compressors.selection import PLACES, Budget, at_positions, best_of_all, best_per_head, marked
from ctxdocs.errors import InputError
from ctxdocs.memory import KVMemory, Memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class PruningCompressor(KVCompressor):
    """Reads a document, scores its slots, and keeps the best within a budget.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model whose layers all turn their keys by one rotary embedding.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        Its tokenizer.
    ratio : float
        Tokens per slot.
    slots : int, optional
        Slots per head of a document, whatever its length, in place of the ratio.
    budget : str
        ``"uniform"``: every head of every layer keeps the same number of slots. ``"global"``: one threshold for all,
        so that heads keep what they need; then reading takes a mask for each head.
    positions : str
        ``"source"``: slots stay at the positions of their tokens, and the memory spans the document. ``"compact"``:
        they close up, and the memory spans as many positions as it has slots.
    **settings
        ``prefix`` and ``prompt_format`` of :class:`~ctxdocs.compressors.kv.KVCompressor`. The prefix is always kept,
        and does not count in the budget.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        ratio: float = 2.0,
        slots: int | None = None,
        budget: str = "uniform",
        positions: str = "source",
        **settings: Any,
    ) -> None:
        super().__init__(model, tokenizer, **settings)
        self.ratio = ratio
        self.slots = slots
        self.budget = budget
        self.positions = positions
        self._budget(None, None, None)
        one_of("positions", positions, PLACES)

    @property
    def run_settings(self) -> dict[str, Any]:
        """How much is kept, and where; memories of any budget are read alike."""
        names = ("ratio", "slots", "budget", "positions")
        return {**super().run_settings, **{name: getattr(self, name) for name in names}}

    @property
    def ratios(self) -> range:
        """Any, up to the model's positions."""
        return range(1, self.backbone.max_positions + 1)

    def _settings_at_ratio(self, ratio: int) -> dict[str, Any]:
        return {"ratio": ratio, "slots": None}

    @abc.abstractmethod
    def scored(
        self, documents: Sequence[Tensor], memories: Sequence[Memory], counts: Sequence[int]
    ) -> tuple[Reading, list[Tensor]]:
        """Read documents behind memories and score their slots.

        Parameters
        ----------
        documents : sequence of torch.Tensor
            1-D token ids.
        memories : sequence of Memory
            What they are read behind.
        counts : sequence of int
            How many slots every head of each document will keep (with a global threshold: on average).

        Returns
        -------
        Reading
            What was read.
        list of torch.Tensor
            Of each document ``[layers, kv_heads, tokens]``, float32, higher is better.
        """

    def alike(self, tokens: int) -> int:
        """Return a number that documents share which can be scored as one batch."""
        return 0

    def compress_batch(  # type: ignore[override]
        self,
        documents: Sequence[Tensor],
        *,
        ratio: float | None = None,
        slots: int | None = None,
        budget: str | None = None,
        positions: str | None = None,
    ) -> list[Memory]:
        """Compress a batch; options take the place of the settings of the same name.

        Raises
        ------
        InputError
            If an option cannot be used, or both ``ratio`` and ``slots`` are given.
        ContextTooLong
            If a document, with what the method reads behind it, does not fit the model's positions.
        """
        options: dict[str, Any] = {"ratio": ratio, "slots": slots, "budget": budget, "positions": positions}
        return self.compress_behind((), [document.cpu() for document in documents], **options)

    def compress_behind(  # type: ignore[override]
        self,
        memories: Sequence[Memory],
        documents: Sequence[Tensor],
        *,
        ratio: float | None = None,
        slots: int | None = None,
        budget: str | None = None,
        positions: str | None = None,
    ) -> list[Memory]:
        """Compress documents (1-D ids) that are read behind memories; see :meth:`compress_batch`."""
        chosen = self._budget(ratio, slots, budget)
        places = self.positions if positions is None else positions
        one_of("positions", places, PLACES)
        groups: dict[tuple[bool, int], list[int]] = {}
        for index, document in enumerate(documents):
            keeps_all = chosen.per_head(len(document)) >= len(document)
            groups.setdefault((keeps_all, 0 if keeps_all else self.alike(len(document))), []).append(index)
        made: dict[int, Memory] = {}
        for (keeps_all, _), group in groups.items():
            some = [documents[index] for index in group]
            if keeps_all:
                made.update(zip(group, self.everything(self.read(some, memories)), strict=True))
            else:
                made.update(zip(group, self._pruned(some, memories, chosen, places), strict=True))
        return [made[index] for index in range(len(documents))]

    def session(  # type: ignore[override]
        self,
        memories: Sequence[Memory] = (),
        *,
        ratio: float | None = None,
        slots: int | None = None,
        budget: str | None = None,
        positions: str | None = None,
    ) -> KVSession:
        """Start a context that begins with the prefix and memories, and grows as it is until it is closed.

        Options say how it is then compressed; see :meth:`compress_batch`.
        """
        options = {"ratio": ratio, "slots": slots, "budget": budget, "positions": positions}
        self._budget(ratio, slots, budget)
        one_of("positions", self.positions if positions is None else positions, PLACES)
        return KVSession(self, memories, {name: value for name, value in options.items() if value is not None})

    def score_ids(self, document: Sequence[int] | Tensor) -> Tensor:
        """Return the scores of a document's slots, ``[layers, kv_heads, tokens]``, float32, higher is better."""
        ids = self.checked_ids(document, "the document").cpu()
        return self.scored([ids], (), [self._budget(None, None, None).per_head(len(ids))])[1][0]

    def _pruned(
        self, documents: Sequence[Tensor], memories: Sequence[Memory], budget: Budget, places: str
    ) -> list[Memory]:
        counts = [budget.per_head(len(document)) for document in documents]
        reading, scores = self.scored(documents, memories, counts)
        made: list[Memory] = []
        for row, (document, count) in enumerate(zip(documents, counts, strict=True)):
            keys, values = reading.of(row)
            if budget.share == "uniform":
                slots = at_positions(keys, values, best_per_head(scores[row], count), places)
            else:
                rank = budget.in_all(len(document), scores[row].shape[:2].numel())
                slots = marked(keys, values, best_of_all(scores[row], rank), places)
            made.append(KVMemory(**vars(slots), source_tokens=len(document), fingerprint=self.fingerprint))
        return made

    def _budget(self, ratio: float | None, slots: int | None, share: str | None) -> Budget:
        """Return the budget of a call: its own options before the settings."""
        if ratio is not None and slots is not None:
            raise InputError("both ratio and slots are given", "give one of them")
        if ratio is None and slots is None:
            ratio, slots = self.ratio, self.slots
        return Budget(
            ratio=self.ratio if ratio is None else ratio, slots=slots, share=self.budget if share is None else share
        )
