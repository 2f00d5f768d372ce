"""The end of a process that was told to end."""

from __future__ import annotations

import os
import signal
import threading


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
