"""Before a run: batch sizes and numbers of actors from a short measurement, and how long the run will take."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from vlmflow.catalog import Plan
from vlmflow.config import Frozen, PoolConfig
from vlmflow.engine import columns
from vlmflow.engine.cluster import Cluster
from vlmflow.engine.faults import get, of_node
from vlmflow.engine.nodes import check_decoders, check_disks, decoders, unfound
from vlmflow.engine.pipeline import DECODE_CPUS
from vlmflow.engine.quarantine import Stages
from vlmflow.engine.trials import Trial, TriedPool, choose, resources
from vlmflow.errors import SourceError

# Images that are tried, spread over the first ones due: more would have to be looked for in the whole listing.
_SAMPLE = 96
_AMONG = 4_096
_HOUR = 3600.0


class PoolPlan(Frozen):
    """A pool as it was tried.

    Attributes:
        pool: with the batch size and the number of actors that the measurement suggests, where the job does not say.
        memory_bytes: what an actor holds at that batch size, of ``memory_total``.
        images_per_s: of one actor.
    """

    pool: PoolConfig
    trials: tuple[Trial, ...]
    memory_bytes: int
    memory_total: int
    images_per_s: float


class PreflightReport(Frozen):
    """What a run would need.

    Attributes:
        num_due: images that the run would do.
        num_sampled: images that were tried.
        read_images_per_s: of one worker, which spends its time waiting for the store. Others wait beside it.
        decode_images_per_s: of one processor; where JPEGs are decoded in the pools, what is left to processors.
        images_per_s: that the run can be expected to reach, after its start-up.
        hours: of the run.
        limited_by: what keeps it from being faster.
    """

    num_due: int
    num_sampled: int
    read_images_per_s: float
    decode_images_per_s: float
    pools: tuple[PoolPlan, ...]
    images_per_s: float
    hours: float
    limited_by: str

    @property
    def chosen(self) -> tuple[PoolConfig, ...]:
        """The pools, as a job may say them."""
        return tuple(plan.pool for plan in self.pools)


def measure(planned: Plan, stages: Stages, cluster: Cluster) -> PreflightReport:
    """Tries each pool on some of the images that are due, in workers that are gone afterwards. Writes nothing.

    What is projected is for the cluster as it may grow.

    Raises:
        SourceError: none of the images tried can be decoded, or has anything to compute.
        WeightsError: a model's weights do not fit.
    """
    sample, read_s, decode_s = _decoded(planned, stages)
    num_sampled = sample.num_rows
    usable = sample.filter(pa.compute.greater(pa.compute.list_value_length(sample[columns.RUN_TASKS]), 0))
    if not usable.num_rows:
        raise _nothing_to_try(sample)
    core_s, cluster = decode_s / num_sampled, cluster.grown
    plans: list[PoolPlan] = []
    for number, pool in enumerate(stages.pools):
        actor = ray.remote(**resources(pool), max_restarts=0)(TriedPool).remote(stages, number)
        try:
            sizes = (pool.batch_size,) if "batch_size" in pool.model_fields_set else None
            trials, memory_total = get(actor.run.remote(usable, sizes))
            if number + 1 < len(stages.pools):
                usable = get(actor.finished.remote(usable))
        finally:
            ray.kill(actor)
        plans.append(_planned(pool, trials, memory_total))
    plans = [_sized(plan, plans, cluster, core_s) for plan in plans]
    rate, limited_by = _projected(plans, cluster, core_s, read_s / num_sampled)
    return PreflightReport(
        num_due=planned.num_planned,
        num_sampled=num_sampled,
        read_images_per_s=_rate(num_sampled, read_s),
        decode_images_per_s=_rate(num_sampled, decode_s),
        pools=tuple(plans),
        images_per_s=round(rate, 4),
        hours=round(planned.num_planned / max(rate, 1e-9) / _HOUR, 3),
        limited_by=limited_by,
    )


def _nothing_to_try(sample: pa.Table) -> SourceError:
    """The error for a sample of which no image has a task left."""
    num_failed = int(pa.compute.sum(pa.compute.greater(pa.compute.list_value_length(sample["errors"]), 0)).as_py() or 0)
    if num_failed == sample.num_rows:
        message = f"none of the first {num_failed} images tried can be decoded"
        return SourceError(message, remedy="Check the source; `vlmflow plan`.")
    # Images that were only to be looked at again, and are as they were.
    failed = f", and {num_failed} cannot be decoded" if num_failed else ""
    message = f"none of the first {sample.num_rows} images tried has anything to compute{failed}"
    return SourceError(message, remedy="Run without --preflight: what has not changed needs no model.")


def _decoded(planned: Plan, stages: Stages) -> tuple[pa.Table, float, float]:
    """Some of the images due, read and decoded in one worker; the seconds of each."""
    first = next(iter(planned.batches(max_rows=_AMONG)))
    chosen = np.unique(np.linspace(0, first.num_rows - 1, min(_SAMPLE, first.num_rows)).astype(np.int64))
    decode = stages.decode
    # Once to set up libraries and connections, once to be timed.
    worker = ray.remote(num_cpus=1)(lambda rows: (decode(rows.slice(0, 4)), decode(rows))[1])
    sample: pa.Table = get(worker.remote(first.take(pa.array(chosen))))
    lost, node = (sample[name][0].as_py() for name in (columns.FATAL, columns.NODE))
    if lost:
        raise SourceError(of_node(lost, node), remedy="Mend the access to the source's store.")
    check_disks(unfound(sample))
    check_decoders(decoders(sample))
    spent = [float(pa.compute.sum(sample[columns.seconds_column(stage)]).as_py()) for stage in ("read", "decode")]
    timing = [name for name in sample.column_names if name.startswith(columns.SECONDS_PREFIX)]
    return sample.drop_columns(timing), spent[0], spent[1]


def _planned(pool: PoolConfig, trials: list[Trial], memory_total: int) -> PoolPlan:
    best = choose(trials)
    fields: dict[str, Any] = {"batch_size": best.batch_size}
    return PoolPlan(
        pool=PoolConfig(**pool.model_dump(exclude_unset=True) | fields),
        trials=tuple(trials),
        memory_bytes=best.memory_bytes,
        memory_total=memory_total,
        images_per_s=best.images_per_s,
    )


def _sized(plan: PoolPlan, plans: list[PoolPlan], cluster: Cluster, core_s: float) -> PoolPlan:
    """With as many actors as the cluster bears beside those of which the job says how many, unless this is one."""
    pool = plan.pool
    if _is_said(plan):
        return plan
    said, others = [other for other in plans if _is_said(other)], [other for other in plans if not _is_said(other)]
    if pool.gpus:
        taken = sum(_at_once(other.pool, cluster) * other.pool.gpus for other in said)
        num_actors = _fitting(cluster.gpus - taken, sum(other.pool.gpus for other in others))
    else:
        # Every image takes its core-seconds in decoding and in each pool: the pool gets its part of the cores.
        busy_s = [_cores(other.pool) / max(other.images_per_s, 1e-9) for other in plans if not other.pool.gpus]
        mine = _cores(pool) / max(plan.images_per_s, 1e-9)
        num_actors = max(1, math.floor(cluster.cpus * mine / (sum(busy_s) + core_s) / _cores(pool) + 0.5))
        taken = sum(other.pool.max_actors * other.memory_bytes for other in said if not other.pool.gpus)
        held = sum(other.memory_bytes for other in others if not other.pool.gpus)
        fitting = _fitting(cluster.memory - taken, held) if math.isfinite(cluster.memory) else num_actors
        num_actors = min(num_actors, fitting, _fitting(cluster.cpus, pool.cpus))
    return plan.model_copy(update={"pool": PoolConfig(**pool.model_dump(exclude_unset=True), max_actors=num_actors)})


def _is_said(plan: PoolPlan) -> bool:
    return "max_actors" in plan.pool.model_fields_set


def _fitting(there: float, share: float) -> int:
    """How many shares are there, one at least; 0.2 is a little more than a fifth, and `//` would find four in 1."""
    return max(1, math.floor(there / share + 1e-9))


def _projected(plans: list[PoolPlan], cluster: Cluster, core_s: float, read_s: float = 0.0) -> tuple[float, str]:
    """Images a second, and what limits them: the slowest pool, or the GPUs or processors that all share, or the store.

    Args:
        core_s: of a processor, for an image in decoding.
        read_s: that the worker waits for the image before; others wait side by side, as many as there is room for.
    """
    with_gpu = [plan for plan in plans if plan.pool.gpus]
    limits = {_name(plan): _at_once(plan.pool, cluster) * plan.images_per_s for plan in plans}
    if len(with_gpu) > 1 and cluster.embedded:
        gpu_s_of = {_name(plan): plan.pool.gpus / max(plan.images_per_s, 1e-9) for plan in with_gpu}
        limits[f"the GPUs, most of all {_largest(gpu_s_of)}"] = cluster.gpus / sum(gpu_s_of.values())
    used = sum(_at_once(plan.pool, cluster) * plan.pool.cpus for plan in with_gpu)
    core_s_of = {_name(plan): _cores(plan.pool) / max(plan.images_per_s, 1e-9) for plan in plans if not plan.pool.gpus}
    core_s_of["decoding"] = core_s
    num_cores = max(1.0, cluster.cpus - used)
    limits[f"the processors, most of all {_largest(core_s_of)}"] = num_cores / sum(core_s_of.values())
    # Actors on processors may be fewer while they have nothing to do.
    used += sum(plan.pool.min_actors * plan.pool.cpus for plan in plans if not plan.pool.gpus)
    limits["reading"] = _fitting(cluster.cpus - used, DECODE_CPUS) / max(read_s + core_s, 1e-9)
    limited_by = min(limits, key=lambda name: limits[name])
    return limits[limited_by], limited_by


def _at_once(pool: PoolConfig, cluster: Cluster) -> int:
    """Actors of a pool that work side by side. Other clusters than an embedded one may get GPUs for all."""
    if not pool.gpus or not cluster.embedded:
        return pool.max_actors
    return min(pool.max_actors, _fitting(cluster.gpus, pool.gpus))


def _largest(amounts: dict[str, float]) -> str:
    return max(amounts, key=lambda name: amounts[name])


def _name(plan: PoolPlan) -> str:
    return f"pool {'+'.join(plan.pool.tasks)}"


def _cores(pool: PoolConfig) -> float:
    """Processors that an actor keeps busy: one thread each, however small its share."""
    return max(1.0, float(math.floor(pool.cpus)))


def _rate(count: int, seconds: float) -> float:
    return round(count / seconds, 2) if seconds > 0 else 0.0
