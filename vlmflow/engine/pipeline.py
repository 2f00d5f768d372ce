"""The Ray Data pipeline of a run: planned references in, finished rows without pixels out."""

from __future__ import annotations

import dataclasses
import logging
import math
import warnings
from collections.abc import Callable, Iterable

import pyarrow as pa
from ray.data import ActorPoolStrategy, Dataset

from vlmflow.catalog import KnownBytes
from vlmflow.catalog.plan import Plan
from vlmflow.config import Job, PoolConfig
from vlmflow.engine.cluster import Cluster
from vlmflow.engine.decoding import ReadAndDecode, give_way
from vlmflow.engine.planned_blocks import dataset_of
from vlmflow.engine.pools import PoolWorker
from vlmflow.engine.prepare import Prepared
from vlmflow.engine.quarantine import Stages
from vlmflow.engine.read_ahead import ReadAheadRows, limit_read_ahead
from vlmflow.engine.starts import Starts
from vlmflow.engine.stored import Stored
from vlmflow.errors import ClusterError
from vlmflow.families import family_of
from vlmflow.imaging import merge_requests
from vlmflow.imaging.jpeg import MAX_JPEG_BYTES
from vlmflow.moderation.prompts import PromptVectors
from vlmflow.sources import Source
from vlmflow.sources.regions import RegionReader
from vlmflow.tasks.setup import TaskSetup

# Unequal to what a pool's actors ask for: Ray Data fuses a map into the actors behind it when both ask for the same.
DECODE_CPUS = 0.45
# Of an actor without a GPU, by default, where there are enough for several.
_CPUS_OF_ACTOR = 3
# Images that one decode call reads at once: their encoded bytes are in memory together.
DECODE_BATCH = 64
# Of an actor that decodes on a processor: it feeds one batch while it computes another.
_CALLS_AT_ONCE = 2
# Of an actor with a GPU: four batches are in its tasks at most, and decoding the next, whose kernels wait for those of
# the models, takes as long as two of them do. On an H100, with three in tasks at most, 5 were an eighth faster than 3,
# and 6 about as fast as 5.
GPU_CALLS_AT_ONCE = 5
_MIN_BLOCK_ROWS, _MAX_BLOCK_ROWS = 32, 512
# Of what a decoding task gives. Beyond 128 MB Ray Data cuts it where it will, and the pieces fit no pool's batch: of
# blocks of 512 JPEGs of 490 KB, which it cut to 320 and 192, half of the calls of an actor had 64 or 128 rows.
_MAX_BLOCK_BYTES = 96 << 20
_MIN_LARGE_ROWS = 8  # a task reads its images side by side
# Of an image whose size no listing tells.
_USUAL_BYTES = 500_000
# Of a pool with a GPU for which neither job nor preflight says a size. Models of a few hundred MB need large ones to be
# fast; others, and beams, take the memory of many images for each. On GPUs of less than 40 GB an actor does a part of
# its batch at once: the driver does not know them, and they need not be alike.
_GPU_BATCH, _GPU_BATCH_OF_LARGE = 256, 64
# Of an actor for which a node has to start, which takes minutes: some minutes of work.
_BATCHES_WORTH_A_NODE = 64
# A worker that dies by a signal is retried without limit unless told otherwise. Actors are restarted without limit, for
# many images may kill theirs; `starts` ends those that die before they have their models.
TASK_LIMITS = {"max_retries": 2}
ACTOR_LIMITS = {"max_restarts": -1, "max_task_retries": 2}


_WAITING = (
    "Until it has grown, images wait. If it is not to grow, end the run and lower cpus, gpus or min_actors in pools."
)

logger = logging.getLogger("vlmflow")


def default_pools(prepared: Prepared, cluster: Cluster) -> tuple[PoolConfig, ...]:
    """All tasks in one pool: on each GPU, or on the CPUs, of which decoding keeps a share.

    They are for the cluster as it may grow: it starts a node with a GPU only for actors that ask for one. On CPUs that
    happen to be there before, images would be computed for days.
    """
    job, cluster = prepared.job, cluster.grown
    if job.pools:
        wanted = set(job.tasks)
        kept = [(pool, tuple(task for task in pool.tasks if task in wanted)) for pool in job.pools]
        return tuple(pool.model_copy(update={"tasks": tasks}) for pool, tasks in kept if tasks)
    if cluster.gpus >= 1:
        num_gpus = int(cluster.gpus)
        size = _gpu_batch(prepared.setup)
        return (PoolConfig(tasks=job.tasks, gpus=1, cpus=1, max_actors=num_gpus, batch_size=size),)
    cores = max(1, int(cluster.cpus))
    if cores <= 4 or not cluster.has_node_for(_CPUS_OF_ACTOR):
        # One thread each: for small batches, actors side by side do more than threads inside one.
        # Where nodes may go away, actors must be able to: restarted on those that are left, they would hold every core,
        # and decoding, which they wait for, would get none.
        num_kept = cores if cluster.embedded else 1
        return (PoolConfig(tasks=job.tasks, cpus=0.5, min_actors=num_kept, max_actors=cores),)
    num_actors = cores // 4
    return (PoolConfig(tasks=job.tasks, cpus=_CPUS_OF_ACTOR, min_actors=1, max_actors=num_actors),)


