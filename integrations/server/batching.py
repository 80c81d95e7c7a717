"""Requests answered together: one thread has the model, and writes several answers a token at a time.

Requests that choose their tokens alike and arrive together form a batch. A request that arrives later does not wait for
the batches in progress: it begins one of its own, and the batches take turns, a token each. So that a batch costs no
more than what is still wanted of it, answers that have ended, or that nobody waits for any more, leave it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from ctxdocs.generation import Decoding, Row
from ctxdocs.integrations.server.errors import RequestError, busy, closing, of_exception
from ctxdocs.integrations.server.questions import Prompting

if TYPE_CHECKING:
    from ctxdocs.integrations.server.jobs import Job
    from ctxdocs.integrations.server.settings import Settings
    from ctxdocs.library import Library

T = TypeVar("T")

_log = logging.getLogger(__name__)

# Batches in progress at once: each reads its own weights of the model, so that many small ones cost more than few.
_BATCHES = 4
# While answers are written, other work for the model gets its turn after this many tokens of each.
_STEPS_BETWEEN_ERRANDS = 4


@dataclass(eq=False)
class _Batch:
    """Answers that are written side by side, and what is left of them."""

    decoding: Decoding
    answers: list[tuple[Job, Row]]


class Engine:
    """The thread that has the model.

    Parameters
    ----------
    library : Library
        Searched, and read by its compressor.
    settings : Settings
        Batch size, length of the queue, how long to gather.

    Attributes
    ----------
    on_answered : callable
        Called in the model's thread with every job that was answered to its end.
    """

    def __init__(self, library: Library, settings: Settings) -> None:
        self.library = library
        self.settings = settings
        self.prompting = Prompting(library)
        self.on_answered: Callable[[Job], None] = lambda job: None
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._errands: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._batches: list[_Batch] = []
        self._is_closing = False
        self._seconds_per_answer = 1.0
        self._steps = 0
        self._thread = threading.Thread(target=self._run, name="ctxdocs-model", daemon=True)

    # For other threads.

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Answers that are being written."""
        return sum(len(batch.answers) for batch in self._batches)

    @property
    def is_closing(self) -> bool:
        """Whether nothing new is taken."""
        return self._is_closing

    def submit(self, jobs: Sequence[Job]) -> None:
        """Have jobs answered, all or none.

        Raises
        ------
        RequestError
            If too many wait already, or the server is shutting down.
        """
        with self._changed:
            self._check_open(len(jobs))
            self._waiting.extend(jobs)
            self._changed.notify()

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Have a function called in the model's thread, between tokens; it should be quick.

        Raises
        ------
        RequestError
            As :meth:`submit`.
        """
        return self._enlisted(function, 1)

    def _enlisted(self, function: Callable[[], T], count: int) -> Future[T]:
        future: Future[T] = Future()
        with self._changed:
            self._check_open(count)
            self._errands.append((function, future))
            self._changed.notify()
        return future

    def lend(self, function: Callable[[], T]) -> Future[T]:
        """Like :meth:`call`, for work of the server's own: it may always wait."""
        return self._enlisted(function, 0)

    def refuse(self) -> None:
        """Take nothing new, and send away what waits; answers that have been begun are written to their end."""
        with self._changed:
            self._is_closing = True
            waiting = list(self._waiting)
            self._waiting.clear()
            self._changed.notify()
        for job in waiting:
            job.finish(closing())

    def close(self, seconds: float | None = None) -> None:
        """Refuse, and wait until what has been begun is done."""
        self.refuse()
        if self._thread.is_alive():
            self._thread.join(seconds)

    def _check_open(self, count: int) -> None:
        if self._is_closing:
            raise closing()
        ahead = len(self._waiting) + len(self._errands)
        if count and ahead + count > self.settings.queue_size:
            seconds = self._seconds_per_answer * (ahead + 1) / self.settings.batch_size
            raise busy(f"{ahead} requests are waiting", max(1, min(60, round(seconds))))

    # In the model's thread.

    def _run(self) -> None:
        while self._wait():
            for jobs in self._gathered():
                self._begin(jobs)
            for batch in list(self._batches):
                self._advance(batch)
            self._run_errand()

    def _wait(self) -> bool:
        """Wait for something to do; False when nothing is left and nothing more will come."""
        with self._changed:
            while not (self._waiting or self._errands or self._batches):
                if self._is_closing:
                    return False
                self._changed.wait()
            if not self._batches and not self._errands:
                full = self.settings.batch_size
                self._changed.wait_for(
                    lambda: len(self._waiting) >= full or self._is_closing, self.settings.gather_seconds
                )
        return True

    def _gathered(self) -> list[list[Job]]:
        """Take what there is room for out of the queue, in batches; the first in the queue is in the first."""
        groups: list[list[Job]] = []
        with self._changed:
            self._waiting = deque(job for job in self._waiting if job.is_wanted)
            room = self.settings.batch_size - self.running
            while self._waiting and room > 0 and len(self._batches) + len(groups) < _BATCHES:
                first = self._waiting[0]
                group = [job for job in self._waiting if job is first or _go_together(first, job)][:room]
                room -= len(group)
                taken = set(map(id, group))
                self._waiting = deque(job for job in self._waiting if id(job) not in taken)
                groups.append(group)
        return groups

    def _begin(self, jobs: list[Job]) -> None:
        now = time.perf_counter()
        try:
            prompts, options = [], []
            found = self.prompting.found([job.question for job in jobs])
            for job, hits in zip(jobs, found, strict=True):
                laid = self.prompting.lay_out(job.question, hits)
                job.take_up(laid.sources, now)
                prompts.append(laid.prompt)
                stop = tuple(dict.fromkeys([*job.options.stop, *laid.stop]))
                options.append(replace(job.options, stop=stop))
            decoding = Decoding(self.library.compressor, prompts, options)
            decoding.advance()
        except Exception as error:
            if len(jobs) > 1:  # no request fails for what stands in another
                for job in jobs:
                    self._begin([job])
            else:
                jobs[0].finish(self._told(error))
            return
        batch = _Batch(decoding, list(zip(jobs, decoding.rows, strict=True)))
        self._batches.append(batch)
        self._deliver(batch)

    def _advance(self, batch: _Batch) -> None:
        try:
            batch.decoding.advance()
        except Exception as error:
            self._give_up(batch, error)
        else:
            self._deliver(batch)

    def _deliver(self, batch: _Batch) -> None:
        """Pass on what has been written, and part with answers that are over or that nobody waits for."""
        try:
            self._hand_out(batch)
        except Exception as error:  # a bug; whoever waits is told, and the server goes on
            self._give_up(batch, error)

    def _hand_out(self, batch: _Batch) -> None:
        now = time.perf_counter()
        left = []
        for job, row in batch.answers:
            if job.is_wanted:
                job.add(row.take(), row.result, now)
            else:
                row.end()
            if not row.finished:
                left.append((job, row))
                continue
            if job.is_wanted:
                self.on_answered(job)
            job.finish()
            seconds = now - job.arrived - job.written.waited
            self._seconds_per_answer += 0.1 * (seconds - self._seconds_per_answer)
        batch.answers = left
        if left:
            batch.decoding.drop_ended()
        else:
            self._batches.remove(batch)

    def _give_up(self, batch: _Batch, error: Exception) -> None:
        told = self._told(error)
        for job, _ in batch.answers:
            job.finish(told)
        self._batches.remove(batch)

    def _run_errand(self) -> None:
        self._steps += 1
        if self._batches and self._steps % _STEPS_BETWEEN_ERRANDS:
            return
        with self._changed:
            if not self._errands:
                return
            function, future = self._errands.popleft()
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = function()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    def _told(self, error: Exception) -> RequestError:
        told = of_exception(error, str(self.library.path))
        if told.status_code >= 500:
            _log.error("a request failed", exc_info=error)
        return told


def _go_together(first: Job, other: Job) -> bool:
    """Whether two requests can be answered in one batch; draws of a seed depend on what is drawn beside them."""
    is_drawn_alone = first.options.temperature > 0 and first.options.seed is not None
    return (
        not is_drawn_alone
        and first.options.choice == other.options.choice
        and first.question.reading.mode == other.question.reading.mode
    )
