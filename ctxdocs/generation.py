"""Generation from prompts with memories: greedy or sampled, batched or streamed, written once for every method."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ctxdocs.checks import number, whole_number, whole_numbers, words
from ctxdocs.errors import InputError
from ctxdocs.memory import Memory
from ctxdocs.prompts import Prompt
from ctxdocs.structure import StructuredText, checked_schema, masked

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Reader(Protocol):
    """What generation needs of a compressor."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None

    def prefill(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Any]:
        """Read prompts; return the logits of each one's last token ``[batch, vocabulary]`` and a state."""

    def step(self, ids: Tensor, state: Any) -> Tensor:
        """Read one more token per prompt (``[batch]``); return logits ``[batch, vocabulary]``."""

    def room(self, state: Any) -> list[int]:
        """Return how many more tokens each prompt's positions leave room for."""


@dataclass(frozen=True)
class GenerationOptions:
    """How to choose the next tokens and when to stop.

    Parameters
    ----------
    max_new_tokens : int
        Upper bound of new tokens.
    temperature : float
        0 is greedy; above, logits are divided by it and a token is drawn.
    top_k : int
        Draw among the ``top_k`` likeliest tokens; 0 is all.
    top_p : float
        Draw among the likeliest tokens that together hold this probability.
    repetition_penalty : float
        Above 1, tokens that were generated already become less likely (arXiv 1909.05858).
    seed : int, optional
        Seed of the draws; the same seed gives the same text on the same machine.
    stop : tuple of str
        Generation ends in front of the first of these strings.
    eos_token_ids : tuple of int, optional
        Tokens that end generation; None takes those of the model's generation config, and ``()`` none.
    schema : mapping, optional
        A JSON schema. What is written is a JSON value that keeps to it and ends with it: ``stop`` and
        ``eos_token_ids`` are not looked for, and the finish reason "stop" says that the value is whole. When tokens
        run short it is brought to its end; "length" says that it was cut off all the same, since they are too few for
        the schema. ``{"type": "object"}`` is any JSON object. Needs ``ctxdocs[structured]``; see
        :mod:`ctxdocs.structure`.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    eos_token_ids: tuple[int, ...] | None = None
    schema: Mapping[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("max_new_tokens", "top_k", *(["seed"] * (self.seed is not None))):
            whole_number(name, getattr(self, name))
        for name in ("temperature", "top_p", "repetition_penalty"):
            number(name, getattr(self, name))
        words("stop", self.stop)
        if self.eos_token_ids is not None:
            whole_numbers("eos_token_ids", self.eos_token_ids)
        checks = {
            "max_new_tokens must be at least 1": self.max_new_tokens >= 1,
            "temperature must not be negative": self.temperature >= 0,
            "top_k must not be negative": self.top_k >= 0,
            "top_p must lie in (0, 1]": 0 < self.top_p <= 1,
            "repetition_penalty must be positive": self.repetition_penalty > 0,
            "stop strings must not be empty": all(self.stop),
        }
        for message, holds in checks.items():
            if not holds:
                raise InputError(message)
        if self.schema is not None:
            checked_schema(self.schema)

    @property
    def choice(self) -> tuple[object, ...]:
        """What decides which token follows: prompts can be continued side by side if it is the same for all.

        Schemas may differ: each row has its own.
        """
        if not self.temperature:
            return (0.0, self.repetition_penalty)
        return (self.temperature, self.repetition_penalty, self.top_k, self.top_p, self.seed)


@dataclass
class Generation:
    """What was generated for one prompt.

    Parameters
    ----------
    ids : list of int
        New tokens, without the end-of-sequence token; with stop strings, whatever was decided before stopping.
    text : str
        The new text, cut in front of a stop string; empty without a tokenizer.
    finish_reason : {"stop", "length"}
        An end-of-sequence token or stop string or, with a schema, the end of the value; or the bound on new tokens (or
        on the model's positions).
    prompt_tokens, memory_slots : int
        Text tokens and memory slots that were read.
    time_to_first_token, seconds : float
        From the call to the first token, and to the last.
    """

    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = "length"
    prompt_tokens: int = 0
    memory_slots: int = 0
    time_to_first_token: float = 0.0
    seconds: float = 0.0


def generate(reader: Reader, prompts: Sequence[Prompt], options: GenerationOptions | None = None) -> list[Generation]:
    """Continue a batch of prompts, each as if it stood alone.

    Parameters
    ----------
    reader : Reader
        A compressor.
    prompts : sequence of Prompt
        Parts: 1-D token ids or memories.
    options : GenerationOptions, optional
        Greedy with 64 new tokens when left out.

    Returns
    -------
    list of Generation
        In the order of ``prompts``.
    """
    decoding = Decoding(reader, prompts, [options or GenerationOptions()] * len(prompts))
    while not decoding.is_over:
        decoding.advance()
    return [row.result for row in decoding.rows]


def stream(
    reader: Reader, prompt: Prompt, options: GenerationOptions | None = None
) -> Generator[str, None, Generation]:
    """Continue one prompt, yielding text as it is decided.

    A piece is held back while it could still become part of a stop string or of an unfinished character, so the
    pieces joined are the ``text`` that :func:`generate` returns. The generator's return value is the `Generation`.
    """
    decoding = Decoding(reader, [prompt], [options or GenerationOptions()])
    (row,) = decoding.rows
    while not decoding.is_over:
        decoding.advance()
        if piece := row.take():
            yield piece
    return row.result


class Decoding:
    """Prompts that are continued side by side, a token of each at a time.

    Parameters
    ----------
    reader : Reader
        A compressor.
    prompts : sequence of Prompt
        Parts: 1-D token ids or memories.
    options : sequence of GenerationOptions
        One for every prompt, all of one :attr:`GenerationOptions.choice`.

    Attributes
    ----------
    rows : list of Row
        What is written behind each prompt.
    """

    def __init__(self, reader: Reader, prompts: Sequence[Prompt], options: Sequence[GenerationOptions]) -> None:
        if len({each.choice for each in options}) > 1:
            raise InputError("prompts that are continued side by side choose their tokens alike")
        self.rows = [Row(reader, each, prompt) for each, prompt in zip(options, prompts, strict=True)]
        self._reader = reader
        self._prompts = prompts
        self._options = options
        self._live = list(self.rows)
        self._start = 0.0
        self._state: Any = None
        self._chosen: Any = None
        self._choose: _Chooser | None = None

    @property
    def is_over(self) -> bool:
        """Whether every row has ended."""
        return all(row.finished for row in self._live)

    def advance(self) -> None:
        """Decide one more token of every row; the first time, read the prompts."""
        with torch.no_grad():
            if self._choose is None:
                self._start = time.perf_counter()
                logits, self._state = self._reader.prefill(self._prompts)
                for row, room in zip(self._live, self._reader.room(self._state), strict=True):
                    row.limit = min(row.limit, room + 1)  # the last new token is never read
                self._choose = _Chooser(self._options[0], len(self._live), logits.device)
            else:
                logits = self._reader.step(self._chosen, self._state)
        texts = [row.structured for row in self._live]
        if any(texts):
            logits = masked(logits, texts, [row.limit - len(row.result.ids) for row in self._live])
        self._chosen = self._choose(logits)
        now = time.perf_counter() - self._start
        for row, token in zip(self._live, self._chosen.tolist(), strict=True):
            row.add(token, now)

    def drop_ended(self) -> None:
        """Carry rows that have ended no further; what later rows draw depends on it, what they are given does not."""
        kept = [index for index, row in enumerate(self._live) if not row.finished]
        if self._choose is None or not kept or len(kept) == len(self._live):
            return
        self._live = [self._live[index] for index in kept]
        which = torch.tensor(kept, device=self._chosen.device)
        self._chosen = self._chosen[which]
        self._choose.seen = self._choose.seen[which]
        self._state.keep(which)


class _Chooser:
    """Chooses the next token of every row; greedy, or drawn after transformers' own logits processors."""

    def __init__(self, options: GenerationOptions, rows: int, device: torch.device) -> None:
        from transformers.generation import logits_process as process

        self.processors = process.LogitsProcessorList()
        self.sampled = options.temperature > 0
        if options.repetition_penalty != 1:
            self.processors.append(process.RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
        if self.sampled:
            self.processors.append(process.TemperatureLogitsWarper(float(options.temperature)))
            if options.top_k:
                self.processors.append(process.TopKLogitsWarper(options.top_k))
            if options.top_p < 1:
                self.processors.append(process.TopPLogitsWarper(options.top_p))
        self.seen = torch.empty(rows, 0, dtype=torch.long, device=device)
        self.random = torch.Generator(device)
        if options.seed is None:
            self.random.seed()
        else:
            self.random.manual_seed(options.seed)

    def __call__(self, logits: Tensor) -> Tensor:
        scores = self.processors(self.seen, logits.float())  # type: ignore[arg-type]
        if self.sampled:
            chosen = torch.multinomial(scores.softmax(-1), 1, generator=self.random)[:, 0]
        else:
            chosen = scores.argmax(-1)
        self.seen = torch.cat([self.seen, chosen[:, None]], dim=1)
        return chosen


class Row:
    """Collects one row's tokens, turns them into text, and knows when to stop."""

    def __init__(self, reader: Reader, options: GenerationOptions, prompt: Prompt) -> None:
        self.tokenizer = reader.tokenizer
        self.stop = options.stop
        self.eos = _eos_token_ids(reader) if options.eos_token_ids is None else set(options.eos_token_ids)
        self.structured: StructuredText | None = None
        if options.schema is not None:
            if self.tokenizer is None:
                raise InputError("structured answers need a tokenizer, and this compressor has none")
            self.structured = StructuredText(options.schema, self.tokenizer, _eos_token_ids(reader))
            self.stop, self.eos = (), self.structured.eos_token_ids
        if self.stop and self.tokenizer is None:
            raise InputError("stop strings need a tokenizer, and this compressor has none")
        memories = [part for part in prompt if isinstance(part, Memory)]
        self.result = Generation(
            prompt_tokens=sum(len(part) for part in prompt if not isinstance(part, Memory)),
            memory_slots=sum(memory.slots for memory in memories),
        )
        self.limit = options.max_new_tokens
        self.finished = False
        self.taken = 0
        self.settled_ids = 0
        self.settled_text = ""

    def add(self, token: int, now: float) -> None:
        """Receive the next token, decided ``now`` seconds after the call."""
        if self.finished:
            return
        result = self.result
        if not result.time_to_first_token:
            result.time_to_first_token = now
        result.seconds = now
        if self.structured is not None and self.structured.is_stuck:
            self._finish("length")
            return
        if token in self.eos:
            self._finish("stop")
            return
        result.ids.append(token)
        if self.structured is not None:
            self.structured.add(token)
            result.text = self.structured.text
            if self.structured.is_complete:
                self._finish("stop")
        elif self.tokenizer is not None:
            self._decode()
            cuts = [cut for text in self.stop if (cut := result.text.find(text)) >= 0]
            if cuts:
                result.text = result.text[: min(cuts)]
                self._finish("stop")
        if len(result.ids) == self.limit and not self.finished:
            self._finish("length")

    def take(self) -> str:
        """Return text that is certain by now and was not taken before."""
        text = self.result.text
        end = len(text)
        if not self.finished:
            end -= max(_overlap(text, stop) for stop in self.stop) if self.stop else 0
            while end and text[end - 1] == "\ufffd":  # an unfinished character
                end -= 1
        piece = text[self.taken : end]
        self.taken = max(self.taken, end)
        return piece

    def end(self) -> None:
        """Have nothing more written: nobody waits for it."""
        self.finished = True
        self.structured = None

    def _decode(self) -> None:
        # Tokens before the last line break or space no longer change how later ones decode: only the tail is
        # decoded again, so that a long text does not cost quadratic time.
        tokenizer: Any = self.tokenizer
        tail = tokenizer.decode(self.result.ids[self.settled_ids :], skip_special_tokens=True)
        self.result.text = self.settled_text + tail
        if len(self.result.ids) - self.settled_ids >= 32 and tail.endswith("\n"):
            self.settled_ids, self.settled_text = len(self.result.ids), self.result.text

    def _finish(self, reason: str) -> None:
        self.finished = True
        self.structured = None
        self.result.finish_reason = reason


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` with which ``stop`` begins."""
    return next((n for n in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def _eos_token_ids(reader: Reader) -> set[int]:
    config = reader.model.generation_config
    ids = config.eos_token_id if config is not None else None
    if ids is None and reader.tokenizer is not None:
        ids = reader.tokenizer.eos_token_id
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)