def _gpu_batch(setup: TaskSetup) -> int:
    is_small = all(family_of(model.family).is_small for model in setup.models.values())
    return _GPU_BATCH if is_small and not setup.detectors and setup.num_beams == 1 else _GPU_BATCH_OF_LARGE


def open_pools(prepared: Prepared, cluster: Cluster) -> tuple[PoolConfig, ...]:
    """The pools of which a preflight is to find batch sizes and numbers of actors, where the job does not say them."""
    pools = default_pools(prepared, cluster)
    if prepared.job.pools:
        return pools
    sizes = {"batch_size", "min_actors", "max_actors"}
    return tuple(PoolConfig(**pool.model_dump(exclude=sizes, exclude_unset=True)) for pool in pools)


def check_pools(pools: tuple[PoolConfig, ...], cluster: Cluster) -> None:
    """Refuses pools that an embedded cluster can never start: Ray would wait for them without an end, and silently.

    Other clusters may grow when asked, so there the waiting is left to Ray, and the user is told what for. Where it is
    known what one may grow to, pools that this does not bear are refused, too.

    Raises:
        ClusterError: too few GPUs or CPUs.
    """
    is_known, cluster = bool(cluster.groups), cluster.grown
    for pool in pools:
        if not cluster.embedded and not cluster.has_node_for(pool.cpus, pool.gpus):
            actor = f"the {pool.cpus:g} CPUs and {pool.gpus:g} GPUs of an actor of pool {'+'.join(pool.tasks)}"
            if is_known:
                remedy = "Lower cpus or gpus in pools, or let the cluster have such nodes."
                raise ClusterError(f"no node that the cluster has or may start has {actor}", remedy=remedy)
            logger.warning("no node has %s. %s", actor, _WAITING)
            return
    for name, asked, offered in (
        ("GPU", sum(pool.min_actors * pool.gpus for pool in pools), cluster.gpus),
        ("CPU", sum(pool.min_actors * pool.cpus for pool in pools) + DECODE_CPUS, cluster.cpus),
    ):
        if asked <= offered:
            continue
        place = "this machine" if cluster.embedded else "the cluster"
        problem = f"pools ask for {asked:g} {name}s, decoding included, and {place} offers {offered:g}"
        if cluster.embedded:
            remedy = "Lower min_actors, cpus or gpus in pools, or give --ray-address."
            raise ClusterError(problem, remedy=remedy)
        logger.warning("%s. %s", problem, _WAITING)


def stages_of(
    prepared: Prepared,
    source: Source,
    pools: tuple[PoolConfig, ...],
    prompts: PromptVectors | None,
    known: Stored[KnownBytes] | None,
) -> Stages:
    """What each image of the job goes through."""
    setup, limits = prepared.setup, prepared.job.limits
    requests = tuple(merge_requests(setup.pixel_requests()))
    in_pool = decodes_in_pool(prepared.job, pools)
    config, regions = prepared.job.source, None
    if config.regions_column is not None and setup.read_regions(prepared.job.tasks):
        regions = RegionReader(config, source.version)
    decode = ReadAndDecode(
        source.reader(limits),
        requests,
        limits,
        known,
        leaves_jpegs=in_pool,
        regions=regions,
        for_gpu=any(pool.gpus > 0 for pool in pools),
    )
    return Stages(decode, pools, setup, prompts, sized_by_memory=not prepared.job.pools)


def planned_block_rows(plan: Plan, stages: Stages, cluster: Cluster, max_rows: int) -> int:
    """See :func:`block_rows`."""
    if stages.decode.leaves_jpegs:
        # No larger ones are left to a pool: what it then gets are pixels.
        row_bytes = min(plan.usual_size() or _USUAL_BYTES, MAX_JPEG_BYTES)
    else:
        requests = merge_requests(stages.setup.pixel_requests())
        row_bytes = sum(3 * request.size**2 * len(request.views) for request in requests)
    return block_rows(plan.num_planned, cluster, max_rows, stages.pools[0].batch_size, row_bytes)


def block_rows(num_images: int, cluster: Cluster, max_rows: int, batch_size: int, row_bytes: float) -> int:
    """Rows of a block of planned images: few enough to keep every core busy, and to be committed in time.

    An actor is given whole blocks at a call, and what is left of them beyond its batches is a small batch of its own;
    so a block is some whole batches, or an equal part of one.

    The cores are those of the cluster as it may grow.

    Args:
        max_rows: after how many rows the job wants a commit; an unfinished block is in none.
        batch_size: of the first pool. Where no part of it comes near, blocks do not fit it.
        row_bytes: of an image as the decoding stage gives it, about.
    """
    per_core = num_images / max(1.0, 4 * cluster.grown.cpus)
    in_one_piece = max(_MIN_LARGE_ROWS, _MAX_BLOCK_BYTES / max(1.0, row_bytes))
    rows = int(min(_MAX_BLOCK_ROWS, max_rows, max(_MIN_BLOCK_ROWS, per_core), in_one_piece))
    if rows >= batch_size:
        return rows - rows % batch_size
    part = max(part for part in range(1, rows + 1) if batch_size % part == 0)
    return part if 2 * part > rows else rows


