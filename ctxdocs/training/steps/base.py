"""What the training steps of all methods share."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypedDict, TypeVar

from torch import Tensor, nn

from ctxdocs.compressors.base import Compressor
from ctxdocs.training.examples import Asking, Examples, sequences

if TYPE_CHECKING:
    from ctxdocs.training.config import DataOptions
    from ctxdocs.training.data import TrainingData

C = TypeVar("C", bound=Compressor)
#: Tensors by name, or lists of them; what a step is given.
Batch = dict[str, Any]
#: What batches are made of.
Example = dict[str, Any]


class StepOutput(TypedDict):
    """What one part of a step returns.

    ``loss`` is what is minimised, a scalar; ``losses`` holds what it is made of, for the log, without gradients;
    ``carried`` goes into the next part.
    """

    loss: Tensor
    losses: dict[str, Tensor]
    carried: Tensor | None


@dataclass
class StepOptions:
    """Options of a step; most have some."""


class Step(nn.Module, abc.ABC, Generic[C]):
    """How a method computes its loss on a batch, through the paths that compress and read.

    It is the module that is trained: what wraps a model for several devices wraps this one.

    Parameters
    ----------
    compressor : Compressor
        What is trained.
    options : StepOptions
        Of :attr:`Options`.
    """

    #: The options' class.
    Options: ClassVar[type[StepOptions]] = StepOptions

    #: Parts of a step; each part's loss is back-propagated before the next part runs.
    parts: int = 1
    #: Sequences with fewer tokens train nothing and are left out.
    shortest: int = 2

    def __init__(self, compressor: C, options: StepOptions) -> None:
        super().__init__()
        self.compressor = compressor

    @abc.abstractmethod
    def collate(self, examples: Sequence[Example]) -> Batch:
        """Put examples together."""

    @abc.abstractmethod
    def forward(self, batch: Batch, part: int = 0, carried: Tensor | None = None) -> StepOutput:
        """Return the loss of one part of the step, given what the part before it carried on."""

    @abc.abstractmethod
    def check(self, longest: int) -> None:
        """Raise ``InputError`` if sequences of ``longest`` tokens do not fit the model."""

    def examples(self, data: TrainingData, options: DataOptions, asking: Asking, seed: int) -> Examples:
        """Return what batches are drawn from: documents and questions as sequences, unless a step does otherwise."""
        return sequences(data, options, self.shortest, asking, seed)

    def group(self, tokens: int) -> int:
        """Return what sequences of that length have to agree on to stand in one batch."""
        return 0


def output(loss: Tensor, losses: dict[str, Tensor] | None = None, carried: Tensor | None = None) -> StepOutput:
    """Return a part's output; by default the loss is logged as it is."""
    named = {"loss": loss} if losses is None else losses
    return {"loss": loss, "losses": {name: value.detach() for name, value in named.items()}, "carried": carried}
