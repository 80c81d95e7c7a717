"""What the sessions of all methods share: reading, answering, what still fits, and being saved.

A method's session says how it reads more tokens (:meth:`Session._read`), how many positions that takes
(:meth:`Session._positions_for`), how it is closed into a memory, and what has to be kept to go on later.
"""

from __future__ import annotations

import abc
import bisect
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ctxdocs import generation
from ctxdocs.errors import ContextTooLong, InputError
from ctxdocs.generation import Generation, GenerationOptions
from ctxdocs.memory import Memory
from ctxdocs.prompts import as_memories

if TYPE_CHECKING:
    from ctxdocs.compressors.base import Compressor
    from ctxdocs.prompts import Prompt


class Session(abc.ABC):
    """A growing context, compressed as it arrives: a conversation, a stream.

    Parameters
    ----------
    compressor : Compressor
        Reads and compresses.
    memories : sequence of Memory
        What the context starts from, in this order.

    Attributes
    ----------
    tokens_seen : int
        Text tokens read since the start, or since the last :meth:`reset`.
    note : dict
        JSON-able values of the caller's, saved with the session.
    """

    tokens_seen: int = 0
    #: Logits behind the last token read, ``[vocabulary]``; None where nothing has been read.
    _last_logits: Tensor | None = None

    def __init__(self, compressor: Compressor, memories: Sequence[Memory] = ()) -> None:
        self.memories = tuple(as_memories(memories))
        for memory in self.memories:
            compressor.check_memory(memory)
        self.compressor: Any = compressor
        self.note: dict[str, Any] = {}
        self.reset()

    # What a method says.

    @abc.abstractmethod
    def reset(self) -> None:
        """Go back to the memories the session started from."""

    @abc.abstractmethod
    def memory(self) -> Memory:
        """Return everything fed and generated so far as one closed memory; the session itself is left as it is."""

    @abc.abstractmethod
    def _read(self, ids: Tensor, **options: Any) -> Tensor:
        """Read checked ids ``[tokens]``; return logits ``[tokens, vocabulary]``, and keep the last."""

    @abc.abstractmethod
    def _positions_for(self, tokens: int) -> int:
        """Return the most positions that are taken at once while ``tokens`` more tokens are read."""

    @property
    def options(self) -> dict[str, Any]:
        """What ``compressor.session(memories, **options)`` has to be told to start such a session; JSON-able."""
        return {}

    @abc.abstractmethod
    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what has been read so far, as tensors and as JSON-able values, for :meth:`restore`."""

    @abc.abstractmethod
    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` of a session with the same options and memories returned."""

    # What all share.

    def feed(self, ids: Sequence[int] | Tensor, **options: Any) -> Tensor:
        """Read token ids; return their logits ``[len(ids), vocabulary]``. Options are the method's own.

        Raises
        ------
        InputError
            If there are none, or they lie outside the vocabulary; then nothing is read.
        ContextTooLong
            If reading them would take more positions than the model has; then nothing is read either.
        """
        checked = self.compressor.checked_ids(ids, "what is fed")
        self._check_room(len(checked))
        return self._read(checked, **options)

    def room(self, most: int) -> int:
        """Return how many more tokens, at most ``most``, the model's positions leave room for."""
        limit = self.compressor.backbone.max_positions
        return bisect.bisect_right(range(1, most + 1), limit, key=self._positions_for)

    def generate_ids(self, max_new_tokens: int = 64, **options: Any) -> list[int]:
        """Continue behind everything read so far; see :meth:`stream`.

        Returns
        -------
        list of int
            New tokens, without the end-of-sequence token.
        """
        return self.generate(max_new_tokens, **options).ids

    def generate(self, max_new_tokens: int = 64, **options: Any) -> Generation:
        """Continue behind everything read so far; see :meth:`stream`."""
        pieces = self.stream(max_new_tokens, **options)
        while True:
            try:
                next(pieces)
            except StopIteration as end:
                return end.value

    def stream(self, max_new_tokens: int = 64, **options: Any) -> Generator[str, None, Generation]:
        """Continue behind everything read so far, yielding text as it is decided; greedy unless told otherwise.

        New tokens become part of the context. Not read are an end-of-sequence token, and the token that completes a
        stop string. Abandoned early, the session holds what was generated until then.

        Parameters
        ----------
        max_new_tokens : int
            Upper bound of new tokens; fewer where the model's positions end.
        **options
            Fields of :class:`ctxdocs.generation.GenerationOptions`.

        Raises
        ------
        InputError
            If nothing has been read, or there is no room for another token.
        """
        if self._last_logits is None:
            raise InputError("the session is empty", "feed it before generating")
        self._check_room(1)
        chosen = GenerationOptions(max_new_tokens=max_new_tokens, **options)
        reader = _Continuation(self, self._last_logits, max_new_tokens)
        try:
            result = yield from generation.stream(reader, [], chosen)
            # What completes a stop string is not read; what completes a schema's value is.
            is_read = result.finish_reason == "length" or chosen.schema is not None
            if is_read and (unread := result.ids[reader.tokens_read :]):
                with torch.no_grad():
                    self._read(torch.tensor(unread))
        finally:
            self._answered()
        return result

    def save(self, path: str | Path) -> None:
        """Write the session to a file, from which ``compressor.load_session`` goes on as if nothing had happened.

        Parameters
        ----------
        path : str or path
            A ``.safetensors`` file; one that is there is replaced.

        Raises
        ------
        StorageError
            If it cannot be written.
        """
        from ctxdocs.compressors import session_files

        session_files.save(self, Path(path))

    def _answered(self) -> None:  # noqa: B027 - for methods that compress turn by turn
        """Take note that an answer has ended."""

    def _check_room(self, tokens: int) -> None:
        backbone, needed = self.compressor.backbone, self._positions_for(tokens)
        if needed > backbone.max_positions:
            raise ContextTooLong(
                f"with {tokens} more token{'s' * (tokens != 1)} the session takes {needed} positions, "
                f"{needed - backbone.max_positions} more than {backbone.limit}",
                "reset the session, or start another one from its memory()",
            )


class _Continuation:
    """A session as generation sees a reader: one prompt, which has been read."""

    def __init__(self, session: Session, last_logits: Tensor, most: int) -> None:
        self.session = session
        self.model = session.compressor.model
        self.tokenizer = session.compressor.tokenizer
        self.tokens_read = 0
        self._last_logits = last_logits
        self._most = most

    def prefill(self, prompts: Sequence[Prompt]) -> tuple[Tensor, None]:
        """Return the logits behind what has been read, ``[1, vocabulary]``."""
        return self._last_logits[None], None

    def step(self, ids: Tensor, state: None) -> Tensor:
        """Read one more token."""
        self.tokens_read += 1
        return self.session._read(ids)

    def room(self, state: None) -> list[int]:
        """Return how many tokens may be read; generation takes one more, and here that one is read too."""
        return [self.session.room(self._most) - 1]
