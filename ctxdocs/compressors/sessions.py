"""What the sessions of all methods share."""

from __future__ import annotations

import abc
from collections.abc import Sequence

import torch
from torch import Tensor

from ctxdocs.errors import InputError
from ctxdocs.memory import Memory


class Session(abc.ABC):
    """A growing context, compressed as it arrives: a conversation, a stream."""

    #: Logits behind the last token read, ``[vocabulary]``; None where nothing has been read.
    _last_logits: Tensor | None = None

    @abc.abstractmethod
    def feed(self, ids: Sequence[int] | Tensor) -> Tensor:
        """Read token ids; return their logits ``[len(ids), vocabulary]``."""

    def generate_ids(self, max_new_tokens: int) -> list[int]:
        """Continue greedily behind everything fed so far; the new tokens become part of the context."""
        if self._last_logits is None:
            raise InputError("the session is empty", "feed it before generating")
        new: list[int] = []
        for _ in range(max_new_tokens):
            new.append(int(self._last_logits.argmax()))
            with torch.no_grad():
                self.feed(new[-1:])
        return new

    @abc.abstractmethod
    def memory(self) -> Memory:
        """Everything fed and generated so far as one closed memory; the session itself is left as it is."""

    @abc.abstractmethod
    def reset(self) -> None:
        """Forget everything."""
