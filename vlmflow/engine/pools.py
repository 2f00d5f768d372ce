"""A pool: actors that hold the models of one or more tasks and run them on batches."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import threading
from typing import TYPE_CHECKING, NoReturn

import pyarrow as pa

from vlmflow.config import PoolConfig, TaskName
from vlmflow.engine import columns
from vlmflow.engine.equal_bytes import RecentResults
from vlmflow.engine.garbage import collected_once
from vlmflow.engine.metrics import PoolMetrics
from vlmflow.engine.turns import Turns, Usage
from vlmflow.engine.watchdog import at_most
from vlmflow.errors import remedy_noted
from vlmflow.moderation.prompts import PromptVectors
from vlmflow.tasks import Columns, Task, add_columns
from vlmflow.tasks.setup import TaskSetup, load_task

if TYPE_CHECKING:
    from vlmflow.engine.decoding import PoolDecoding
    from vlmflow.engine.feeding import Fed
    from vlmflow.engine.flops import CountedTask
    from vlmflow.engine.starts import Starts
    from vlmflow.models import Metered
    from vlmflow.tasks.run import BatchLimit

logger = logging.getLogger("vlmflow")

_MAX_REASON_CHARS = 300
# A task's outputs exist only where the task it reads succeeded.
_READS = {"moderate": "embed"}


class PoolWorker:
    """Runs a pool's tasks on a batch; built once per actor, so weights load once."""

    @collected_once()
    @remedy_noted()  # of what a constructor raises Ray keeps the traceback alone
    def __init__(
        self,
        pool: PoolConfig,
        setup: TaskSetup,
        prompts: PromptVectors | None,
        *,
        starts: Starts | None = None,
        later: tuple[TaskName, ...] = (),
        decoding: PoolDecoding | None = None,
        sized_by_memory: bool = False,
    ) -> None:
        """Loads the models.

        Args:
            starts: of the pool's actors; None: whoever starts this process does not start it again.
            later: tasks of the pools behind this one, which need their pixels.
            decoding: None: every image comes decoded.
            sized_by_memory: nobody chose the size of batches for this GPU: do less at once on a small one.
        """
        if starts is not None:  # first: a driver or library may crash when it is imported
            starts.begin()
        # The driver imports this module too and needs no torch.
        from vlmflow.device_errors import fitting
        from vlmflow.engine.feeding import Feeder
        from vlmflow.engine.flops import Ceilings, CountedTask
        from vlmflow.engine.loading import Room, check_weights, room_for, set_up_torch, wait_for_device
        from vlmflow.engine.streams import ThreadStreams
        from vlmflow.models.towers import VisionTowers
        from vlmflow.tasks.run import BatchLimit

        device = set_up_torch(pool, setup.dtype)
        room = room_for(pool, setup.dtype) if sized_by_memory else Room()
        check_weights(pool, setup)
        self._towers = VisionTowers()
        self._tasks: dict[str, CountedTask] = {}
        for name in pool.tasks:
            with fitting(f"pool {'+'.join(pool.tasks)}: the model of {name}", device):
                self._tasks[name] = CountedTask(load_task(name, setup, prompts, device, self._towers))
        check_weights(pool, setup)
        self._ceilings = Ceilings(device, setup.dtype)
        self._limits: dict[str, BatchLimit] = {name: BatchLimit(room.rows) for name in pool.tasks}
        self._calls = contextlib.nullcontext() if room.calls is None else threading.BoundedSemaphore(room.calls)
        self._recent = {name: RecentResults(task) for name, task in self._tasks.items()}
        self._timeout_s = pool.timeout_s
        self._feeder = Feeder(setup.requests_of(pool.tasks), setup.requests_of(later), device, decoding)
        self._passes_regions_on = setup.read_regions(later)
        # Threads of a processor's actor would only take its cores from each other.
        counts = {name: task.batches_at_once for name, task in self._tasks.items()}
        self._turns = Turns(counts, side_by_side=device == "cuda")
        self._streams = ThreadStreams(device)
        self._name = "+".join(pool.tasks)
        self._metrics = PoolMetrics(pool)
        wait_for_device(device)  # weights are copied on the stream of this thread, and read on those of others
        if starts is not None:
            starts.succeed()

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Adds the outputs of the pool's tasks, null on rows that do not need or cannot have them.

        Threads may call it side by side: a batch is made ready while the tasks are at those before.
        """
        if batch.num_rows == 0:
            return batch
        try:
            with self._calls:
                return self._process(batch)
        except RuntimeError as error:
            from vlmflow.device_errors import is_device_broken

            if is_device_broken(error):
                _end_process(error)
            raise

    def _process(self, batch: pa.Table) -> pa.Table:
        fed = self._feeder(batch)
        with self._turns.batch() as usage, self._streams():
            batch = self._run(fed)
            if self._ceilings.are_due():
                with self._turns.alone():
                    self._ceilings.measure(self._tasks)
        retries = sum(limit.num_retries for limit in self._limits.values())
        self._metrics.count_batch(batch.num_rows, usage.busy, usage.waited, retries)
        batch = self._feeder.finish(batch, fed)
        if not self._passes_regions_on:
            batch = columns.drop_regions(batch)
        for column, amount in (
            (columns.seconds_column(f"feed:{self._name}"), fed.seconds),
            (columns.seconds_column(f"busy:{self._name}"), usage.busy),
            (columns.seconds_column(f"waiting:{self._name}"), usage.waited),
            (columns.BATCHES_PREFIX + self._name, 1.0),
            (columns.REFUSED_PREFIX + self._name, float(fed.num_refused)),
        ):
            batch = batch.append_column(column, columns.spread(amount, batch.num_rows))
        return batch

    def _run(self, fed: Fed) -> pa.Table:
        batch = fed.batch
        with self._feeder.lent(fed), self._towers.of_batch():
            for name, task in self._tasks.items():
                # What is due on no row has no need to wait for the batches of other threads.
                is_due = bool(pa.compute.any(due_on(batch, name)).as_py())
                before = task.flops
                with self._turn(task) if is_due else contextlib.nullcontext(Usage()) as usage:
                    batch = run_on_due_rows(batch, task, self._limits[name], self._timeout_s, self._recent[name])
                    batch = _with_usage(batch, task.task)
                spent = {columns.seconds_column(name): usage.busy, columns.FLOPS_PREFIX + name: task.flops - before}
                for column, amount in spent.items():
                    batch = batch.append_column(column, columns.spread(amount, batch.num_rows))
                ceiling = pa.scalar(self._ceilings.of(name), pa.float64())
                batch = batch.append_column(columns.CEILING_PREFIX + name, pa.repeat(ceiling, batch.num_rows))
        fitting = [limit.rows for limit in self._limits.values() if limit.has_run_out and limit.rows is not None]
        at_once = pa.scalar(min(fitting, default=None), pa.int64())
        return batch.append_column(columns.AT_ONCE_PREFIX + self._name, pa.repeat(at_once, batch.num_rows))

    def _turn(self, task: CountedTask) -> contextlib.AbstractContextManager[Usage]:
        # What counts operations counts those of other threads' modules as well.
        return self._turns.alone(task.name) if task.is_to_count else self._turns.task(task.name)


def _end_process(error: Exception) -> NoReturn:
    """Ray starts the worker anew on the device as it is then; one that stayed would fail every batch it is given."""
    logger.error("the device is broken, and this worker ends: %s", " ".join(str(error).split())[:_MAX_REASON_CHARS])
    logging.shutdown()
    os._exit(1)  # nothing may still be asked of the device, as destructors would


def _with_usage(batch: pa.Table, task: Task) -> pa.Table:
    """Adds what the task has spent on this batch, where its model is paid for."""
    meter: Metered | None = getattr(task, "meter", None)
    usage = None if meter is None else meter.take_usage()
    if usage is None:
        return batch
    for what, amount in dataclasses.asdict(usage).items():
        batch = batch.append_column(
            columns.spent_column(task.name, what), columns.spread(float(amount), batch.num_rows)
        )
    return batch


def due_on(batch: pa.Table, name: str) -> pa.Array:
    """Tells row by row whether the task is due, and what it reads is there; bool, no nulls."""
    due = columns.has_task(batch, columns.RUN_TASKS, name)
    if name in _READS and columns.TASKS_FAILED in batch.column_names:
        due = pa.compute.and_not(due, columns.has_task(batch, columns.TASKS_FAILED, _READS[name]))
    return due


def run_on_due_rows(
    batch: pa.Table, task: Task, limit: BatchLimit, timeout_s: float, recent: RecentResults | None = None
) -> pa.Table:
    """Runs a task on the rows on which it is due, and records there whether it succeeded.

    Args:
        timeout_s: a single call of the task that takes longer ends this process.
        recent: results of this worker's last images, of which equal bytes take theirs; None: all are computed.

    Returns:
        The batch with the task's columns, null on all other rows and where it failed.
    """
    name = task.name
    rows = pa.compute.indices_nonzero(due_on(batch, name))
    marks: dict[str, list[list[object]]] = {
        column: [[] for _ in range(batch.num_rows)]
        for column in (columns.TASKS_RUN, columns.TASKS_FAILED, columns.TASKS_SHARED, "errors")
    }
    outputs: dict[str, pa.Array] = {field.name: pa.nulls(batch.num_rows, field.type) for field in task.writes}
    if len(rows):
        taken = batch if len(rows) == batch.num_rows else batch.take(rows)
        values, row_errors, shared = _results(taken, task, limit, timeout_s, recent)
        outputs = _scatter(values, rows, batch.num_rows, task.writes)
        for row, error, is_shared in zip(rows.to_pylist(), row_errors.to_pylist(), shared, strict=True):
            if error is not None:
                marks[columns.TASKS_FAILED][row], marks["errors"][row] = [name], [error]
                continue
            marks[columns.TASKS_RUN][row] = [name]
            if is_shared:
                marks[columns.TASKS_SHARED][row] = [name]
    batch = add_columns(batch, task.writes, outputs)
    for column, additions in marks.items():
        batch = columns.append_to_lists(batch, column, additions)
    return batch


def _results(
    rows: pa.Table, task: Task, limit: BatchLimit, timeout_s: float, recent: RecentResults | None
) -> tuple[Columns, pa.Array, list[bool]]:
    """The task's columns, its errors, and which results are those of other images."""
    from vlmflow.tasks.run import run_contained

    if recent is None or not recent.is_used:
        return *run_contained(task, rows, limit, lambda: at_most(timeout_s)), [False] * rows.num_rows
    split = recent.split(rows)
    fresh = rows if len(split.fresh) == rows.num_rows else rows.take(pa.array(split.fresh, pa.int64()))
    values, errors = run_contained(task, fresh, limit, lambda: at_most(timeout_s))
    return *recent.join(split, values, errors), split.shared


def _scatter(outputs: dict[str, pa.Array], rows: pa.Array, num_rows: int, writes: pa.Schema) -> dict[str, pa.Array]:
    """Puts the values of some rows back among all rows, null elsewhere."""
    if len(rows) == num_rows:
        return outputs
    position = pa.compute.index_in(pa.array(range(num_rows), pa.uint64()), value_set=rows)
    return {field.name: outputs[field.name].take(position) for field in writes}
