"""Reading runs ahead of the models by a bounded number of images, and a run comes to its end all the same."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
from ray.data import ActorPoolStrategy

from vlmflow.config import PoolConfig
from vlmflow.engine import read_ahead
from vlmflow.engine.cluster import RayConfig, ray_cluster
from vlmflow.engine.pipeline import ACTOR_LIMITS, TASK_LIMITS
from vlmflow.engine.read_ahead import ReadAhead, ReadAheadRows, limit_read_ahead

# As in the pipeline: Ray announces named parameters for the retries and has none yet.
pytestmark = pytest.mark.filterwarnings("ignore:.*ray_remote_args.*")


@ray.remote(num_cpus=0)
class Counts:
    """How many rows have gone into the first stage and come out of the last, and the most between the two."""

    def __init__(self) -> None:
        self.read = self.done = self.most = 0

    def add(self, read: int, done: int) -> None:
        self.read, self.done = self.read + read, self.done + done
        self.most = max(self.most, self.read - self.done)

    def totals(self) -> tuple[int, int, int]:
        return self.read, self.done, self.most


class Model:
    """Is loaded a while after reading should stop, and waits for the count of what it has done: it could run ahead."""

    def __init__(self, counts: Any, max_rows: int) -> None:
        while ray.get(counts.totals.remote())[0] < max_rows:
            time.sleep(0.05)
        time.sleep(1.0)
        self._counts = counts

    def __call__(self, batch: pa.Table) -> pa.Table:
        ray.get(self._counts.add.remote(0, batch.num_rows))
        return batch


def so_many(wanted: int | None, pools: tuple[PoolConfig, ...] = (), calls: tuple[int, ...] = ()) -> ReadAheadRows:
    return ReadAheadRows(wanted, pools, calls, rows_per_task=64, cpus_per_task=0.5)


def run(counts: Any, max_rows: int, *, fails_on: int = -1) -> int:
    """1,600 rows in 50 blocks; returns how many come out."""

    def read_and_decode(batch: pa.Table) -> pa.Table:
        ray.get(counts.add.remote(batch.num_rows, 0))
        if fails_on in batch["number"].to_pylist():
            raise ValueError("a block that is given up")
        return batch

    blocks = [pa.table({"number": np.arange(start, start + 32)}) for start in range(0, 1_600, 32)]
    with ray_cluster(RayConfig()):
        limit_read_ahead(so_many(max_rows))
        dataset = ray.data.from_blocks(blocks)
        dataset = dataset.map_batches(read_and_decode, batch_format="pyarrow", num_cpus=0.2, **TASK_LIMITS)
        dataset = dataset.map_batches(
            Model,
            fn_constructor_args=(counts, max_rows),
            batch_format="pyarrow",
            batch_size=32,
            num_cpus=0.5,
            compute=ActorPoolStrategy(min_size=1, max_size=1),
            **ACTOR_LIMITS,
        )
        return sum(
            entry.metadata.num_rows or 0 for bundle in dataset.iter_internal_ref_bundles() for entry in bundle.blocks
        )


@pytest.mark.usefixtures("ray_session")
def test_reading_stops_while_enough_is_under_way() -> None:
    counts = Counts.remote()
    assert run(counts, 160) == 1_600
    read, done, most = ray.get(counts.totals.remote())
    assert read == done == 1_600
    # The driver hears of a finished batch a little after the actor has counted it.
    assert most <= 160 + 32


@pytest.mark.usefixtures("ray_session")
def test_blocks_that_are_given_up_do_not_hold_it_back_for_ever() -> None:
    assert run(Counts.remote(), 64, fails_on=40) == 1_600 - 32


def stage(name: str, taken: int, given: int, failed: int, behind: list[Any]) -> Any:
    metrics = {"rows_inputs_of_submitted_tasks": taken, "rows_task_outputs_generated": given}
    metrics["num_tasks_failed"] = failed
    return SimpleNamespace(name=name, metrics=SimpleNamespace(**metrics), output_dependencies=behind)


def test_lost_blocks_leave_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead.ray, "cluster_resources", dict)
    context = SimpleNamespace(get_config=lambda _: so_many(100))
    policy = ReadAhead(context, (), None)
    for failed, expected in ((0, False), (1, True)):
        last = stage("MapBatches(PoolWorker)", 200, 100, failed, [])
        assert policy.can_add_input(stage("MapBatches(read_and_decode)", 220, 220, 0, [last])) is expected
        assert policy.can_add_input(last) is True, "only reading is held back"


def test_reading_follows_a_cluster_that_grows_and_shrinks(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    now, cpus = [0.0], 2.0

    def cluster_resources() -> dict[str, float]:
        looked.append(1)
        return {"CPU": cpus}

    monkeypatch.setattr(read_ahead.ray, "cluster_resources", cluster_resources)
    monkeypatch.setattr(read_ahead.time, "monotonic", lambda: now[0])
    policy = ReadAhead(SimpleNamespace(get_config=lambda _: so_many(None)), (), None)
    decoding = stage("MapBatches(read_and_decode)", 4 * 64, 0, 0, [stage("MapBatches(PoolWorker)", 0, 0, 0, [])])
    for seconds, cpus, expected in ((0.0, 2.0, False), (4.0, 16.0, False), (5.0, 16.0, True), (10.0, 1.0, False)):  # noqa: B007  read by the function
        now[0] = seconds
        assert policy.can_add_input(decoding) is expected
    assert len(looked) == 3, "this is asked for every task"


def test_as_much_is_read_ahead_as_keeps_every_actor_at_work() -> None:
    pools = (
        PoolConfig(tasks=("embed",), max_actors=2, batch_size=32),
        PoolConfig(tasks=("caption",), max_actors=1, batch_size=16),
    )
    rows = so_many(None, pools, (5, 1))
    assert rows.on({"CPU": 4.0}) == 8 * 2 * 32 + 4 * 16 + 8 * 64
    assert so_many(100, pools, (5, 1)).on({"CPU": 4.0}) == 100
    assert so_many(1, pools, (5, 1)).on({}) == 48, "less than a batch of each pool would never be given out"


def test_nothing_is_read_for_actors_that_the_cluster_has_no_room_for_yet() -> None:
    pools = (PoolConfig(tasks=("embed",), gpus=0.5, max_actors=16, batch_size=32),)
    rows = so_many(None, pools, (5,))
    decoding = 2 * 64
    # One more than there is room for: what waits for it has the pool grow.
    assert [rows.on({"CPU": 1.0, "GPU": gpus}) for gpus in (0.0, 1.0, 8.0)] == [
        decoding + num * 8 * 32 for num in (1, 3, 16)
    ]
