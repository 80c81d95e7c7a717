"""One library and one model, used by many objects and threads of a process.

A retriever, a language model and a document compressor of one application open the same library; they get the same
:class:`~ctxdocs.library.Library`, so that its model is loaded once. Their calls come from many threads: passes through
the model are made one at a time, and calls that wait for one another are answered as one batch.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakValueDictionary

from ctxdocs import generation
from ctxdocs.cache.layout import MANIFEST
from ctxdocs.library import Library
from ctxdocs.memory import Memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ctxdocs.compressors.base import Compressor
    from ctxdocs.generation import Generation, GenerationOptions, Reader
    from ctxdocs.prompts import Prompt

_lock = threading.RLock()
_libraries: WeakValueDictionary[tuple[Any, ...], Library] = WeakValueDictionary()
_library_locks: WeakKeyDictionary[Library, threading.RLock] = WeakKeyDictionary()  # type: ignore[valid-type]
_models: WeakValueDictionary[int, SharedModel] = WeakValueDictionary()


def shared_library(library: Library | str | Path, device: str = "auto") -> Library:
    """Return a library, opened once in a process for all that ask for it; one that is open is returned as it is.

    Raises
    ------
    LibraryError
        If there is no library, or it is damaged or of a newer format.
    """
    if isinstance(library, Library):
        return library
    path = Path(library)
    manifest = path / MANIFEST
    if not manifest.is_file():
        return Library.open(path, device=device)  # says what is wrong
    with _lock:
        # A library that was deleted and made anew is another one.
        identity = manifest.stat()
        key = (path.resolve(), identity.st_ino, identity.st_mtime_ns, device)
        found = _libraries.get(key)
        if found is None:
            found = _libraries[key] = Library.open(path, device=device)
        return found


@contextmanager
def one_at_a_time(library: Library, *, with_model: bool = False) -> Iterator[None]:
    """Have a library's embedder, and if asked for its compressor, to oneself in a block."""
    with _lock:
        lock: Any = _library_locks.setdefault(library, threading.RLock())
    model_lock: Any = shared_model(library).lock if with_model else nullcontext()
    with lock, model_lock:
        yield


def shared_model(library: Library) -> SharedModel:
    """Return a library's compressor for use from many threads; it is loaded now if that has not been done."""
    with _lock:
        compressor = library.compressor
        model = _models.get(id(compressor))
        if model is None:
            model = _models[id(compressor)] = SharedModel(compressor)
        return model


class SharedModel:
    """A compressor that many threads generate with.

    Calls of :meth:`generate` that arrive while another one runs wait, and are then answered together, as far as their
    options agree. Streams take turns with them, token by token.

    Parameters
    ----------
    compressor : Compressor
        The model.
    batch_size : int
        Prompts that are read at once, at most.

    Attributes
    ----------
    lock : threading.RLock
        Held during every pass through the model. Hold it to use the compressor otherwise.
    """

    def __init__(self, compressor: Compressor, batch_size: int = 16) -> None:
        self.compressor = compressor
        self.batch_size = batch_size
        self.lock = threading.RLock()
        self._reader = _OnePassAtATime(compressor, self.lock)
        self._turn = threading.Lock()
        self._waiting: list[_Call] = []
        self._waiting_lock = threading.Lock()

    def generate(self, prompts: Sequence[Prompt], options: GenerationOptions) -> list[Generation]:
        """Continue prompts, each as if it stood alone; see :func:`ctxdocs.generation.generate`."""
        call = _Call(list(prompts), options)
        with self._waiting_lock:
            self._waiting.append(call)
        with self._turn:
            if not call.done:
                self._answer(self._taken_with(call))
        if call.error is not None:
            raise call.error
        return call.results

    def stream(self, prompt: Prompt, options: GenerationOptions) -> Generator[str, None, Generation]:
        """Continue one prompt, yielding text as it is decided; see :func:`ctxdocs.generation.stream`."""
        return generation.stream(self._reader, prompt, options)

    def _taken_with(self, call: _Call) -> list[_Call]:
        """Take a call from those that wait, and with it what fits into its batch."""
        with self._waiting_lock:
            if call in self._waiting:
                self._waiting.remove(call)
            taken, size = [call], len(call.prompts)
            for other in list(self._waiting):
                if call.joins(other) and size + len(other.prompts) <= self.batch_size:
                    self._waiting.remove(other)
                    taken.append(other)
                    size += len(other.prompts)
        return taken

    def _answer(self, calls: list[_Call]) -> None:
        prompts = [prompt for call in calls for prompt in call.prompts]
        try:
            results = self._batches(prompts, calls[0].options)
        except Exception as error:
            if len(calls) > 1:  # no call fails for what stands in another
                for call in calls:
                    self._answer([call])
            else:
                calls[0].finish([], error)
            return
        for call in calls:
            call.finish(results[: len(call.prompts)])
            results = results[len(call.prompts) :]

    def _batches(self, prompts: list[Prompt], options: GenerationOptions) -> list[Generation]:
        # Draws of a seed depend on what is drawn beside them, so that those prompts are read one by one.
        rows = 1 if _is_seeded(options) else self.batch_size
        order = sorted(range(len(prompts)), key=lambda index: -_positions(prompts[index]))
        results: dict[int, Generation] = {}
        for start in range(0, len(order), rows):
            batch = order[start : start + rows]
            answers = generation.generate(self._reader, [prompts[index] for index in batch], options)
            results.update(zip(batch, answers, strict=True))
        return [results[index] for index in range(len(prompts))]


@dataclass(eq=False)
class _Call:
    """Prompts of one caller, and in the end what became of them."""

    prompts: list[Prompt]
    options: GenerationOptions
    done: bool = False
    results: list[Generation] = field(default_factory=list)
    error: Exception | None = None

    def joins(self, other: _Call) -> bool:
        return self.options == other.options and not _is_seeded(self.options)

    def finish(self, results: list[Generation], error: Exception | None = None) -> None:
        self.results, self.error, self.done = results, error, True


class _OnePassAtATime:
    """A reader whose passes through the model exclude one another."""

    def __init__(self, reader: Reader, lock: threading.RLock) -> None:  # type: ignore[valid-type]
        self._reader = reader
        self._lock: Any = lock
        self.model: PreTrainedModel = reader.model
        self.tokenizer: PreTrainedTokenizerBase | None = reader.tokenizer

    def prefill(self, prompts: Sequence[Prompt]) -> tuple[Any, Any]:
        with self._lock:
            return self._reader.prefill(prompts)

    def step(self, ids: Any, state: Any) -> Any:
        with self._lock:
            return self._reader.step(ids, state)

    def room(self, state: Any) -> list[int]:
        return self._reader.room(state)


def _is_seeded(options: GenerationOptions) -> bool:
    return options.temperature > 0 and options.seed is not None


def _positions(prompt: Prompt) -> int:
    return sum(part.span if isinstance(part, Memory) else len(part) for part in prompt)
