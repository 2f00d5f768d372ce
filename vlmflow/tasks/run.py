"""Runs a task so that an image which fails costs itself and no other."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from vlmflow import schema
from vlmflow.device_errors import is_device_broken, is_out_of_memory, release_memory
from vlmflow.errors import AnswerError, EndpointError, RowErrorClass
from vlmflow.tasks import Columns, Task, check_columns

logger = logging.getLogger("vlmflow")

_MAX_MESSAGE_CHARS = 200
# What differs between two runs on the same image, or tells of the machine.
_VOLATILE = ((re.compile(r"0x[0-9a-fA-F]+"), "0x?"), (re.compile(r"(?<![\w.])(?:/[\w.@+-]+){2,}/?"), "<path>"))


@dataclass
class BatchLimit:
    """The most images at once. One per task and worker.

    Attributes:
        rows: that are known to fit into memory, or there is reason to begin with; None: all.
        has_run_out: memory has, with more.
        num_retries: batches that failed, and were tried again in halves.
    """

    rows: int | None = None
    has_run_out: bool = False
    num_retries: int = 0


@dataclass(frozen=True)
class _Failure:
    error_class: RowErrorClass
    message: str


def run_contained(
    task: Task,
    batch: pa.Table,
    limit: BatchLimit,
    guard: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> tuple[Columns, pa.Array[Any]]:
    """Runs a task on a batch, and again on its halves where that fails, down to one image.

    What fails alone is recorded with the type of its exception: our own mistakes too, which show as many rows with
    the same message. Where memory runs out, ``limit`` remembers the size that is tried next, for later batches.

    Args:
        guard: what each call of the task runs in.

    Returns:
        The task's columns, null in the rows that failed; and one value of ``schema.ERROR`` per row, null elsewhere.

    Raises:
        ValueError: the task wrote other columns than it says.
        torch.AcceleratorError: the device is broken, and with it every batch to come; the worker must end.
    """
    pieces: list[tuple[Columns, pa.Array[Any]]] = []
    pending = [batch] if batch.num_rows else []  # a stack, the first rows on top
    while pending:
        part = pending.pop()
        most = limit.rows  # another thread may lower it at any time
        if most is not None and part.num_rows > most:
            pending += [part.slice(most), part.slice(0, most)]
            continue
        with guard():
            outcome = _attempt(task, part)
        if not isinstance(outcome, _Failure):
            check_columns(task.writes, outcome, part.num_rows)
            pieces.append((outcome, pa.nulls(part.num_rows, schema.ERROR)))
        elif part.num_rows == 1:
            pieces.append(_failed_row(task, outcome))
        else:
            half = part.num_rows // 2
            limit.num_retries += 1
            if outcome.error_class is RowErrorClass.OUT_OF_MEMORY:
                limit.rows, limit.has_run_out = min(half, limit.rows or half), True
                logger.warning(
                    "%s: out of memory with %d images at once; at most %d from here on", task.name, part.num_rows, half
                )
            pending += [part.slice(half), part.slice(0, half)]
    return _concatenate(task.writes, pieces)


def _attempt(task: Task, batch: pa.Table) -> Columns | _Failure:
    try:
        return task(batch)
    except Exception as error:  # an image can fail in any way; it is recorded, never made a value
        if is_device_broken(error):
            raise
        failure = _describe(error)
    # Past the handler, which kept the failed batch's tensors alive through the traceback.
    if failure.error_class is RowErrorClass.OUT_OF_MEMORY:
        release_memory()
    return failure


def _describe(error: Exception) -> _Failure:
    """A failure in words that stay the same from run to run."""
    if is_out_of_memory(error):
        # The original tells how much was free at the time.
        return _Failure(RowErrorClass.OUT_OF_MEMORY, "out of memory with a batch of one image")
    if isinstance(error, EndpointError):
        return _Failure(error.error_class, str(error)[:_MAX_MESSAGE_CHARS])
    if isinstance(error, AnswerError):
        return _Failure(RowErrorClass.BAD_ANSWER, str(error))
    lines = str(error).strip().splitlines()
    reason = lines[0].strip() if lines else ""
    for pattern, replacement in _VOLATILE:
        reason = pattern.sub(replacement, reason)
    message = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
    return _Failure(RowErrorClass.TASK_FAILED, message[:_MAX_MESSAGE_CHARS])


def _failed_row(task: Task, failure: _Failure) -> tuple[Columns, pa.Array[Any]]:
    error = {"stage": task.name, "class": str(failure.error_class), "message": failure.message}
    return {field.name: pa.nulls(1, field.type) for field in task.writes}, pa.array([error], schema.ERROR)


def _concatenate(writes: pa.Schema, pieces: list[tuple[Columns, pa.Array[Any]]]) -> tuple[Columns, pa.Array[Any]]:
    if len(pieces) == 1:
        return pieces[0]
    empty = {field.name: pa.nulls(0, field.type) for field in writes}
    columns = {name: pa.concat_arrays([none, *(piece[name] for piece, _ in pieces)]) for name, none in empty.items()}
    return columns, pa.concat_arrays([pa.nulls(0, schema.ERROR), *(errors for _, errors in pieces)])
