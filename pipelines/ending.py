"""The end of a process that was told to end."""

from __future__ import annotations

import os
import signal
import sys
import threading

INTERRUPTED = 130
_DEFAULTS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}


def end_at_once_when_told() -> None:
    """Has signals that end this process do it in one line, where nobody has said otherwise.

    For the seconds in which a command imports Prefect: Ctrl-C would leave a traceback there, the others no word.
    """
    for ends, default in _DEFAULTS.items():
        if signal.getsignal(ends) == default:
            signal.signal(ends, _end_at_once)


def raise_when_told() -> None:
    """Has them raise :class:`KeyboardInterrupt` instead, so that what is at work can end in order."""
    for ends in _DEFAULTS:
        if signal.getsignal(ends) in (_end_at_once, signal.SIG_DFL):
            signal.signal(ends, signal.default_int_handler)


def _end_at_once(number: int, frame: object) -> None:
    os.write(2, f"{sys.argv[0].rpartition('/')[2].removesuffix('.py')}: interrupted\n".encode())
    os._exit(INTERRUPTED)


def end_within(seconds: float, code: int) -> None:
    """Ends this process by force, unless it has ended by then; SIGTERM and SIGHUP are heard no more.

    A signal interrupts Python anywhere, also between the taking of a lock and the block that gives it back. What wants
    this lock at the end waits for ever: as Prefect's thread did that sends logs, for the lock of ``logging``.
    """
    for again in (signal.SIGTERM, signal.SIGHUP):  # which would interrupt what ends in order
        signal.signal(again, signal.SIG_IGN)
    timer = threading.Timer(seconds, os._exit, (code,))
    timer.daemon = True  # else the process would wait for it
    timer.start()
