"""How a context is given to a model: as a memory, as text, or not at all; and what that takes."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ctxdocs import generation
from ctxdocs.compressors.batching import batches_by_length, default_batch_tokens
from ctxdocs.errors import ContextTooLong, InputError
from ctxdocs.likelihood import Likelihood, likelihoods
from ctxdocs.memory import Memory
from ctxdocs.prompts import Prompt, begun, encode_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ctxdocs.compressors.base import Compressor

#: The ways to give a context. ``other`` is the memory of another example's context: a control.
READINGS = ("memory", "text", "none", "other")


@dataclass(frozen=True)
class Reading:
    """One way to give a context.

    Parameters
    ----------
    how : str
        One of :data:`READINGS`.
    ratio : int, optional
        Tokens per slot, for memories of methods whose ratio can be chosen; None is the compressor's own.
    """

    how: str
    ratio: int | None = None

    def __post_init__(self) -> None:
        if self.how not in READINGS:
            raise InputError(f"unknown reading {self.how!r}", f"choose among {', '.join(READINGS)}")
        if self.ratio is not None and not self.is_memory:
            raise InputError(f"reading {self.how!r} compresses nothing, so it has no ratio")

    @property
    def is_memory(self) -> bool:
        """Whether contexts are compressed."""
        return self.how in ("memory", "other")

    @property
    def name(self) -> str:
        """``"memory"``, ``"memory 8x"``, ``"text"`` ..."""
        return self.how if self.ratio is None else f"{self.how} {self.ratio}x"


@dataclass(frozen=True)
class Given:
    """The contexts of one example, as the model is given them.

    Parameters
    ----------
    sources : list of (Memory, str or torch.Tensor)
        Memories; the contexts themselves, text or token ids; or nothing.
    tokens : int
        Tokens of the contexts' text.
    slots : int
        What the model attends to in their place: memory slots, or the tokens themselves.
    nbytes : int
        Bytes of that: of the memories as they are stored, or of the keys and values of the text.
    """

    sources: list[Any]
    tokens: int
    slots: int
    nbytes: int

    @property
    def costs(self) -> dict[str, int]:
        """The three numbers by name."""
        return {"context_tokens": self.tokens, "slots": self.slots, "bytes": self.nbytes}


class ContextReader:
    """A compressor that reads contexts in one way, and counts the time it takes.

    Parameters
    ----------
    compressor : Compressor
        Compresses, reads, answers; the same object for every reading.
    reading : Reading
        How contexts are given.

    Raises
    ------
    InputError
        If the compressor has no tokenizer, or cannot compress at the ratio.
    """

    def __init__(self, compressor: Compressor, reading: Reading) -> None:
        if compressor.tokenizer is None:
            raise InputError(
                f"the model {compressor.name_or_path or compressor.method} has no tokenizer, and evaluation reads text",
                "put the tokenizer's files beside its weights",
            )
        self.compressor = compressor
        self.reading = reading
        self.tokenizer: PreTrainedTokenizerBase = compressor.tokenizer
        self.settings = {} if reading.ratio is None else compressor.settings_at_ratio(reading.ratio)
        #: Seconds spent on compressing, and on everything else the model does.
        self.seconds = {"compress": 0.0, "read": 0.0}

    def give(self, contexts: Sequence[Sequence[str | Tensor]]) -> list[Given]:
        """Prepare the contexts of several examples; what several share is compressed once.

        Parameters
        ----------
        contexts : sequence of sequences of (str or torch.Tensor)
            For every example its contexts: texts, or token ids (1-D).
        """
        lengths = [sum(len(self.ids(context)) for context in row) for row in contexts]
        if self.reading.how == "none":
            return [Given([], tokens, 0, 0) for tokens in lengths]
        if self.reading.how == "text":
            return [Given(list(row), n, n, n * self.bytes_per_token) for row, n in zip(contexts, lengths, strict=True)]
        keys = [[_key(context) for context in row] for row in contexts]
        distinct = dict(zip(itertools.chain(*keys), itertools.chain(*contexts), strict=True))
        with self.timed("compress"), torch.no_grad(), self.configured():
            memories = self.compressor.compress_ids([self.ids(one) for one in distinct.values()]) if distinct else []
        by_key = dict(zip(distinct, memories, strict=True))
        given = []
        for row, tokens in zip(keys, lengths, strict=True):
            own = [by_key[key] for key in row]
            slots, nbytes = (sum(getattr(memory, name) for memory in own) for name in ("slots", "nbytes"))
            given.append(Given(own, tokens, slots, nbytes))
        return given

    def ask(self, given: Given, question: str) -> Prompt:
        """Return the prompt in which a library would ask the question."""
        return self.compressor.prompt_format.build(question, given.sources, self.tokenizer, self.compressor.prefix_ids)

    def behind(self, given: Given, ending: str | Tensor) -> Prompt:
        """Return contexts and ending one behind the other, and nothing between them; texts are tokenised as one."""
        prompt: Prompt = []
        for is_text, group in itertools.groupby([*given.sources, ending], key=lambda part: isinstance(part, str)):
            parts = list(group)
            prompt += [encode_text(self.tokenizer, "".join(parts))] if is_text else parts
        parts = [part for part in prompt if isinstance(part, Memory) or len(part)]
        return begun(parts, self.tokenizer, self.compressor.prefix_ids)

    def generate(
        self, prompts: Sequence[Prompt], max_new_tokens: Sequence[int], stop: tuple[str, ...] | None = None
    ) -> list[str]:
        """Continue prompts greedily, each with room for its own number of new tokens; return the texts, stripped.

        Raises
        ------
        ContextTooLong
            If a prompt and its answer need more positions than the model has.
        """
        for prompt, tokens in zip(prompts, max_new_tokens, strict=True):
            self._check_room(prompt, tokens)
        stop = self.compressor.prompt_format.stop if stop is None else stop
        texts: dict[int, str] = {}
        with self.timed("read"):
            for tokens in sorted(set(max_new_tokens)):
                options = generation.GenerationOptions(max_new_tokens=tokens, stop=stop)
                alike = [index for index, wanted in enumerate(max_new_tokens) if wanted == tokens]
                lengths = [_positions(prompts[index]) + tokens for index in alike]
                for batch in batches_by_length(lengths, self._batch_tokens):
                    chosen = [alike[place] for place in batch]
                    results = generation.generate(self.compressor, [prompts[index] for index in chosen], options)
                    texts.update((index, result.text.strip()) for index, result in zip(chosen, results, strict=True))
        return [texts[index] for index in range(len(prompts))]

    def likelihoods(self, prompts: Sequence[Prompt], continuations: Sequence[Tensor]) -> list[Likelihood]:
        """Score continuations behind prompts; see :func:`ctxdocs.likelihood.likelihoods`."""
        for prompt, continuation in zip(prompts, continuations, strict=True):
            self._check_room(prompt, len(continuation))
        with self.timed("read"):
            return likelihoods(self.compressor, prompts, continuations, batch_tokens=self._batch_tokens)

    def ids(self, context: str | Tensor) -> Tensor:
        """Return a context's token ids; nothing in a text is taken for a special token."""
        return encode_text(self.tokenizer, context) if isinstance(context, str) else context

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Count the time of the block as spent on ``"compress"`` or on ``"read"``."""
        device = self.compressor.backbone.device
        start = time.perf_counter()
        yield
        if device.type == "cuda":  # calls return before the device is done
            torch.cuda.synchronize(device)
        self.seconds[what] += time.perf_counter() - start

    def configured(self) -> Any:
        """Return a context manager under which the compressor has the reading's ratio."""
        return self.compressor.configured(**self.settings)

    def warm_up(self) -> None:
        """Do everything once, so that no measured time holds what only the first call takes."""
        prompts = [self.behind(given, ".") for given in self.give([["A word or two, to begin with."]])]
        self.generate(prompts, [2])
        self.likelihoods(prompts, [self.ids(" more")])
        self.seconds = dict.fromkeys(self.seconds, 0.0)

    @functools.cached_property
    def bytes_per_token(self) -> int:
        """Bytes of the keys and values of one token of text."""
        with torch.no_grad():
            _, state = self.compressor.prefill([[torch.zeros(1, dtype=torch.long)]])
        layers: list[Any] = [layer for layer in state.cache.layers if getattr(layer, "keys", None) is not None]
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)

    @property
    def _batch_tokens(self) -> int:
        return default_batch_tokens(self.compressor.backbone.device)

    def _check_room(self, prompt: Prompt, tokens: int) -> None:
        needed, limit = _positions(prompt) + tokens, self.compressor.backbone.max_positions
        if needed > limit:
            raise ContextTooLong(
                f"the prompt and {tokens} tokens behind it take {needed} positions, {needed - limit} more than the "
                f"model's {limit}",
                "choose a higher ratio or shorter contexts",
            )


def _positions(prompt: Prompt) -> int:
    return sum(part.span if isinstance(part, Memory) else len(part) for part in prompt)


def _key(context: str | Tensor) -> str | tuple[int, ...]:
    return context if isinstance(context, str) else tuple(context.tolist())
