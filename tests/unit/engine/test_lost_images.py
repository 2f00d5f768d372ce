"""Images that came back from no worker: found by their keys, and run alone in a process that may not start."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError, RayError

from vlmflow.catalog import keys
from vlmflow.engine import quarantine
from vlmflow.engine.lost import lost_rows, want_small_blocks
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
