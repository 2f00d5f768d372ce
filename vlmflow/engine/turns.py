"""Who computes when in a worker that several threads call, and how long the worker was at work at all."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass


@dataclass
class Usage:
    """Seconds of a batch, in a worker or a task.

    Attributes:
        waited: nothing was computed before it.
        busy: something was computed, as far as no batch that ended before has them.
    """

    waited: float = 0.0
    busy: float = 0.0


class _Clock:
    """Counts the seconds in which one or more of its kind were at work, each once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_at_work = 0
        self._counted_until: float | None = None  # None: before the first

    @contextmanager
    def __call__(self) -> Iterator[Usage]:
        """One of them; what it used is known behind the block."""
        usage = Usage()
        self._begin(usage)
        try:
            yield usage
        finally:
            self._end(usage)

    def _begin(self, usage: Usage) -> None:
        with self._lock:
            now = time.perf_counter()
            if self._num_at_work == 0:
                usage.waited = 0.0 if self._counted_until is None else now - self._counted_until
                self._counted_until = now
            self._num_at_work += 1

    def _end(self, usage: Usage) -> None:
        with self._lock:
            now = time.perf_counter()
            assert self._counted_until is not None
            usage.busy, self._counted_until = now - self._counted_until, now
            self._num_at_work -= 1


class Turns:
    """Orders the batches and tasks of one worker.

    Args:
        tasks: by their names, the batches that each may be at.
        side_by_side: two tasks may be at two batches, and some at more than one: for devices that compute beside this
            process, so that what a task does in Python hides behind what another computes. Their kernels gain nothing
            from each other: on an H100 a vision tower and decoding took 947 ms together, and 953 in turn. Else one
            batch goes through all tasks before the next.
    """

    def __init__(self, tasks: Mapping[str, int], *, side_by_side: bool) -> None:
        self._slots = {name: threading.BoundedSemaphore(count) for name, count in tasks.items()}
        self._counts = dict(tasks)
        self._clocks = {name: _Clock() for name in tasks}
        self._clock = _Clock()
        self._whole = None if side_by_side else threading.Lock()
        # Two that each had some of the slots of a task would wait for each other.
        self._alone = threading.Lock()

    @contextmanager
    def batch(self) -> Iterator[Usage]:
        """A batch's way through the tasks; what it used is known behind the block."""
        with nullcontext() if self._whole is None else self._whole, self._clock() as usage:
            yield usage

    @contextmanager
    def task(self, name: str) -> Iterator[Usage]:
        """One task at work on one batch; to be left before the next is asked for. What it used is known behind it."""
        with self._slots[name], self._clocks[name]() as usage:
            yield usage

    @contextmanager
    def alone(self, name: str | None = None) -> Iterator[Usage]:
        """No task is at work in another thread; to be asked for outside of all. ``name``: the task that is then."""
        with ExitStack() as stack:
            stack.enter_context(self._alone)
            for task, slots in self._slots.items():
                for _ in range(self._counts[task]):
                    stack.enter_context(slots)
            yield Usage() if name is None else stack.enter_context(self._clocks[name]())