def fit_to_plan(stages: Stages, job: Job, plan: Plan, cluster: Cluster) -> tuple[Stages, int]:
    """The rows of a block of planned images, see :func:`block_rows`, and no more actors than there are blocks.

    Others would load their models, which takes most of a small run, and be given nothing. Nor more than there is room
    for, unless those have enough to do that a node is worth its start. How many the job itself asks for, it gets.
    """
    num_rows = planned_block_rows(plan, stages, cluster, job.commit.max_rows)
    if job.pools:
        return stages, num_rows
    num_blocks = math.ceil(plan.num_planned / num_rows)
    pools = []
    for pool in stages.pools:
        room = math.floor(cluster.gpus / pool.gpus if pool.gpus else cluster.cpus / pool.cpus)
        worth = math.ceil(plan.num_planned / (_BATCHES_WORTH_A_NODE * pool.batch_size))
        num_actors = min(pool.max_actors, num_blocks, max(room, worth))
        changes = {"min_actors": min(pool.min_actors, num_actors), "max_actors": num_actors}
        pools.append(pool.model_copy(update=changes))
    return dataclasses.replace(stages, pools=tuple(pools)), num_rows


def build_pipeline(blocks: Iterable[pa.Table], stages: Stages, num_rows: int, read_ahead: int | None = None) -> Dataset:
    """Chains decoding and the pools; nothing runs until the dataset is consumed.

    Args:
        num_rows: of each block, see :func:`block_rows`.
        read_ahead: as in the job.
    """
    leaves_jpegs = stages.decode.leaves_jpegs
    calls = tuple(
        _calls_at_once(pool, decodes=leaves_jpegs and number == 0) for number, pool in enumerate(stages.pools)
    )
    # A pool that decodes is as fast as all of them together. Before another some wait for their turn: what they have
    # decoded lies in memory until the pool has come to it.
    rows_per_task = max(num_rows, DECODE_BATCH) if leaves_jpegs else 2 * DECODE_BATCH
    limit_read_ahead(ReadAheadRows(read_ahead, stages.pools, calls, rows_per_task, DECODE_CPUS))
    dataset = dataset_of(blocks)
    with warnings.catch_warnings():
        # Ray 2.60 announces named parameters for these arguments and has none for the retries yet.
        warnings.filterwarnings("ignore", message=".*ray_remote_args.*")
        dataset = dataset.map_batches(
            _as_function(stages.decode),
            batch_format="pyarrow",
            # At most a block: Ray Data joins smaller ones to a batch, and what it joins here may fit no pool's batch.
            batch_size=min(DECODE_BATCH, num_rows),
            num_cpus=DECODE_CPUS,
            **TASK_LIMITS,
        )
        for number, pool in enumerate(stages.pools):
            decodes = leaves_jpegs and number == 0
            later = tuple(task for behind in stages.pools[number + 1 :] for task in behind.tasks)
            dataset = dataset.map_batches(
                PoolWorker,
                fn_constructor_args=(pool, stages.setup, stages.prompts),
                fn_constructor_kwargs={
                    "starts": Starts("+".join(pool.tasks)),
                    "later": later,
                    "decoding": stages.decoding if decodes else None,
                    "sized_by_memory": stages.sized_by_memory,
                },
                batch_format="pyarrow",
                batch_size=pool.batch_size,
                num_cpus=pool.cpus,
                num_gpus=pool.gpus,
                # A fixed pool that reserves every CPU starves the reads and waits for ever (ray#44687).
                compute=_strategy(pool, calls[number]),
                **ACTOR_LIMITS,
            )
    return dataset


def _calls_at_once(pool: PoolConfig, *, decodes: bool) -> int:
    if pool.gpus > 0:
        return GPU_CALLS_AT_ONCE
    return _CALLS_AT_ONCE if decodes else 1


def _strategy(pool: PoolConfig, calls_at_once: int) -> ActorPoolStrategy:
    """Of a pool's actors, each of which is at so many batches at once."""
    calls = {}
    if calls_at_once > 1:
        calls = {"max_concurrent_calls_per_actor": calls_at_once, "enable_true_multi_threading": True}
    return ActorPoolStrategy(min_size=pool.min_actors, max_size=pool.max_actors, **calls)


def decodes_in_pool(job: Job, pools: tuple[PoolConfig, ...]) -> bool:
    """Whether the first pool decodes the JPEGs."""
    return job.decode == "pool" or (job.decode == "auto" and pools[0].gpus > 0)


def _as_function(decode: ReadAndDecode) -> Callable[[pa.Table], pa.Table]:
    # Ray Data takes a callable object for a class to be built in actors; a function runs in tasks.
    def read_and_decode(batch: pa.Table) -> pa.Table:
        if decode.for_gpu:
            give_way()
        return decode(batch)

    return read_and_decode
