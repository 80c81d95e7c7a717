"""Growing contexts of CCM: compressed turn by turn, or as they leave a sliding window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ctxdocs.checks import whole_number
from ctxdocs.compressors.sessions import Session
from ctxdocs.errors import InputError
from ctxdocs.memory import KVMemory, Memory
from ctxdocs.modeling.kv import KeysValues

if TYPE_CHECKING:
    from transformers import Cache

    from ctxdocs.compressors.ccm import CCM


@dataclass(frozen=True, eq=False)
class Context:
    """What a batch of contexts has been compressed to so far.

    Parameters
    ----------
    sink : KeysValues or None
        The first token's, where it is kept.
    memory : KeysValues or None
        Those of special tokens; None before the first step.
    steps : int
        Segments compressed.
    """

    sink: KeysValues | None = None
    memory: KeysValues | None = None
    steps: int = 0

    def slots(self) -> KeysValues | None:
        """Return the sink and the memory side by side."""
        parts = [part for part in (self.sink, self.memory) if part is not None]
        return KeysValues.join(*parts) if parts else None

    def rows(self, index: Tensor) -> Context:
        """Return some rows of the batch."""
        sink, memory = (None if part is None else part.rows(index) for part in (self.sink, self.memory))
        return Context(sink, memory, self.steps)


@dataclass(frozen=True)
class Window:
    """A sliding window over an endless stream; the defaults are the published settings.

    Parameters
    ----------
    window_size : int
        Cached slots (sink, memory and text) beyond which the oldest text is compressed.
    comp_size : int
        Tokens that are compressed at once.
    comp_cache_size : int
        Slots of memory; the oldest are dropped when there are more.
    sink_size : int
        First tokens of the stream, kept for good.
    keeps : str
        ``"memory"``; or ``"text"``, a baseline (StreamingLLM, arXiv 2309.17453) that compresses nothing and keeps
        as many of the latest tokens instead.
    """

    window_size: int = 160
    comp_size: int = 64
    comp_cache_size: int = 8
    sink_size: int = 1
    keeps: str = "memory"

    def __post_init__(self) -> None:
        for name in ("window_size", "comp_size", "comp_cache_size", "sink_size"):
            whole_number(name, getattr(self, name))


class CCMSession(Session):
    """A conversation: a turn stays as it is while it runs, and is compressed when the next one begins.

    A turn is what is fed and the answer generated behind it. :meth:`feed` after :meth:`generate_ids` begins the next
    one, and so does :meth:`end_turn`. A concatenated memory grows by ``num_comp_tokens`` slots per turn; a merged one
    does not, and stays apart from the memories that the session started from.

    Parameters
    ----------
    compressor : CCM
        Reads and compresses.
    memories : sequence of Memory
        What the context starts from.
    segment_tokens : int
        A longer turn is compressed in several steps.
    """

    _running: list[Tensor]
    _cache: Cache

    def __init__(self, compressor: CCM, memories: Sequence[Memory], segment_tokens: int) -> None:
        if segment_tokens < 1:
            raise InputError(f"a segment holds at least one token, got segment_tokens={segment_tokens}")
        self.segment_tokens = segment_tokens
        super().__init__(compressor, memories)

    @property
    def options(self) -> dict[str, Any]:
        """``segment_tokens``."""
        return {"segment_tokens": self.segment_tokens}

    def reset(self) -> None:
        """Go back to the memories the session started from."""
        backbone, given = self.compressor.backbone, []
        self._start = 0
        for memory in self.memories:
            if isinstance(memory, KVMemory):
                here = memory.to(backbone.device, backbone.dtype)
                given.append(KeysValues(here.keys[:, None], here.values[:, None], (self._start + here.positions)[None]))
            self._start += memory.span
        self._given = KeysValues.join(*given) if given else None
        self.tokens_seen = 0
        self._context = Context()
        self._first: KeysValues | None = None
        self._last_logits = None
        self._turn_is_over = False
        self._open()

    def feed(self, ids: Sequence[int] | Tensor) -> Tensor:  # type: ignore[override]  # no options
        """Read token ids; return their logits ``[len(ids), vocabulary]``. Ends a turn that has been answered."""
        checked = self.compressor.checked_ids(ids, "what is fed")
        self._check_room(len(checked))
        if self._turn_is_over:
            self.end_turn()
        return self._read(checked)

    def _answered(self) -> None:
        self._turn_is_over = True

    def end_turn(self) -> None:
        """Compress the running turn, if there is one."""
        self._compress()
        self._turn_is_over = False

    def memory(self) -> Memory:
        """Return everything as one memory, the running turn compressed; the session goes on unchanged."""
        span = self._start + self.tokens_seen
        source_tokens = self.tokens_seen + sum(memory.source_tokens for memory in self.memories)
        return self.compressor.as_memory(self._slots(self._closed()), span, source_tokens)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the memory of past turns, and the running turn's text."""
        empty = torch.empty(0, dtype=torch.long)
        tensors = {"running": torch.cat([empty, *self._running])}
        parts = {"sink": self._context.sink, "memory": self._context.memory, "first": self._first}
        for name, part in parts.items():
            tensors |= _tensors(name, part)
        if self._last_logits is not None:
            tensors["last_logits"] = self._last_logits
        values = {"tokens_seen": self.tokens_seen, "steps": self._context.steps, "turn_is_over": self._turn_is_over}
        return tensors, values

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Read the running turn again behind the memory of past turns."""
        sink, memory, self._first = (_of(tensors, name) for name in ("sink", "memory", "first"))
        self._context = Context(sink, memory, values["steps"])
        self._open()
        running = tensors["running"].cpu()
        if len(running):
            self._extend(running, self._cache, values["tokens_seen"] - len(running))
            self._running = [running]
        self.tokens_seen, self._turn_is_over = values["tokens_seen"], values["turn_is_over"]
        self._last_logits = tensors.get("last_logits")

    def _slots(self, context: Context) -> KeysValues | None:
        parts = [part for part in (self._given, context.slots()) if part is not None]
        return KeysValues.join(*parts) if parts else None

    def _compress(self) -> None:
        self._context = self._closed()
        self._open()

    def _open(self) -> None:
        self._running = []
        self._cache = _cache(self.compressor, self._slots(self._context))

    def _read(self, ids: Tensor) -> Tensor:  # type: ignore[override]  # no options
        logits = []
        while len(ids):
            running = sum(map(len, self._running))
            if running >= self.segment_tokens:
                self._compress()
                running = 0
            room = self.segment_tokens - running
            piece, ids = ids[:room], ids[room:]
            logits.append(self.compressor.backbone.head(self._extend(piece, self._cache, self.tokens_seen)[0]))
            self._running.append(piece.cpu())
            self.tokens_seen += len(piece)
        self._last_logits = logits[-1][-1]
        return torch.cat(logits)

    def _extend(self, ids: Tensor, cache: Cache, seen: int) -> Tensor:
        """Run ids behind a cache, at the places behind ``seen`` tokens of the session."""
        first = self._start + seen
        positions = torch.arange(first, first + len(ids), device=self.compressor.backbone.device)[None]
        states, written = self.compressor.run(self.compressor.backbone.embed(ids)[None], positions, cache=cache)
        # Memories that a session starts from bring a sink of their own.
        if not seen and self._given is None:
            self._first = written.part(0, 1)
        return states

    def _positions_for(self, tokens: int) -> int:
        return self._start + self.tokens_seen + tokens + self.compressor.num_comp_tokens

    def _closed(self) -> Context:
        """Return the context with the running turn compressed."""
        if not self._running:
            return self._context
        cache = self._cache
        if not self.compressor.is_recurrent:
            # Such segments are compressed as if no memory had been there.
            running = torch.cat(self._running)
            cache = _cache(self.compressor, self._context.sink)
            self._extend(running, cache, self.tokens_seen - len(running))
        new = self.compressor.write(cache, self._start + self.tokens_seen)
        return self.compressor.next_context(self._context, new, self._first)


class CCMStream(Session):
    """An endless stream behind a sliding window: ``[sink, memory, latest text]`` never outgrows the window.

    Keys are kept before the rotary embedding and placed anew after every compression: slot i of the cache stands at
    position i.

    Parameters
    ----------
    compressor : CCM
        Reads and compresses; one of the recurrent types.
    window : Window
        Sizes.
    """

    def __init__(self, compressor: CCM, window: Window) -> None:
        if not compressor.is_recurrent:
            raise InputError(f"attn_type {compressor.attn_type!r} cannot stream", "it reads no memory as it goes")
        if window.keeps not in ("memory", "text"):
            raise InputError(f"a window keeps 'memory' or 'text', not {window.keeps!r}")
        if window.sink_size < 0 or window.comp_size < 1 or window.comp_cache_size < compressor.num_comp_tokens:
            raise InputError(
                f"unusable sizes: {window}",
                f"the memory must hold at least the {compressor.num_comp_tokens} special tokens of one step",
            )
        slots = compressor.num_comp_tokens if compressor.merges else window.comp_cache_size
        if window.window_size + 1 < (smallest := window.sink_size + slots + window.comp_size):
            raise InputError(
                f"a window of {window.window_size} slots is too small: it compresses when it holds one more, and then "
                f"sink, memory and comp_size take {smallest}"
            )
        if (needed := window.window_size + 1 + compressor.num_comp_tokens) > compressor.backbone.max_positions:
            raise InputError(f"the window needs {needed} positions, the model has {compressor.backbone.max_positions}")
        self.window = window
        super().__init__(compressor)

    @property
    def options(self) -> dict[str, Any]:
        """``window``."""
        return {"window": asdict(self.window)}

    def reset(self) -> None:
        """Forget everything."""
        self.tokens_seen = 0
        self.compressions = 0
        #: Sink, memory and text, keys before the rotary embedding; None before the first token.
        self.held: KeysValues | None = None
        self._last_logits = None
        self._cache = _cache(self.compressor, None)

    @property
    def cached(self) -> int:
        """Slots in the cache; the next token's position."""
        return 0 if self.held is None else self.held.slots

    def memory(self) -> Memory:
        """Return everything as one memory of bounded size; unless the window keeps text, its text is compressed too.

        Slots stand side by side and span as many positions. The stream goes on unchanged.
        """
        closed, text = self.held, self.cached - self.window.sink_size - self._slots_after(self.compressions)
        if closed is not None and text > 0 and self.window.keeps == "memory":
            closed = self._compressed(closed, text, "memory")
        return self.compressor.as_memory(closed, 0 if closed is None else closed.slots, self.tokens_seen)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what is held."""
        tensors = _tensors("held", self.held)
        if self._last_logits is not None:
            tensors["last_logits"] = self._last_logits
        return tensors, {"tokens_seen": self.tokens_seen, "compressions": self.compressions}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Put what is held back into the cache."""
        self.held = _of(tensors, "held")
        self._cache = _cache(self.compressor, self.held)
        self.tokens_seen, self.compressions = values["tokens_seen"], values["compressions"]
        self._last_logits = tensors.get("last_logits")

    def _positions_for(self, tokens: int) -> int:
        return 0  # bounded, and checked when the stream began

    def _read(self, ids: Tensor) -> Tensor:  # type: ignore[override]  # no options
        # Tokens are read up to the next compression in one pass, which gives what one by one would.
        backbone, logits = self.compressor.backbone, []
        while len(ids):
            room = min(max(self.window.window_size + 1 - self.cached, 1), len(ids))
            piece, ids = ids[:room], ids[room:]
            positions = torch.arange(self.cached, self.cached + room, device=backbone.device)[None]
            states, written = self.compressor.run(backbone.embed(piece)[None], positions, cache=self._cache)
            logits.append(backbone.head(states[0]))
            self.held = written if self.held is None else KeysValues.join(self.held, written)
            self.tokens_seen += room
            if self.cached > self.window.window_size:
                self.held = self._compressed(self.held, self.window.comp_size, self.window.keeps)
                self.compressions += 1
                self._cache = _cache(self.compressor, self.held)
        self._last_logits = logits[-1][-1]
        return torch.cat(logits)

    def _compressed(self, held: KeysValues, tokens: int, keeps: str) -> KeysValues:
        """Return what is held after compressing the oldest ``tokens`` tokens of text."""
        held, sink, old = _placed(held), self.window.sink_size, self._slots_after(self.compressions)
        end = sink + old + tokens
        if keeps == "text":  # as many of the latest tokens as there would be slots and tokens
            kept = self._slots_after(self.compressions + 1) + held.slots - end
            return _placed(KeysValues.join(held.part(0, sink), held.part(held.slots - kept)))
        new = self.compressor.write(held.part(0, end).cache(self.compressor.model), end)
        memory = self.compressor.fold(held.part(sink, sink + old) if old else None, new, self.compressions)
        over = max(memory.slots - self.window.comp_cache_size, 0)
        return _placed(KeysValues.join(held.part(0, sink), memory.part(over), held.part(end)))

    def _slots_after(self, compressions: int) -> int:
        """Return the slots of memory after so many compressions."""
        groups = min(compressions, 1) if self.compressor.merges else compressions
        return min(self.compressor.num_comp_tokens * groups, self.window.comp_cache_size)


def _placed(slots: KeysValues) -> KeysValues:
    """Put slot i at position i."""
    positions = torch.arange(slots.slots, device=slots.positions.device)[None]
    return KeysValues(slots.keys, slots.values, positions)


def _cache(compressor: CCM, slots: KeysValues | None) -> Cache:
    from transformers import DynamicCache

    return DynamicCache() if slots is None else slots.cache(compressor.model)


def _tensors(name: str, slots: KeysValues | None) -> dict[str, Tensor]:
    """Return the tensors of slots by name, none where there are none; :func:`_of` puts them together again."""
    if slots is None:
        return {}
    return {f"{name}.keys": slots.keys, f"{name}.values": slots.values, f"{name}.positions": slots.positions}


def _of(tensors: Mapping[str, Tensor], name: str) -> KeysValues | None:
    if f"{name}.keys" not in tensors:
        return None
    return KeysValues(tensors[f"{name}.keys"], tensors[f"{name}.values"], tensors[f"{name}.positions"])
