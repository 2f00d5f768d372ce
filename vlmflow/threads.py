"""Threads for calls that a store may leave without an answer for minutes.

While such a call is under way in the main thread, no handler of a signal runs: Ctrl-C and SIGTERM are without effect
until the client gives up. Here the main thread waits for another, which it can be called away from. These threads are
daemons: neither an interrupt nor the end of the process waits for them.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import ParamSpec, TypeVar

Answer = TypeVar("Answer")
Arguments = ParamSpec("Arguments")


def started(action: Callable[[], Answer]) -> Future[Answer]:
    """Begins a call in a thread of its own, in the context of this one: what it logs belongs to the same flow run."""
    future: Future[Answer] = Future()
    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(_answer, future, action), daemon=True).start()
    return future


def check_can_start() -> None:
    """Makes sure that as many threads may be started as a command needs that computes nothing: 18, and two a core.

    Counted on two cores: 20 to 24 at a time. Where one of theirs may not start, libraries wait for ever, or abort.

    Raises:
        RuntimeError: they may not, as of ``ulimit -u`` or a container's limit.
    """
    may_end, threads = threading.Event(), list[threading.Thread]()
    try:
        for _ in range(18 + 2 * len(os.sched_getaffinity(0))):
            thread = threading.Thread(target=may_end.wait, daemon=True)
            thread.start()
            threads.append(thread)
    finally:
        may_end.set()
        for thread in threads:
            thread.join()


def interruptible(action: Callable[[], Answer]) -> Answer:
    """Makes a call that an interrupt ends the wait for; the call itself goes on until it ends or the process does.

    Not for a commit: what follows must know whether it was made.
    """
    if threading.current_thread() is not threading.main_thread():  # signals are handled in no other
        return action()
    return started(action).result()


async def in_thread(action: Callable[[], Answer]) -> Answer:
    """As :func:`asyncio.to_thread`, for what may wait for a store: the end of the process waits for its threads."""
    return await asyncio.wrap_future(started(action))


class Threads(Executor):
    """As :class:`concurrent.futures.ThreadPoolExecutor`, for calls of which an interrupt need not wait for the end."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._threads: list[threading.Thread] = []
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._is_given_up = False

    def submit(
        self, call: Callable[Arguments, Answer], /, *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Future[Answer]:
        """Puts a call behind those that wait for a thread."""
        future: Future[Answer] = Future()
        self._calls.put(partial(_answer, future, partial(call, *args, **kwargs)))
        if len(self._threads) < self._num_threads:
            self._threads.append(threading.Thread(target=self._work, daemon=True))
            self._threads[-1].start()
        return future

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Waits for the calls; where nobody does any more, those that wait for a thread are not made."""
        # By what is no Exception: Ctrl-C, what Prefect ends a flow run with, or the end of a generator nobody reads on.
        self._is_given_up = kind is not None and not issubclass(kind, Exception)
        for _ in self._threads:
            self._calls.put(None)
        if not self._is_given_up:
            for thread in self._threads:
                thread.join()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None and not self._is_given_up:
            call()


def _answer(future: Future[Answer], action: Callable[[], Answer]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(action())
    except BaseException as error:  # noqa: BLE001  raised where the result is asked for
        future.set_exception(error)
    finally:
        del future, action  # the error's traceback holds this frame, and the future the error: all would stay for long
