"""Images that came back from no worker: found by their keys, and run alone in a process that may not start."""

from __future__ import annotations

import time
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError, RayError

from vlmflow.catalog import keys
from vlmflow.engine import quarantine, run
from vlmflow.engine.lost import lost_rows, want_small_blocks
from vlmflow.engine.progress import Tally
from vlmflow.engine.quarantine import Quarantine
from vlmflow.errors import ClusterError


def test_rows_without_a_committed_key_are_lost_and_millions_are_looked_up_at_once() -> None:
    count, rows_per_table = 400_000, 1_024
    values = np.random.default_rng(0).integers(0, 256, (count, 16), np.uint8)
    ids = pa.array([row.tobytes().hex() for row in values])
    tables = [pa.table({"image_id": ids.slice(at, rows_per_table)}) for at in range(0, count, rows_per_table)]
    committed = keys.from_bytes(np.delete(values, [5, 350_000], axis=0))

    started = time.thread_time()
    lost = lost_rows(tables, [committed.slice(0, 70_000), committed.slice(70_000)])
    assert time.thread_time() - started < 5  # a hash of all keys per table took 15 s

    assert lost["image_id"].to_pylist() == [ids[5].as_py(), ids[350_000].as_py()]
    assert lost_rows(tables[:1], [])["image_id"].to_pylist() == ids[:rows_per_table].to_pylist()


@pytest.mark.parametrize(
    ("num_lost", "num_sent", "max_images", "wanted"),
    [
        (30, 100_000, 2_000, False),  # alone they are done sooner
        (1_800, 100_000, 2_000, True),  # a node that went down: alone they would take a quarter of an hour
        (5_000, 100_000, 2_000, True),
        (30, 100_000, 5, True),  # more than may be run alone
        (1_800, 1_900, 2_000, False),  # smaller blocks have not helped
        (100_000, 100_000, 2_000, False),
    ],
)
def test_many_lost_images_are_not_run_alone_before_smaller_blocks(
    num_lost: int, num_sent: int, max_images: int, wanted: bool
) -> None:
    assert want_small_blocks(num_lost, num_sent, max_images) is wanted


@pytest.mark.parametrize("error", [ActorDiedError(), GetTimeoutError("not ready"), RayError("gone")])
def test_a_process_that_does_not_start_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch, error: RayError) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    actor = SimpleNamespace(ready=SimpleNamespace(remote=lambda: None))
    alone = Quarantine.__new__(Quarantine)
    alone.__dict__ |= {
        "_stages": None,
        "_config": SimpleNamespace(max_memory_bytes=1),
        "_remote": SimpleNamespace(remote=lambda *_: actor),
        "_actor": None,
    }
    monkeypatch.setattr(quarantine.ray, "get", fail)
    with pytest.raises(ClusterError, match=r"not ready within 600 s|the cluster gave up") as raised:
        alone.run(pa.table({"uri": ["a"]}))
    assert "What was committed stays" in raised.value.remedy


class Losing(run._Run):
    """A run that lost images, as many as are said, and then none; notes how it gets them back."""

    def __init__(self, num_lost: int) -> None:
        self._job = SimpleNamespace(quarantine=SimpleNamespace(max_images=2_000))  # type: ignore[assignment]
        self._plan = SimpleNamespace(num_planned=100_000)  # type: ignore[assignment]
        self._display = SimpleNamespace(stage=lambda _: None, update=lambda _: None)  # type: ignore[assignment]
        self._tally = Tally(total=num_lost)
        self._nums_lost = [num_lost]
        self.ways: list[str] = []

    def _lost(self) -> pa.Table:
        return pa.table({"uri": ["a"] * (self._nums_lost.pop() if self._nums_lost else 0)})

    def _run_in_blocks(self, rows: pa.Table, stages: Any, num_rows: int, *_: Any) -> None:
        self.ways.append(f"{len(rows)} in blocks of {num_rows}")

    def _run_alone(self, lost: pa.Table, *_: Any) -> None:
        self.ways.append(f"{len(lost)} alone")


@pytest.mark.parametrize(("num_lost", "way"), [(512, "512 alone"), (513, "513 in blocks of 16")])
def test_what_a_node_takes_with_it_is_not_run_alone(num_lost: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "in_small_batches", lambda stages, _: stages)
    losing = Losing(num_lost)
    losing._run_lost(None, None, None)  # type: ignore[arg-type]
    assert losing.ways == [way]


def test_images_that_are_run_alone_take_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate and the time to go were those of all images before, many times too good."""
    alone = SimpleNamespace(run=lambda row: time.sleep(0.01) or row, close=lambda: None)
    monkeypatch.setattr(run, "Quarantine", lambda *_: alone)
    monkeypatch.setattr(run.ray, "put", lambda row: row)
    losing = Losing(3)
    shown: list[int] = []
    losing._display = SimpleNamespace(update=lambda tally: shown.append(tally.committed), stage=lambda _: None)  # type: ignore[assignment]
    finish = partial(setattr, losing._tally, "committed", 3)
    nothing = SimpleNamespace(add=lambda _: None, tick=lambda: None, finish=finish)
    losing._collected = None  # type: ignore[assignment]
    losing._tally.elapsed_s = 100.0
    metrics = SimpleNamespace(update=lambda *_, **__: None)
    run._Run._run_alone(losing, losing._lost(), None, nothing, metrics)  # type: ignore[arg-type]
    assert 100.02 < losing._tally.elapsed_s < 110
    assert shown == [0, 0, 0, 3], "what was committed at the end is shown too"
