"""What is computed of an image: one small module a task, columns in, columns out.

A task knows neither Ray nor files nor other tasks. It gives one value per row, in the order of the batch, and raises
when it cannot; :mod:`vlmflow.tasks.run` keeps an image that fails from costing the others their values.
"""

from __future__ import annotations

from typing import Any, Protocol

import pyarrow as pa

Columns = dict[str, "pa.Array[Any]"]  # by name, one value per row


class Task(Protocol):
    """A computation over the rows of a batch."""

    name: str  # as in `Job.tasks`; the stage of its errors
    reads: tuple[str, ...]  # columns that the batch must have
    writes: pa.Schema

    def __call__(self, batch: pa.Table) -> Columns:
        """The columns of ``writes``, one value per row."""


def check_columns(writes: pa.Schema, columns: Columns, num_rows: int) -> None:
    """Checks what a task wrote against what it says it writes.

    Raises:
        ValueError: the columns differ by name, type or number of values.
    """
    if set(columns) != set(writes.names):
        raise ValueError(f"task wrote {sorted(columns)}, not {sorted(writes.names)}")
    for field in writes:
        values = columns[field.name]
        if len(values) != num_rows:
            raise ValueError(f"{field.name}: {len(values)} values for {num_rows} rows")
        if values.type != field.type:
            raise ValueError(f"{field.name}: {values.type}, not {field.type}")


def add_columns(batch: pa.Table, writes: pa.Schema, columns: Columns) -> pa.Table:
    """Appends a task's columns to a batch.

    Raises:
        ValueError: the columns are not those of ``writes``, or the batch has one of them already.
    """
    check_columns(writes, columns, batch.num_rows)
    for field in writes:
        if field.name in batch.column_names:
            raise ValueError(f"{field.name}: the batch has this column already")
        batch = batch.append_column(field, columns[field.name])
    return batch
