"""Batch sizes, numbers of actors and the projected rate, from trials that are made up."""

from __future__ import annotations

import datetime as dt
import re
import threading
import time
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch

from vlmflow.config import CatalogConfig, CommitConfig, Job, ModelConfig, PoolConfig, SourceConfig
from vlmflow.engine import pipeline, sizing
from vlmflow.engine import trials as trials_module
from vlmflow.engine.cluster import Cluster
from vlmflow.engine.columns import RUN_TASKS
from vlmflow.engine.pipeline import (
    GPU_CALLS_AT_ONCE,
    block_rows,
    build_pipeline,
    check_pools,
    default_pools,
    fit_to_plan,
    planned_block_rows,
    stages_of,
)
from vlmflow.engine.prepare import Prepared
from vlmflow.engine.quarantine import Stages
from vlmflow.engine.sizing import PoolPlan, _planned, _projected, _sized
from vlmflow.engine.trials import Trial, TriedPool, choose
from vlmflow.errors import SourceError
from vlmflow.imaging import PixelRequest
from vlmflow.schema import ERRORS


@pytest.mark.parametrize(
    ("num_failed", "told", "remedy"),
    [
        (0, "none of the first 3 images tried has anything to compute", "Run without --preflight"),
        (1, "none of the first 3 images tried has anything to compute, and 1 cannot be decoded", "without --preflight"),
        (3, "none of the first 3 images tried can be decoded", "Check the source"),
    ],
)
def test_a_sample_without_anything_to_compute_is_no_source_without_images(
    num_failed: int, told: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = {"stage": "read", "class": "missing", "message": ""}
    errors = [[error]] * num_failed + [[]] * (3 - num_failed)
    sample = pa.table({RUN_TASKS: pa.array([[]] * 3, pa.list_(pa.string())), "errors": pa.array(errors, ERRORS)})
    monkeypatch.setattr(sizing, "_decoded", lambda *_: (sample, 1.0, 1.0))
    nothing: Any = None
    with pytest.raises(SourceError) as caught:
        sizing.measure(nothing, nothing, nothing)
    assert str(caught.value) == told
    assert remedy in caught.value.remedy


def trial(size: int, rate: float, *, fits: bool = True) -> Trial:
    return Trial(batch_size=size, images_per_s=rate, memory_bytes=size, fits=fits, tasks={})


def plan(rate: float, **pool: object) -> PoolPlan:
    return _planned(PoolConfig(tasks=("embed",), **pool), [trial(8, rate)], 100)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("trials", "chosen"),
    [
        ([trial(8, 10), trial(16, 15), trial(32, 15.5), trial(64, 12)], 16),
        ([trial(8, 10), trial(16, 9)], 8),
        ([trial(16, 100), trial(32, 200, fits=False)], 16),
        ([trial(16, 5, fits=False)], 16),
    ],
    ids=["nearly the fastest", "the first", "what fits", "nothing fits"],
)
def test_the_smallest_batch_that_is_nearly_the_fastest_is_chosen(trials: list[Trial], chosen: int) -> None:
    assert choose(trials).batch_size == chosen


def test_each_gpu_gets_an_actor_and_what_the_job_says_stays() -> None:
    cluster = Cluster(cpus=32, gpus=4, num_nodes=1, embedded=True)
    found = plan(500.0, gpus=1.0)
    assert _sized(found, [found], cluster, 0.001).pool.max_actors == 4
    said = plan(500.0, gpus=1.0, max_actors=2)
    assert _sized(said, [said], cluster, 0.001).pool.max_actors == 2
    shared = [plan(500.0, gpus=0.5), plan(300.0, gpus=0.5)]
    assert [_sized(each, shared, cluster, 0.001).pool.max_actors for each in shared] == [4, 4]


def test_what_the_job_says_of_one_pool_is_left_to_it_and_no_more() -> None:
    """A job that gave one of two pools an actor left 3 of 8 GPUs idle, or two pools more memory than there is."""
    cluster = Cluster(cpus=64, gpus=8, num_nodes=1, embedded=True, memory=16.0)
    one, many = plan(500.0, gpus=1.0, max_actors=1), plan(500.0, gpus=0.5, max_actors=12)
    found = plan(300.0, gpus=1.0)
    assert _sized(found, [one, found], cluster, 0.001).pool.max_actors == 7
    assert _sized(found, [many, found], cluster, 0.001).pool.max_actors == 2
    assert _sized(found, [plan(1.0, gpus=1.0, max_actors=8), found], cluster, 0.001).pool.max_actors == 1
    said, open_one = plan(2.0, max_actors=6), plan(2.0)
    pools = [each.model_copy(update={"memory_bytes": 2}) for each in (said, open_one)]
    assert _sized(pools[1], pools, cluster, 0.01).pool.max_actors == 2


