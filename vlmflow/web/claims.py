"""Who is looking at which image of the queue, so that two people are not given the same one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

EXPIRES_S = 300.0  # after that long an image is free again


class Claims:
    """One image for each person, for a while. A claim keeps nobody from deciding: it only steers the queue.

    Args:
        clock: seconds, never backwards.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, expires_s: float = EXPIRES_S) -> None:
        self._clock, self._expires_s = clock, expires_s
        self._held: dict[str, tuple[str, float]] = {}  # by session: the image, and until when
        self._lock = threading.Lock()

    def take(self, session: str, image_id: str) -> str | None:
        """Claims an image, and gives up the one before; returns another session that has it, which keeps it."""
        with self._lock:
            self._expire()
            other = self._holder(image_id, session)
            if other is None:
                self._held[session] = (image_id, self._clock() + self._expires_s)
            return other

    def of_others(self, session: str) -> set[str]:
        """The images that others look at."""
        with self._lock:
            self._expire()
            return {image_id for holder, (image_id, _) in self._held.items() if holder != session}

    def drop(self, session: str) -> None:
        """Gives up whatever a session has."""
        with self._lock:
            self._held.pop(session, None)

    def _holder(self, image_id: str, session: str) -> str | None:
        held = ((holder, image) for holder, (image, _) in self._held.items() if holder != session)
        return next((holder for holder, image in held if image == image_id), None)

    def _expire(self) -> None:
        now = self._clock()
        self._held = {holder: held for holder, held in self._held.items() if held[1] > now}
