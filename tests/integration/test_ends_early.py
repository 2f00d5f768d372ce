"""What is left of a pipeline that its run has left: nothing, also where no block of it ever comes."""

from __future__ import annotations

import time
from pathlib import Path

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy

from tests.processes import wait_for
from vlmflow.engine.consume import FinishedBlocks


class Stuck:
    """An actor that is at its first batch for as long as a file is there."""

    def __init__(self, at_work: Path) -> None:
        self._at_work = at_work

    def __call__(self, batch: pa.Table) -> pa.Table:
        self._at_work.touch()
        while self._at_work.exists():
            time.sleep(0.01)
        return batch


def test_its_actors_end_with_the_run(ray_session: None, tmp_path: Path) -> None:
    free = ray.available_resources()["CPU"]
    at_work = tmp_path / "at work"
    dataset = ray.data.from_arrow([pa.table({"number": [number]}) for number in range(4)]).map_batches(
        Stuck, fn_constructor_args=(at_work,), batch_format="pyarrow", compute=ActorPoolStrategy(size=1), num_cpus=1
    )
    try:
        with FinishedBlocks(dataset):
            wait_for(at_work.exists)
        wait_for(lambda: ray.available_resources().get("CPU") == free, seconds=30)
    finally:
        at_work.unlink()
