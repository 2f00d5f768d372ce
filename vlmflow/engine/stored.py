"""Values that workers share: put into the object store once, fetched once per process."""

from __future__ import annotations

from typing import Any, Generic, TypeVar, cast

import ray

T = TypeVar("T")

# By reference: a value that keeps something while it is used, such as open files, keeps it for all calls.
_FETCHED: dict[str, Any] = {}


class Stored(Generic[T]):
    """A value in Ray's object store. Picklable; the driver that made it must hold it while workers use it."""

    def __init__(self, value: T) -> None:
        self._ref = ray.put(value)

    def get(self) -> T:
        """The value; the same object whenever a process asks again."""
        name = self._ref.hex()
        if name not in _FETCHED:
            _FETCHED.clear()  # of a run before: workers serve one after the other
            _FETCHED[name] = ray.get(self._ref)
        return cast(T, _FETCHED[name])