def test_shares_that_are_no_binary_fraction_leave_nothing_over() -> None:
    cluster = Cluster(cpus=32, gpus=1, num_nodes=1, embedded=True)
    for share, num_actors in ((0.2, 5), (0.1, 10), (0.05, 20), (0.25, 4), (0.3, 3)):
        found = plan(500.0, gpus=share)
        assert _sized(found, [found], cluster, 0.001).pool.max_actors == num_actors
    shared = [plan(500.0, gpus=0.1), plan(300.0, gpus=0.2)]
    assert _sized(shared[0], shared, cluster, 0.001).pool.max_actors == 3


@pytest.mark.parametrize(
    ("family", "changes", "size"),
    [
        ("blip_caption", {}, 256),
        ("blip_caption", {"num_beams": 3}, 64),
        ("blip_caption", {"detectors": ("nsfw",)}, 64),
        ("vlm", {}, 64),
        ("blip2_caption", {}, 64),
    ],
    ids=["small", "beams", "detectors", "prompted", "large"],
)
def test_a_gpu_is_given_as_many_images_as_its_models_leave_room_for(
    family: str, changes: dict[str, object], size: int
) -> None:
    models = {"embed": ModelConfig(family="open_clip", path="a"), "caption": ModelConfig(family=family, path="b")}  # type: ignore[arg-type]
    setup = SimpleNamespace(models=models, **({"detectors": (), "num_beams": 1} | changes))
    job = Job.model_construct(pools=(), tasks=("embed", "caption"))
    prepared = Prepared(job, dt.date(2026, 1, 1), setup, {})  # type: ignore[arg-type]
    (pool,) = default_pools(prepared, Cluster(cpus=16, gpus=2, num_nodes=1, embedded=True))
    assert (pool.batch_size, pool.max_actors) == (size, 2)
    (pool,) = default_pools(prepared, Cluster(cpus=16, gpus=0, num_nodes=1, embedded=True))
    assert pool.batch_size == 32, "on processors it is small for any"


def test_no_actor_asks_for_more_cores_than_a_node_has() -> None:
    """Such an actor is never started, whatever the nodes have together."""
    job = Job.model_construct(pools=(), tasks=("embed", "caption"))
    prepared = Prepared(job, dt.date(2026, 1, 1), None, {})  # type: ignore[arg-type]
    for node, cpus in ((2.0, 0.5), (4.0, 3.0)):
        cluster = Cluster(cpus=8 * node, gpus=0, num_nodes=8, embedded=False, nodes=((node, 0.0),) * 8)
        (pool,) = default_pools(prepared, cluster)
        assert pool.cpus == cpus
        assert pool.max_actors * pool.cpus < cluster.cpus, "decoding has its share"


@pytest.mark.parametrize("node", [1.0, 2.0, 6.0])
def test_actors_that_outnumber_the_nodes_left_may_end(node: float) -> None:
    """Ray restarts those of a node that is gone on the others; where they take all cores, decoding waits for ever."""
    job = Job.model_construct(pools=(), tasks=("embed", "caption"))
    prepared = Prepared(job, dt.date(2026, 1, 1), None, {})  # type: ignore[arg-type]
    cluster = Cluster(cpus=2 * node, gpus=0, num_nodes=2, embedded=False, nodes=((node, 0.0),) * 2)
    (pool,) = default_pools(prepared, cluster)
    assert pool.max_actors * pool.cpus >= node, "those of both nodes fill one"
    assert pool.min_actors * pool.cpus + pipeline.DECODE_CPUS <= node


