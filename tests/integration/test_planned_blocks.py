"""Planned blocks go into the object store as they are read, and leave it again."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest
import ray
from ray._private.internal_api import get_memory_info_reply, get_state_from_address
from ray.data import Dataset

from vlmflow.engine import planned_blocks
from vlmflow.engine.cluster import RayConfig, ray_cluster
from vlmflow.engine.consume import FinishedBlocks
from vlmflow.engine.planned_blocks import dataset_of
from vlmflow.engine.stored import put_table
from vlmflow.errors import WorkspaceError

pytestmark = pytest.mark.usefixtures("ray_session")


class Plan:
    """So many blocks of a megabyte, of which it counts those that were taken."""

    def __init__(self, num_blocks: int, fails_at: int = -1) -> None:
        self.num_blocks, self.fails_at = num_blocks, fails_at
        self.num_taken = 0

    def __iter__(self) -> Iterator[pa.Table]:
        for number in range(self.num_blocks):
            if number == self.fails_at:
                raise WorkspaceError("the temporary folder is gone", remedy="Begin again.")
            self.num_taken += 1
            yield pa.table({"number": np.full(1 << 17, number)})


def first_of(block: pa.Table) -> pa.Table:
    return block.slice(0, 1)


def numbers_of(blocks: list[tuple[ray.ObjectRef[pa.Table], int]]) -> list[int]:
    return [number for block, _ in blocks for number in ray.get(block)["number"].to_pylist()]


def run_to_end(dataset: Dataset) -> None:
    with FinishedBlocks(dataset) as finished:
        while finished.next(1.0) is not None:
            continue


def spilled_bytes() -> int:
    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    return int(get_memory_info_reply(state).store_stats.spilled_bytes_total)


@pytest.mark.slow
def test_a_plan_larger_than_the_object_store_is_put_there_bit_by_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned_blocks, "_KEPT_BYTES", 32 << 20)
    plan = Plan(500)  # the store has 400 MB
    with ray_cluster(RayConfig()):
        before = spilled_bytes()
        dataset = dataset_of(plan).map_batches(first_of, batch_format="pyarrow", batch_size=None, num_cpus=0.5)
        assert plan.num_taken == 0
        found = []
        with FinishedBlocks(dataset) as finished:
            while (blocks := finished.next(1.0)) is not None:
                if blocks and not found:
                    assert plan.num_taken < 200, "few are taken before the first comes out"
                found += numbers_of(blocks)
        assert sorted(found) == list(range(500))
        assert spilled_bytes() == before


def test_a_plan_without_blocks_ends_at_once() -> None:
    with ray_cluster(RayConfig()):
        dataset = dataset_of(()).map_batches(first_of, batch_format="pyarrow", batch_size=None)
        assert list(dataset.iter_internal_ref_bundles()) == []


def test_what_a_plan_raises_ends_the_run() -> None:
    with ray_cluster(RayConfig()):
        dataset = dataset_of(Plan(300, fails_at=200)).map_batches(first_of, batch_format="pyarrow", batch_size=None)
        with pytest.raises(WorkspaceError, match="folder is gone"):
            run_to_end(dataset)


def test_of_a_part_of_a_table_that_part_alone_is_put() -> None:
    columns = {
        "number": pa.array(range(100_000)),
        "text": pa.array([None, "a", "", "bc"] * 25_000),
        "tasks": pa.array([["embed"], [], None, ["a", None]] * 25_000),
        "source": pa.array([{"title": "a", "none": None}, None] * 50_000),
    }
    whole = pa.concat_tables([pa.table(columns)] * 2)
    for part in (whole.slice(99_997, 7), whole.slice(3, 0), whole.select([])):
        found = ray.get(put_table(part))
        assert found.equals(part)
        assert found.schema.equals(part.schema)
        assert found.get_total_buffer_size() < 10_000
