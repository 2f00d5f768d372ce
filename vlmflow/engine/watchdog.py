"""Ends a worker process whose work never returns, so that Ray finds it dead and the image is looked for.

An image can hang a decoder or a model in C code that holds the interpreter's lock: no signal handler and no thread of
Python gets to run then. The watchdog of :mod:`faulthandler` is a thread of C: it writes where the process hangs into
the worker's log and ends it.
"""

from __future__ import annotations

import contextlib
import faulthandler
from collections.abc import Iterator

_STANDARD_ERROR = 2

_enabled = True


def disable() -> None:
    """Switches the watchdog off in this process, for good: another process watches over it."""
    global _enabled
    _enabled = False


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Ends this process if the block takes longer. There is one timer: blocks must not lie in each other."""
    if not _enabled:
        yield
        return
    faulthandler.dump_traceback_later(seconds, exit=True, file=_STANDARD_ERROR)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
