"""Planned references on their way to Ray Data: a block goes into the object store shortly before it is read.

``ray.data.from_blocks`` puts all of them there before anything runs, and keeps them to the end: of ten million images
that took minutes and gigabytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
from ray.data import DataContext, Dataset
from ray.data._internal.execution.interfaces import BlockEntry, RefBundle
from ray.data._internal.execution.operators.input_data_buffer import InputDataBuffer
from ray.data._internal.logical.interfaces import LogicalOperator, LogicalPlan, SourceOperator
from ray.data._internal.planner.planner import Planner
from ray.data._internal.stats import DatasetStats
from ray.data.block import BlockMetadata

from vlmflow.engine.stored import put_table

# That wait to be read. Ray Data looks for more several times a second.
_MAX_WAITING = 64
# Of blocks that were given last. From them Ray makes anew what was read and is lost with its node; of older ones the
# run does that itself, at its end.
_KEPT_BYTES = 256 << 20


def dataset_of(blocks: Iterable[pa.Table]) -> Dataset:
    """A dataset of these blocks, which are taken as they are needed. Where they come but once, so does the dataset."""
    # Before Ray's own are looked through, of which none fits.
    Planner._DEFAULT_PLAN_FNS.setdefault(_Planned, _input_of)
    context = DataContext.get_current().copy()
    stats = DatasetStats(metadata={"Planned": []}, parent=None)
    return Dataset(LogicalPlan(_Planned(blocks), context), context, stats)


@dataclass(frozen=True, repr=False, eq=False)
class _Planned(LogicalOperator, SourceOperator):  # type: ignore[misc]
    blocks: Iterable[pa.Table]

    def output_data(self) -> None:
        """Nothing is known before it runs."""

    def is_lineage_serializable(self) -> bool:
        return False

    def _get_args(self) -> dict[str, Any]:
        return {}  # Ray Data exports them


def _input_of(planned: _Planned, _: list[Any], context: DataContext) -> InputDataBuffer:
    return _Input(context, planned.blocks)


class _Input(InputDataBuffer):  # type: ignore[misc]
    """Gives blocks only while few wait: Ray Data takes all that there are at once."""

    def __init__(self, context: DataContext, blocks: Iterable[pa.Table]) -> None:
        super().__init__(context, input_data=[])
        self._planned = blocks
        self._blocks: Iterator[pa.Table] = iter(())
        self._num_given = 0
        self._kept: deque[tuple[ray.ObjectRef[pa.Table], int]] = deque()
        self._kept_bytes = 0

    def start(self, *options: Any) -> None:
        super().start(*options)
        self._blocks = iter(self._planned)
        self._next = next(self._blocks, None)

    def has_next(self) -> bool:
        waiting = self._num_given - self.output_dependencies[0].metrics.num_inputs_received
        return self._next is not None and waiting < _MAX_WAITING

    def has_completed(self) -> bool:
        return self._next is None

    def _get_next_inner(self) -> RefBundle:
        block = self._next
        assert block is not None, "asked for where `has_next` says there is none"
        self._next = next(self._blocks, None)
        num_bytes = block.nbytes
        reference = put_table(block)
        self._keep(reference, num_bytes)
        self._num_given += 1
        metadata = BlockMetadata(block.num_rows, num_bytes, None, None)
        return RefBundle([BlockEntry(reference, metadata)], owns_blocks=False, schema=block.schema)

    def _keep(self, reference: ray.ObjectRef[pa.Table], num_bytes: int) -> None:
        self._kept.append((reference, num_bytes))
        self._kept_bytes += num_bytes
        while self._kept_bytes > _KEPT_BYTES:
            self._kept_bytes -= self._kept.popleft()[1]
