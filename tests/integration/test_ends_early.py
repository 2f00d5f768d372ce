"""What is left of a pipeline that its run has left: nothing, also where no block of it ever comes."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
import ray
from ray.data import ActorPoolStrategy

from tests.processes import wait_for
from vlmflow.engine.consume import FinishedBlocks


class Pool:
    """An actor that tells when it has had a batch."""

    def __init__(self, had_one: Path) -> None:
        self._had_one = had_one

    def __call__(self, batch: pa.Table) -> pa.Table:
        self._had_one.touch()
        return batch


def test_its_actors_end_with_the_run(ray_session: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As where a second pool waits for what nobody has, or another run: what the first gives goes nowhere."""
    free = ray.available_resources()["CPU"]
    dataset = ray.data.from_arrow([pa.table({"number": [number]}) for number in range(4)])
    for name, num_cpus in (("first", 1), ("second", 100)):
        dataset = dataset.map_batches(
            Pool,
            fn_constructor_args=(tmp_path / name,),
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=1),
            num_cpus=num_cpus,
        )
    with FinishedBlocks(dataset) as finished:
        wait_for((tmp_path / "first").exists)
        assert finished.next(0.1) == []
    wait_for(lambda: ray.available_resources().get("CPU", 0) >= free)
    assert not any(word in capfd.readouterr().out for word in ("failed", "Error"))
