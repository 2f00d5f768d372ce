"""What ends a run before its first images: actors that are killed while they load, and a signal."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
from ray.data import Dataset

from vlmflow.config import ImageLimits, PoolConfig
from vlmflow.engine import pipeline
from vlmflow.engine.consume import FinishedBlocks
from vlmflow.engine.decoding import ReadAndDecode
from vlmflow.engine.faults import get
from vlmflow.engine.quarantine import Stages
from vlmflow.engine.starts import MAX_KILLED, Starts
from vlmflow.errors import ModelsKilledError


class NoReader:
    def read(self, rows: pa.Table) -> list[Any]:
        raise AssertionError("no actor, no image")


def wait_for_blocks(dataset: Dataset, until: float) -> None:
    with FinishedBlocks(dataset) as finished:
        while finished.next(0.1) == [] and time.monotonic() < until:
            continue


@pytest.mark.slow
def test_a_pool_whose_actors_are_killed_whenever_they_load_ends_the_run(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Loading:
        def __init__(self, *_: object, starts: Starts, **__: object) -> None:
            starts.begin()
            (tmp_path / str(os.getpid())).touch()
            os.kill(os.getpid(), signal.SIGKILL)

        def __call__(self, batch: pa.Table) -> pa.Table:
            return batch

    monkeypatch.setattr(pipeline, "PoolWorker", Loading)
    monkeypatch.setattr(pipeline, "_as_function", lambda *_, **__: lambda batch: batch)
    decode = ReadAndDecode(NoReader(), (), ImageLimits(), None)  # type: ignore[arg-type]
    stages = Stages(decode, (PoolConfig(tasks=("embed", "caption"), cpus=0.5),), None, None)  # type: ignore[arg-type]
    dataset = pipeline.build_pipeline([pa.table({"number": [1, 2]})], stages, 2)
    with pytest.raises(ModelsKilledError, match=r"pool embed\+caption: .* killed 3 times") as caught:
        wait_for_blocks(dataset, time.monotonic() + 120)
    assert "memory" in caught.value.remedy
    assert len(list(tmp_path.iterdir())) == MAX_KILLED


class Ended(BaseException):
    """As Prefect ends a flow run that was cancelled, or has taken too long."""


def test_a_signal_ends_a_run_that_waits_for_its_models(ray_session: None) -> None:
    def end(*_: object) -> None:
        raise Ended

    def load() -> None:
        time.sleep(3600)

    before = signal.signal(signal.SIGUSR1, end)
    loading = ray.remote(num_cpus=0)(load).remote()
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGUSR1))

    def wait() -> None:
        timer.start()
        get(loading)

    try:
        with pytest.raises(Ended):
            wait()
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)
        ray.cancel(loading, force=True)
