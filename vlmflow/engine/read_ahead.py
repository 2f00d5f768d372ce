"""How far reading may run ahead of the models: what a kill costs, and what lies decoded in memory.

Ray Data bounds that by bytes alone, a share of its object store: small images would all be read before any is done.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from ray.data import DataContext
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
)
from ray.data._internal.execution.backpressure_policy.backpressure_policy import BackpressurePolicy

from vlmflow.config import PoolConfig

_MAX_ROWS = "vlmflow.read_ahead_rows"
# The stage that is held back goes by the name of its function.
STAGE = "read_and_decode"
# Batches that an actor has at hand beside those in its calls: blocks that wait to become one, and those on their way.
_BATCHES_BESIDE_CALLS = 3
_MAX_ROWS_PER_TASK = 2_048  # more than any block or batch has


class ReadAhead(BackpressurePolicy):  # type: ignore[misc]
    """Starts no more decoding while as many rows as are wanted are between it and the end of the last pool."""

    def __init__(self, context: DataContext, topology: Iterable[Any], resources: Any) -> None:
        super().__init__(context, topology, resources)
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
        return bool(taken - given - lost < self._data_context.get_config(_MAX_ROWS))


def _with_stages_behind(op: Any) -> list[Any]:
    stages = [op]
    while stages[-1].output_dependencies:
        stages.append(stages[-1].output_dependencies[0])
    return stages


def read_ahead_rows(wanted: int | None, pools: tuple[PoolConfig, ...], calls: Sequence[int], decoding: int) -> int:
    """Rows that may be under way: enough that no actor waits, unless the job says how many.

    Args:
        wanted: what the job says; less than one batch of every pool would keep them waiting for ever.
        calls: of each pool, the batches that an actor is at once.
        decoding: rows that all decoding tasks together were given.
    """
    if wanted is None:
        pairs = zip(pools, calls, strict=True)
        at_hand = sum(pool.max_actors * pool.batch_size * (num + _BATCHES_BESIDE_CALLS) for pool, num in pairs)
        wanted = at_hand + decoding
    return max(wanted, sum(pool.batch_size for pool in pools))


def limit_read_ahead(max_rows: int) -> None:
    """Bounds reading ahead for the datasets that are made from here on."""
    context = DataContext.get_current()
    context.set_config(_MAX_ROWS, max_rows)
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [*ENABLED_BACKPRESSURE_POLICIES, ReadAhead])