@pytest.mark.parametrize(
    ("pool", "words"),
    [
        ({"gpus": 1}, "no node has the 1 CPUs and 1 GPUs of an actor of pool embed.caption"),
        ({"cpus": 4}, "no node has the 4 CPUs and 0 GPUs"),
        ({"cpus": 2, "min_actors": 3, "max_actors": 3}, "pools ask for 6.45 CPUs, .* and the cluster offers 4"),
        ({"cpus": 1.5, "min_actors": 2, "max_actors": 3}, None),
    ],
)
def test_what_a_run_on_a_cluster_waits_for_is_told(
    pool: dict[str, Any], words: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = Cluster(cpus=4, gpus=0, num_nodes=2, embedded=False, nodes=((2.0, 0.0),) * 2)
    check_pools((PoolConfig(tasks=("embed", "caption"), **pool),), cluster)
    assert len(caplog.messages) == (words is not None)
    assert words is None or re.search(words, caplog.text)
    assert words is None or "images wait" in caplog.text


@pytest.mark.parametrize(("pools", "by_memory"), [((), True), ((PoolConfig(tasks=("embed",), gpus=1),), False)])
def test_only_sizes_that_nobody_chose_depend_on_the_memory_of_a_gpu(
    pools: tuple[PoolConfig, ...], by_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dataset:
        def map_batches(self, *_: object, **options: Any) -> Dataset:
            given.append(options)
            return self

    given: list[dict[str, Any]] = []
    monkeypatch.setattr(pipeline, "dataset_of", lambda _: Dataset())
    monkeypatch.setattr(pipeline, "limit_read_ahead", lambda _: None)
    places = {"source": SourceConfig(uri="a"), "catalog": CatalogConfig(uri="b")}
    job = Job(**places, profile="starter", tasks=("embed",), pools=pools)  # type: ignore[arg-type]
    setup = SimpleNamespace(pixel_requests=list, read_regions=lambda _: False)
    source = SimpleNamespace(reader=lambda _: None)
    prepared = Prepared(job, dt.date(2026, 1, 1), setup, {})  # type: ignore[arg-type]
    stages = stages_of(prepared, source, (PoolConfig(tasks=("embed",), gpus=1),), None, None)  # type: ignore[arg-type]
    build_pipeline([], stages, 32)
    assert given[-1]["fn_constructor_kwargs"]["sized_by_memory"] is by_memory
    assert given[-1]["fn_constructor_kwargs"]["starts"].pool == "+".join(given[-1]["fn_constructor_args"][0].tasks)


def test_processors_are_split_by_what_an_image_takes_in_each_place() -> None:
    cluster = Cluster(cpus=16, gpus=0, num_nodes=1, embedded=True)
    # 3 cores for 1.5 s an image against 0.5 s of decoding: 9 of 10 parts of 16 cores, three cores an actor.
    found = plan(2.0 / 3.0, cpus=3.0)
    assert _sized(found, [found], cluster, 0.5).pool.max_actors == 5
    # Where decoding takes as long, half of the cores are left to it.
    light = plan(10.0, cpus=1.0)
    assert _sized(light, [light], cluster, 0.1).pool.max_actors == 8


def test_processors_get_no_more_actors_than_there_is_memory_for() -> None:
    cluster = Cluster(cpus=16, gpus=0, num_nodes=1, embedded=True, memory=11.0)
    large = plan(2.0, cpus=1.0).model_copy(update={"memory_bytes": 4})
    assert _sized(large, [large], cluster, 0.01).pool.max_actors == 2
    smaller = plan(2.0, cpus=1.0).model_copy(update={"memory_bytes": 1})
    pools = [large, smaller]
    assert [_sized(each, pools, cluster, 0.01).pool.max_actors for each in pools] == [2, 2]
    on_gpu = plan(500.0, gpus=1.0).model_copy(update={"memory_bytes": 40})
    assert _sized(smaller, [on_gpu, smaller], cluster, 0.01).pool.max_actors == 11, "a GPU has its own"
    said = plan(2.0, cpus=1.0, max_actors=4).model_copy(update={"memory_bytes": 4})
    assert _sized(said, [said], cluster, 0.01).pool.max_actors == 4


def test_the_memory_of_a_container_is_what_its_limit_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials_module, "get_system_memory", lambda: 4 << 30)
    _, memory_total = tried(monkeypatch, Sleeping())
    assert memory_total == 4 << 30


def test_the_projected_rate_is_that_of_the_narrowest_place() -> None:
    cluster = Cluster(cpus=16, gpus=1, num_nodes=1, embedded=True)
    gpu = plan(1_000.0, gpus=1.0, max_actors=1)
    assert _projected([gpu], cluster, core_s=0.001) == (1_000.0, "pool embed")
    rate, limited_by = _projected([gpu], cluster, core_s=0.02)
    assert rate == pytest.approx(15 / 0.02)
    assert limited_by == "the processors, most of all decoding"
    cpu = plan(2.0, cpus=1.0, max_actors=16)
    rate, limited_by = _projected([cpu], cluster, core_s=0.1)
    assert rate == pytest.approx(16 / 0.6)
    assert limited_by == "the processors, most of all pool embed"


def test_a_store_that_answers_slowly_limits_what_is_projected() -> None:
    """A worker that waits for images holds its share of a processor: so many wait at once, whatever the models do."""
    cluster = Cluster(cpus=16, gpus=1, num_nodes=1, embedded=True)
    gpu = plan(1_000.0, gpus=1.0, max_actors=1)
    rate, limited_by = _projected([gpu], cluster, core_s=0.001, read_s=0.5)
    assert limited_by == "reading"
    assert rate == pytest.approx(33 / 0.501), "33 shares of 0.45 are in the 15 processors that the actor leaves"
    assert _projected([gpu], cluster, core_s=0.001, read_s=0.005) == (1_000.0, "pool embed")
    cpu = plan(2.0, cpus=1.0, min_actors=2, max_actors=16)
    assert _projected([cpu], cluster, core_s=0.001, read_s=2.0)[0] == pytest.approx(31 / 2.001), "actors may go away"
    full = plan(2.0, cpus=1.0, min_actors=16, max_actors=16)
    assert _projected([full], cluster, core_s=0.001, read_s=1.0)[0] == pytest.approx(1 / 1.001), "one has room, always"


def test_actors_for_which_there_is_no_gpu_speed_nothing_up() -> None:
    cluster = Cluster(cpus=16, gpus=1, num_nodes=1, embedded=True)
    alone = plan(1_000.0, gpus=1.0, max_actors=8)
    assert _projected([alone], cluster, core_s=0.001) == (1_000.0, "pool embed")
    # Decoding has the cores of the actors that never start.
    assert _projected([alone], cluster, core_s=0.1)[0] == pytest.approx(15 / 0.1)
    thirds = plan(100.0, gpus=0.3, max_actors=8)
    assert _projected([thirds], cluster, core_s=0.001) == (300.0, "pool embed")
    matching = PoolConfig(tasks=("match",), gpus=0.5, max_actors=4)
    shared = [plan(500.0, gpus=0.5, max_actors=4), _planned(matching, [trial(8, 250.0)], 100)]
    rate, limited_by = _projected(shared, cluster, core_s=0.001)
    assert rate == pytest.approx(1 / (0.5 / 500 + 0.5 / 250))
    assert limited_by == "the GPUs, most of all pool match"
    growing = Cluster(cpus=16, gpus=1, num_nodes=1, embedded=False)
    assert _projected([alone], growing, core_s=0.001)[0] == 8_000.0, "such a cluster may get the nodes for them"


@pytest.mark.parametrize(
    ("num_images", "batch_size", "max_rows", "row_bytes", "expected"),
    [
        (12_000, 256, 5_000, 1e5, 128),  # 187 would keep 16 cores busy: 32 of 65 batches had 118 rows
        (100_000, 256, 5_000, 1e5, 512),
        (100_000, 200, 5_000, 1e5, 400),
        (100, 128, 5_000, 1e5, 32),
        (100_000, 1_000, 5_000, 1e5, 500),
        (100_000, 32, 20, 1e5, 16),
        (100_000, 509, 300, 1e5, 300),  # has no such part
        (100_000, 256, 5_000, 490_000, 128),  # of 512 rows Ray Data made blocks of 320 and 192
        (100_000, 256, 5_000, 5e6, 16),
        (100_000, 256, 5_000, 5e8, 8),  # as many are read side by side
        (100_000, 256, 5_000, 0, 512),
    ],
)
def test_blocks_are_whole_batches_or_equal_parts_of_one(
    num_images: int, batch_size: int, max_rows: int, row_bytes: float, expected: int
) -> None:
    cluster = Cluster(cpus=16, gpus=1, num_nodes=1, embedded=True)
    assert block_rows(num_images, cluster, max_rows, batch_size, row_bytes) == expected


@pytest.mark.parametrize(
    ("in_pool", "usual", "expected"),
    [(True, 1e6, 64), (True, 12e6, 8), (True, 1e9, 8), (True, None, 128), (False, 1e9, 64), (False, None, 64)],
)
def test_blocks_are_so_small_that_ray_data_leaves_them_whole(in_pool: bool, usual: float | None, expected: int) -> None:
    """By the bytes of files where the pool decodes them, else by those of pixels, of which an image has 1 MB here."""
    requests = [PixelRequest(256, "bicubic", ("squash", "center", "top", "bottom", "left"))]
    stages = SimpleNamespace(
        decode=SimpleNamespace(leaves_jpegs=in_pool),
        setup=SimpleNamespace(pixel_requests=lambda: requests),
        pools=[PoolConfig(tasks=("embed",), batch_size=256)],
    )
    planned = SimpleNamespace(num_planned=100_000, usual_size=lambda: usual)
    cluster = Cluster(cpus=16, gpus=1, num_nodes=1, embedded=True)
    assert planned_block_rows(planned, stages, cluster, 5_000) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("num_images", "own", "expected"),
    [(1, False, (1, 1)), (32, False, (1, 1)), (33, False, (2, 2)), (900, False, (2, 4)), (1, True, (2, 4))],
)
def test_no_actor_is_started_that_would_be_given_nothing(
    num_images: int, own: bool, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "planned_block_rows", lambda *_: 32)
    pool = PoolConfig(tasks=("embed",), min_actors=2, max_actors=4)
    stages = Stages(None, (pool,), None, None)  # type: ignore[arg-type]
    job = Job.model_construct(pools=(pool,) if own else (), commit=CommitConfig())
    planned: Any = SimpleNamespace(num_planned=num_images)
    cluster = Cluster(cpus=8, gpus=0, num_nodes=1, embedded=True)
    fitted, num_rows = fit_to_plan(stages, job, planned, cluster)
    assert (num_rows, fitted.pools[0].min_actors, fitted.pools[0].max_actors) == (32, *expected)


