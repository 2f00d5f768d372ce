"""What the driver puts into the object store: values that workers share, fetched once per process; tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

import pyarrow as pa
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


def put_table(table: pa.Table) -> ray.ObjectRef[pa.Table]:
    """Puts a table into the object store as one stream of Arrow.

    Column by column, as Ray does it, takes the driver five times as long for some ten kilobytes.
    """
    return ray.put(_Stream(table))


class _Stream:
    """Comes out of the object store as the table."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def __reduce__(self) -> tuple[Callable[[pa.Buffer], pa.Table], tuple[pa.Buffer]]:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self._table.schema) as stream:
            stream.write_table(self._table)
        return _table_of, (sink.getvalue(),)


def _table_of(stream: pa.Buffer) -> pa.Table:
    return pa.ipc.open_stream(stream).read_all()
