"""Columns of JSON values: their types, and what keeps values from being one column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

# What Arrow raises where values of JSON do not become a column.
MISFITS = (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError)


def widened(kind: pa.DataType) -> pa.DataType:
    """A type with doubles for integers, in lists and structs too: JSON has one kind of number."""
    if pa.types.is_integer(kind):
        return pa.float64()
    if pa.types.is_list(kind):
        return pa.list_(widened(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, widened(field.type)) for field in kind])
    return kind


def is_deeper(value: Any, levels: int) -> bool:
    """Whether a value of JSON has more lists and objects in each other than so many."""
    inner = [value]
    for _ in range(levels + 1):
        nested = [one for one in inner if isinstance(one, (list, dict))]
        if not nested:
            return False
        inner = [item for one in nested for item in (one.values() if isinstance(one, dict) else one)]
    return True


def is_large(values: pa.Array) -> bool:
    """Whether there is an integer among these that a double does not hold."""
    try:
        values.cast(widened(values.type))
    except pa.ArrowInvalid:
        return True
    return False


def first_misfit(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> tuple[int, str, Exception] | None:
    """The first row that does not become part of a column with those before it: its number, the column and why."""
    found: tuple[int, str, Exception] | None = None
    for column in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(column) for row in rows]
        before = pa.schema([schema.field(column)] if column in schema.names else [])
        fits, fails, why = 0, len(values) + 1, None
        while fails - fits > 1:  # the first so many values fit, and so many do not
            half = (fits + fails) // 2
            try:
                own = pa.schema([(column, pa.array(values[:half]).type)])
                pa.array(values[:half], pa.unify_schemas([before, own], promote_options="permissive").field(0).type)
                fits = half
            except MISFITS as error:
                fails, why = half, error
        if why is not None and (found is None or fails - 1 < found[0]):
            found = fails - 1, column, why
    return found
