"""The plan of a run; on a cluster its workers read the table's files and join the buckets."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from vlmflow.catalog import Catalog, Plan, plan_without_catalog
from vlmflow.catalog.columns import storable, taken
from vlmflow.catalog.plan_parts import NUM_BUCKETS, Ledger, buckets_of
from vlmflow.engine.cluster import ray_cluster
from vlmflow.engine.faults import get
from vlmflow.engine.prepare import Prepared
from vlmflow.sources import Source
from vlmflow.threads import Threads

logger = logging.getLogger("vlmflow")

_READ_AT_ONCE = 4  # files in a task
_TASKS_PER_CPU = 2  # under way at once, so that the next is there when one ends


class OnCluster:
    """Runs the parts of planning as Ray tasks; see :class:`vlmflow.catalog.plan_parts.Workers`.

    The ledger waits in the object store, which spills to the disks of the nodes; what is listed goes from the driver
    to the tasks, bucket by bucket.

    Args:
        num_cpus: of the cluster.
    """

    def __init__(self, num_cpus: float) -> None:
        if num_cpus < 1:
            logger.warning("no node of the cluster has a CPU now: planning waits until one joins that has")
        self._num_tasks = max(2, int(num_cpus) * _TASKS_PER_CPU)

    def spread(
        self, read: Callable[[int], pa.Table], numbers: Sequence[int], folder: Path, columns: pa.Schema
    ) -> Ledger:
        """Reads files in tasks, each of which gives one table per bucket."""
        reader = ray.put(read)
        remote = ray.remote(num_cpus=1, max_retries=3, num_returns=NUM_BUCKETS)(_read_buckets)
        groups = np.array_split(np.asarray(numbers), min(len(numbers), 2 * self._num_tasks)) if numbers else []
        return _InObjectStore([remote.remote(reader, group.tolist()) for group in groups])

    def map(self, function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """Runs calls as tasks, a bounded number at a time; arguments may be references."""
        shared = ray.put(function)
        remote = ray.remote(num_cpus=1, max_retries=3)(_call)
        pending: deque[ray.ObjectRef[Any]] = deque()
        for some in arguments:
            pending.append(remote.remote(shared, *some))
            if len(pending) >= self._num_tasks:
                yield get(pending.popleft())
        while pending:
            yield get(pending.popleft())


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def _read_buckets(read: Callable[[int], pa.Table], numbers: Sequence[int]) -> list[pa.Table]:
    with Threads(_READ_AT_ONCE) as pool:  # small ones for the most part, and a store answers late
        tables = list(pool.map(read, numbers))
    rows = pa.concat_tables(tables)
    buckets = buckets_of(rows)
    order = np.argsort(buckets, kind="stable")
    ordered = taken(rows, order)
    bounds = np.searchsorted(buckets[order], np.arange(NUM_BUCKETS + 1)).tolist()
    # A slice would carry the buffers of all buckets along.
    return [_own(ordered.slice(start, end - start)) for start, end in pairwise(bounds)]


def _own(rows: pa.Table) -> pa.Table:
    return taken(rows, np.arange(rows.num_rows))


@dataclass
class _InObjectStore:
    """References to tables, by task and bucket."""

    tables: list[list[ray.ObjectRef[pa.Table]]] = field(default_factory=list)

    def part(self, bucket: int) -> Sequence[Any]:
        return [tables[bucket] for tables in self.tables]

    def close(self) -> None:
        self.tables.clear()


@contextlib.contextmanager
def planned(prepared: Prepared, source: Source) -> Iterator[Plan]:
    """Plans against the catalog as it is; one that does not exist yet is not created, so bad input writes nothing.

    Where the job names a cluster, its workers share in it, and the connection stays for what follows.
    """
    request, config, ray_config = prepared.plan_request(), prepared.job.catalog, prepared.job.ray
    with contextlib.ExitStack() as stack:
        workers = None
        if ray_config.address is not None:
            workers = OnCluster(stack.enter_context(ray_cluster(ray_config)).cpus)
        if Catalog.exists(config):
            catalog = Catalog.open(config)
            catalog.check_source(source.columns)
            made = catalog.plan(source.list(), request, workers)
        else:
            storable(source.columns)  # what the catalog could not be created with is told now
            made = plan_without_catalog(source.list(), request, workers)
        made.num_duplicates += source.num_repeated
        with made:
            yield made
