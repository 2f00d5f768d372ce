"""How far reading may run ahead of the models: what a kill costs, and what lies decoded in memory.

Ray Data bounds that by bytes alone, a share of its object store: small images would all be read before any is done.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.data import DataContext
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
)
from ray.data._internal.execution.backpressure_policy.backpressure_policy import BackpressurePolicy

from vlmflow.config import PoolConfig

_ROWS = "vlmflow.read_ahead_rows"
# The stage that is held back goes by the name of its function.
STAGE = "read_and_decode"
# Batches that an actor has at hand beside those in its calls: blocks that wait to become one, and those on their way.
_BATCHES_BESIDE_CALLS = 3
_MAX_ROWS_PER_TASK = 2_048  # more than any block or batch has
_LOOK_S = 5.0  # at the cluster, which may have grown or lost nodes


class ReadAhead(BackpressurePolicy):  # type: ignore[misc]
    """Starts no more decoding while as many rows as are wanted are between it and the end of the last pool."""

    def __init__(self, context: DataContext, topology: Iterable[Any], resources: Any) -> None:
        super().__init__(context, topology, resources)
        self._max_rows, self._looked_at = 0, -math.inf
        for op in topology:
            if STAGE in op.name:
                # While nothing is at work Ray Data overrules its policies, lest it wait for ever. While models load
                # that would read one block after the other; what an operator itself refuses is not overruled.
                op.can_add_input = partial(self._may_start, op)

    def _may_start(self, op: Any) -> bool:
        """Whether another decoding task may start although Ray Data overrules this policy."""
        behind = (stage.get_actor_info() for stage in _with_stages_behind(op)[1:])
        return self.can_add_input(op) or not any(pool.pending and not pool.running for pool in behind)

    def can_add_input(self, op: Any) -> bool:
        """Whether another task of the operator may start."""
        if STAGE not in op.name:
            return True
        stages = _with_stages_behind(op)
        taken, given = op.metrics.rows_inputs_of_submitted_tasks, stages[-1].metrics.rows_task_outputs_generated
        # Blocks that were given up went in and never come out; to take too many for lost only lets more be read.
        lost = _MAX_ROWS_PER_TASK * sum(stage.metrics.num_tasks_failed for stage in stages)
        return bool(taken - given - lost < self._rows())

    def _rows(self) -> int:
        """How many rows may be under way on the cluster as it is, or was a moment ago: this is asked all the time."""
        now = time.monotonic()
        if now - self._looked_at >= _LOOK_S:
            self._looked_at = now
            self._max_rows = self._data_context.get_config(_ROWS).on(ray.cluster_resources())
        return self._max_rows


def _with_stages_behind(op: Any) -> list[Any]:
    stages = [op]
    while stages[-1].output_dependencies:
        stages.append(stages[-1].output_dependencies[0])
    return stages


@dataclass(frozen=True)
class ReadAheadRows:
    """How many rows may be under way: enough that no actor waits, unless the job says how many.

    Attributes:
        wanted: what the job says; less than one batch of every pool would keep them waiting for ever.
        calls: of each pool, the batches that an actor is at once.
        rows_per_task: that a decoding task is given.
        cpus_per_task: that it asks for.
    """

    wanted: int | None
    pools: tuple[PoolConfig, ...]
    calls: tuple[int, ...]
    rows_per_task: int
    cpus_per_task: float

    def on(self, resources: Mapping[str, float]) -> int:
        """The rows on a cluster with these resources: for the actors for which it has room, and the next."""
        wanted = self.wanted
        if wanted is None:
            cpus, gpus = resources.get("CPU", 1.0), resources.get("GPU", 0.0)
            wanted = math.ceil(cpus / self.cpus_per_task) * self.rows_per_task
            for pool, num_calls in zip(self.pools, self.calls, strict=True):
                room = math.floor(gpus / pool.gpus if pool.gpus else cpus / pool.cpus)
                num_actors = min(pool.max_actors, max(room + 1, pool.min_actors))
                wanted += num_actors * pool.batch_size * (num_calls + _BATCHES_BESIDE_CALLS)
        return max(wanted, sum(pool.batch_size for pool in self.pools))


def limit_read_ahead(rows: ReadAheadRows) -> None:
    """Bounds reading ahead for the datasets that are made from here on."""
    context = DataContext.get_current()
    context.set_config(_ROWS, rows)
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [*ENABLED_BACKPRESSURE_POLICIES, ReadAhead])
