"""A pool called by several threads, with tasks at different batches and captions at two: what one thread makes."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from vlmflow.config import CatalogConfig, Job, PoolConfig, SourceConfig, TaskName
from vlmflow.engine import pools
from vlmflow.engine.decoding import ReadAndDecode
from vlmflow.engine.pools import PoolWorker
from vlmflow.engine.turns import Turns
from vlmflow.imaging import merge_requests
from vlmflow.sources import open_source
from vlmflow.tasks.setup import TaskSetup, prepare_prompts, prepare_tasks

DEMO = Path(__file__).parents[3] / "vlmflow" / "starter" / "demo"
TASKS: tuple[TaskName, ...] = ("embed", "moderate", "caption", "match")
ROWS_AT_ONCE = 8


def demo_job() -> Job:
    return Job(
        source=SourceConfig(uri=str(DEMO)),
        catalog=CatalogConfig(uri="unused"),
        profile="starter",
        policy="demo",
        views=("squash",),
    )


def decoded_batches(job: Job, setup: TaskSetup) -> list[pa.Table]:
    """The demo's pictures, in batches of which the last is smaller."""
    source = open_source(job.source)
    references = pa.Table.from_batches(list(source.list())).slice(0, 5 * ROWS_AT_ONCE - 3)
    due = pa.array([list(TASKS)] * references.num_rows, pa.list_(pa.string()))
    references = references.append_column("due", due)
    references = references.append_column("due_if_same", pa.nulls(len(references), due.type))
    for name in ("previous_hash", "previous_caption"):
        references = references.append_column(name, pa.nulls(len(references), pa.string()))
    requests = tuple(merge_requests(setup.pixel_requests()))
    batch = ReadAndDecode(source.reader(job.limits), requests, job.limits)(references)
    return [batch.slice(start, ROWS_AT_ONCE) for start in range(0, batch.num_rows, ROWS_AT_ONCE)]


def results(worker: PoolWorker, batches: Sequence[pa.Table], num_threads: int) -> pa.Table:
    """What comes out, in the order of the batches."""
    with ThreadPoolExecutor(num_threads) as threads:
        out = pa.concat_tables(threads.map(worker, batches))
    return out.select(["uri", "caption", "decision", "labels", "caption_itm", "tasks_run", "errors"])


def test_tasks_at_work_on_different_batches_disturb_each_other_in_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    job = demo_job()
    setup = prepare_tasks(job)
    batches, pool, prompts = decoded_batches(job, setup), PoolConfig(tasks=TASKS), prepare_prompts(setup)
    expected = results(PoolWorker(pool, setup, prompts), batches, 1)
    assert max(expected[name].null_count for name in ("caption", "caption_itm")) < 5

    monkeypatch.setattr(pools, "Turns", lambda tasks, **_: Turns(tasks, side_by_side=True))
    worker = PoolWorker(pool, setup, prompts)
    assert worker._tasks["caption"].batches_at_once == 2
    found = results(worker, batches, 5)
    for name in expected.column_names:
        assert found[name].to_pylist() == expected[name].to_pylist(), name


@pytest.mark.gpu
def test_on_a_gpu_five_threads_make_what_a_processor_does() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    job = demo_job()
    setup = prepare_tasks(job)
    batches, prompts = decoded_batches(job, setup), prepare_prompts(setup)
    expected = results(PoolWorker(PoolConfig(tasks=TASKS), setup, prompts), batches, 1)
    worker = PoolWorker(PoolConfig(tasks=TASKS, gpus=1), setup, prompts)
    assert max(expected[name].null_count for name in ("caption", "caption_itm")) < 5
    for _ in range(3):
        found = results(worker, batches, 5)
        for name, least in (("uri", 1.0), ("tasks_run", 1.0), ("caption", 0.98), ("decision", 0.98)):
            pairs = zip(found[name].to_pylist(), expected[name].to_pylist(), strict=True)
            assert np.mean([one == other for one, other in pairs]) >= least, name
