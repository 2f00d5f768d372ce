"""Requests that failed in passing are made again, later each time and never all at once.

The clients of stores retry by themselves what they take to be safe: refusals to serve (429, 5xx), connections that
could not be made. What they leave, because they cannot know whether it is safe, is left to us: an answer that breaks
off, a write whose answer was lost or late. It is safe here: files are written whole, under names of their own.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from vlmflow.storage import STORE_ERRORS, passes
from vlmflow.threads import interruptible

ATTEMPTS = 7  # on top of the clients' own; about ten seconds of waiting
_FIRST_DELAY_S = 0.1
_LONGEST_DELAY_S = 5.0

Answer = TypeVar("Answer")


def retried(
    action: Callable[[], Answer],
    errors: tuple[type[Exception], ...] = STORE_ERRORS,
    never: tuple[type[Exception], ...] = (),
) -> Answer:
    """Does something, and again if it fails in a way that passes; other errors, and the last, are raised as they are.

    Args:
        action: may be carried out more than once, and go on for a while after an interrupt.
        errors: those that may have passed when it is tried again; of these, ``never`` those that do not.
    """
    for attempt in range(ATTEMPTS):
        try:
            return interruptible(action)
        except errors as error:
            if attempt == ATTEMPTS - 1 or isinstance(error, never) or not passes(error):
                raise
            time.sleep(_delay_s(attempt))
    raise AssertionError("unreachable")


async def retried_async(action: Callable[[], Awaitable[Answer]]) -> Answer:
    """As :func:`retried`, of a coroutine."""
    for attempt in range(ATTEMPTS):
        try:
            return await action()
        except STORE_ERRORS as error:
            if attempt == ATTEMPTS - 1 or not passes(error):
                raise
            await asyncio.sleep(_delay_s(attempt))
    raise AssertionError("unreachable")


def _delay_s(attempt: int) -> float:
    """At random between half the delay and the whole of it, which doubles: those that failed together part ways."""
    delay = min(_LONGEST_DELAY_S, _FIRST_DELAY_S * 2**attempt)
    return random.uniform(delay / 2, delay)