class Sleeping:
    """A worker that feeds for as long as it computes; of several calls, one computes at a time."""

    def __init__(self, *_: object, **__: object) -> None:
        self.turn, self.under_way, self.most, self.spent = threading.Lock(), 0, 0, [0.0]

    def __call__(self, batch: pa.Table) -> pa.Table:
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        spent = self._sleep()
        with self.turn:
            spent += self._sleep()
            self.spent.append(spent)
        self.under_way -= 1
        columns = {"at_once_embed": pa.nulls(batch.num_rows, pa.int64()), "seconds_embed": [0.01] * batch.num_rows}
        return pa.table(columns)

    def _sleep(self) -> float:
        started = time.perf_counter()
        time.sleep(0.02)
        return time.perf_counter() - started


def tried(monkeypatch: pytest.MonkeyPatch, worker: object, **pool: float) -> tuple[list[Trial], int]:
    """Trials of a pool whose worker is made up."""
    monkeypatch.setattr(trials_module, "PoolWorker", lambda *_, **__: worker)
    monkeypatch.setattr(trials_module, "_ENOUGH_S", 0.1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (60, 100))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 30)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 25)
    config = PoolConfig(tasks=("embed",), **pool)  # type: ignore[arg-type]
    decode = SimpleNamespace(leaves_jpegs=False)
    stages = SimpleNamespace(pools=(config,), setup=None, prompts=None, decode=decode)
    sample = pa.table({"content_hash": ["a", "b", "c"]})
    return TriedPool(stages, 0).run(sample, (4,))  # type: ignore[arg-type]


def test_a_gpu_is_tried_as_the_run_uses_it_feeding_batches_while_it_computes_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = Sleeping()
    (found,), memory_total = tried(monkeypatch, worker, gpus=1.0)
    alone = 4 * (len(worker.spent) - 1) / sum(worker.spent)
    assert worker.most == GPU_CALLS_AT_ONCE
    assert found.images_per_s > 1.2 * alone, "half of the time of a call is hidden behind another"
    assert (found.memory_bytes, memory_total) == (45, 100), "15 are nvJPEG's and the driver's"

    alone_on_processor = Sleeping()
    tried(monkeypatch, alone_on_processor)
    assert alone_on_processor.most == 1


def test_a_worker_that_fails_ends_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: pa.Table) -> pa.Table:
        raise torch.AcceleratorError("the device is broken")

    with pytest.raises(torch.AcceleratorError, match="broken"):
        tried(monkeypatch, fail, gpus=1.0)
