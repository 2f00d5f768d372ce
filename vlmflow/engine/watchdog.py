"""Ends a worker process whose work never returns, so that Ray finds it dead and the image is looked for.

An image can hang a decoder or a model in C code that holds the interpreter's lock: no signal handler and no thread of
Python gets to run then. The watchdog of :mod:`faulthandler` is a thread of C: it writes where the process hangs into
the worker's log and ends it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import threading
import time
from collections.abc import Iterator

_STANDARD_ERROR = 2

_enabled = True
# There is one timer per process, and a pool's actor has several threads at work: it is set for whichever ends first.
_deadlines: dict[object, float] = {}
_set_for: float | None = None
_lock = threading.Lock()


def disable() -> None:
    """Switches the watchdog off in this process, for good: another process watches over it."""
    global _enabled
    _enabled = False


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Ends this process if the block takes longer."""
    if not _enabled:
        yield
        return
    block = object()
    with _lock:
        _deadlines[block] = time.monotonic() + seconds
        _set_timer()
    try:
        yield
    finally:
        with _lock:
            del _deadlines[block]
            _set_timer()


def _set_timer() -> None:
    global _set_for
    earliest = min(_deadlines.values(), default=None)
    # To set it ends a thread and starts another, and no thread of Python runs meanwhile.
    if earliest == _set_for:
        return
    _set_for = earliest
    if earliest is None:
        faulthandler.cancel_dump_traceback_later()
        return
    left = max(0.001, earliest - time.monotonic())
    faulthandler.dump_traceback_later(left, exit=True, file=_STANDARD_ERROR)
