"""A small cache that several threads share."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Cache(Generic[Value]):
    """Keeps what was used last, up to a weight.

    Args:
        max_weight: of all values together.
        weigh: of one value; by default each weighs 1.
    """

    def __init__(self, max_weight: int, weigh: Callable[[Value], int] = lambda _: 1) -> None:
        self._max_weight, self._weigh = max_weight, weigh
        self._held: OrderedDict[Hashable, Value] = OrderedDict()
        self._weight = 0
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Value | None:
        """What is kept under a key."""
        with self._lock:
            if key not in self._held:
                return None
            self._held.move_to_end(key)
            return self._held[key]

    def put(self, key: Hashable, value: Value) -> Value:
        """Keeps a value, and gives it back."""
        with self._lock:
            old = self._held.pop(key, None)
            self._weight += self._weigh(value) - (0 if old is None else self._weigh(old))
            self._held[key] = value
            while self._weight > self._max_weight and len(self._held) > 1:
                _, dropped = self._held.popitem(last=False)
                self._weight -= self._weigh(dropped)
        return value

    def get_or_make(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """What is kept, or is made now. Two threads may make the same at once."""
        found = self.get(key)
        return self.put(key, make()) if found is None else found
