"""Who computes when in a worker that several threads call, and how long the worker was at work at all."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass


@dataclass
class Usage:
    """Seconds of a batch.

    Attributes:
        waited: nothing was computed before it.
        busy: something was computed, as far as no batch that ended before has them.
    """

    waited: float = 0.0
    busy: float = 0.0


class Turns:
    """Orders the batches and tasks of one worker.

    Args:
        tasks: their names.
        side_by_side: a task is at one batch at a time, and two tasks may be at two batches: for devices that compute
            beside this process, so that what a task does in Python hides behind what another computes. Their kernels
            gain nothing from each other: on an H100 a vision tower and decoding took 947 ms together, and 953 in turn.
            Else one batch goes through all tasks before the next.
    """

    def __init__(self, tasks: Sequence[str], *, side_by_side: bool) -> None:
        self._tasks = {name: threading.Lock() for name in tasks}
        self._whole = None if side_by_side else threading.Lock()
        self._clock = threading.Lock()
        self._num_at_work = 0
        self._counted_until: float | None = None  # None: before the first batch

    @contextmanager
    def batch(self) -> Iterator[Usage]:
        """A batch's way through the tasks; what it used is known behind the block."""
        with ExitStack() as stack:
            if self._whole is not None:
                stack.enter_context(self._whole)
            usage = Usage()
            self._begin(usage)
            try:
                yield usage
            finally:
                self._end(usage)

    def task(self, name: str) -> AbstractContextManager[object]:
        """One task at work on one batch; to be left before the next is asked for."""
        return self._tasks[name]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No task is at work in another thread; to be asked for outside of all."""
        with ExitStack() as stack:
            for task in self._tasks.values():
                stack.enter_context(task)
            yield

    def _begin(self, usage: Usage) -> None:
        with self._clock:
            now = time.perf_counter()
            if self._num_at_work == 0:
                usage.waited = 0.0 if self._counted_until is None else now - self._counted_until
                self._counted_until = now
            self._num_at_work += 1

    def _end(self, usage: Usage) -> None:
        with self._clock:
            now = time.perf_counter()
            assert self._counted_until is not None
            usage.busy, self._counted_until = now - self._counted_until, now
            self._num_at_work -= 1
