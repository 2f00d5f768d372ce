"""A pool's tasks on a batch, without Ray: only what is due runs, and what fails costs itself."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch

from vlmflow import schema
from vlmflow.config import Dtype, PoolConfig
from vlmflow.engine import columns, loading, pools
from vlmflow.engine.loading import Room, room_for
from vlmflow.engine.pools import PoolWorker, run_on_due_rows
from vlmflow.errors import ModelMemoryError
from vlmflow.tasks import Task
from vlmflow.tasks.run import BatchLimit


class Doubling:
    """Doubles a number; fails on seven; counts the rows that it is given."""

    name = "embed"
    reads = ("number",)
    writes = pa.schema([("double", pa.int64())])

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, batch: pa.Table) -> dict[str, pa.Array]:
        numbers = batch["number"].to_pylist()
        if 7 in numbers:
            raise ValueError("seven")
        self.seen += numbers
        return {"double": pa.array([2 * number for number in numbers], pa.int64())}


class Moderating(Doubling):
    name = "moderate"
    writes = pa.schema([("verdict", pa.int64())])

    def __call__(self, batch: pa.Table) -> dict[str, pa.Array]:
        return {"verdict": super().__call__(batch)["double"]}


def make_batch(numbers: list[int], due: list[list[str]]) -> pa.Table:
    lists = pa.list_(pa.string())
    empty: list[list[str]] = [[] for _ in numbers]
    return pa.table(
        {
            "number": pa.array(numbers),
            columns.RUN_TASKS: pa.array(due, lists),
            columns.TASKS_RUN: pa.array(empty, lists),
            columns.TASKS_FAILED: pa.array(empty, lists),
            "errors": pa.array([None for _ in numbers], schema.ERRORS),
        }
    )


def test_only_rows_on_which_the_task_is_due_run() -> None:
    task = Doubling()
    out = run_on_due_rows(
        make_batch([1, 2, 3], [["embed"], ["caption"], ["caption", "embed"]]), task, BatchLimit(), 60.0
    )
    assert task.seen == [1, 3]
    assert out["double"].to_pylist() == [2, None, 6]
    assert out[columns.TASKS_RUN].to_pylist() == [["embed"], [], ["embed"]]
    assert out[columns.TASKS_FAILED].to_pylist() == [[], [], []]


def test_a_row_that_fails_is_recorded_and_the_others_have_their_values() -> None:
    out = run_on_due_rows(make_batch([1, 7, 3], [["embed"]] * 3), Doubling(), BatchLimit(), 60.0)
    assert out["double"].to_pylist() == [2, None, 6]
    assert out[columns.TASKS_FAILED].to_pylist() == [[], ["embed"], []]
    assert out["errors"].to_pylist()[1] == [{"stage": "embed", "class": "task_failed", "message": "ValueError: seven"}]


def test_what_reads_a_failed_task_does_not_run() -> None:
    batch = run_on_due_rows(make_batch([7, 8], [["embed", "moderate"]] * 2), Doubling(), BatchLimit(), 60.0)
    moderating = Moderating()
    out = run_on_due_rows(batch, moderating, BatchLimit(), 60.0)
    assert moderating.seen == [8]
    assert out["verdict"].to_pylist() == [None, 16]
    assert out[columns.TASKS_RUN].to_pylist() == [[], ["embed", "moderate"]]


def test_nothing_due_writes_nulls() -> None:
    out = run_on_due_rows(make_batch([1, 2], [[], []]), Doubling(), BatchLimit(), 60.0)
    assert out["double"].to_pylist() == [None, None]
    assert out["double"].type == pa.int64()


def test_has_task_sees_through_null_and_empty_lists_and_slices() -> None:
    values = pa.array([["embed"], None, [], ["caption", "embed"], ["caption"]], pa.list_(pa.string()))
    batch = pa.table({"tasks": values}).slice(1)
    assert columns.has_task(batch, "tasks", "embed").to_pylist() == [False, False, True, False]


def test_spread_sums_to_the_amount() -> None:
    assert pa.compute.sum(columns.spread(3.0, 7)).as_py() == pytest.approx(3.0)
    assert len(columns.spread(3.0, 0)) == 0


class Greedy(Doubling):
    """Runs out of memory with more than two rows at once."""

    def __call__(self, batch: pa.Table) -> dict[str, pa.Array]:
        if batch.num_rows > 2:
            raise torch.OutOfMemoryError("9.75 GiB asked for")
        return super().__call__(batch)


def pool_with(
    task: Task, monkeypatch: pytest.MonkeyPatch, pool: PoolConfig | None = None, *, sized_by_memory: bool = False
) -> PoolWorker:
    """A worker with one task; ``pool``: None: one that leaves the threads of this process as they are."""
    if pool is None:
        pool = PoolConfig(tasks=("embed",))
        monkeypatch.setattr(loading, "set_up_torch", lambda *_: "cpu")
    monkeypatch.setattr(loading, "check_weights", lambda *_: None)
    monkeypatch.setattr(pools, "load_task", lambda *_: task)
    setup = SimpleNamespace(requests_of=lambda _: [], read_regions=lambda _: False, dtype="auto")
    return PoolWorker(pool, setup, None, sized_by_memory=sized_by_memory)  # type: ignore[arg-type]


GPU = "NVIDIA H100: 0.9 of 80.0 GB are free, and this process has 3.1"


@pytest.mark.parametrize(
    ("device", "share", "where"),
    [
        ("cpu", 1.0, "this machine"),
        ("cuda", 1.0, GPU),
        ("cuda", 0.25, f"{GPU} of 20.0 that it may take"),
        ("cuda", None, "the GPU"),
    ],
)
def test_a_model_that_does_not_fit_is_told_with_its_pool_and_who_has_the_memory(
    device: str, share: float | None, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def info(_: str) -> tuple[int, int]:
        if share is None:
            raise RuntimeError("CUDA error: out of memory")
        return 900_000_000, 80_000_000_000

    def load(name: str, *_: object) -> Task:
        if name == "match":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return Doubling()

    monkeypatch.setattr(loading, "set_up_torch", lambda *_: device)
    monkeypatch.setattr(loading, "check_weights", lambda *_: None)
    monkeypatch.setattr(pools, "load_task", load)
    told = {"mem_get_info": info, "memory_reserved": lambda _: 3_100_000_000}
    told |= {"get_per_process_memory_fraction": lambda _: share, "get_device_name": lambda _: "NVIDIA H100"}
    for name, given in told.items():
        monkeypatch.setattr(torch.cuda, name, given)
    said = f"^pool caption.match: the model of match does not fit in the memory of {where}\nremedy: "
    with pytest.raises(ModelMemoryError, match=said) as caught:
        PoolWorker(PoolConfig(tasks=("caption", "match")), SimpleNamespace(dtype="auto"), None)  # type: ignore[arg-type]
    assert "max_actors" in caught.value.remedy


@pytest.fixture
def _torch_as_before() -> Iterator[None]:
    threads, tf32 = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    precision, interval = torch.get_float32_matmul_precision(), sys.getswitchinterval()
    yield
    sys.setswitchinterval(interval)
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = tf32


class Threads(Doubling):
    """Tells how many threads torch has where tasks run."""

    def __call__(self, batch: pa.Table) -> dict[str, pa.Array]:
        return {"double": pa.array([torch.get_num_threads()] * batch.num_rows, pa.int64())}


@pytest.mark.usefixtures("_torch_as_before")
@pytest.mark.parametrize(("cpus", "threads"), [(0.5, 1), (1.0, 1), (2.5, 2), (3.0, 3)])
def test_tasks_of_a_worker_have_the_threads_that_its_pool_reserves(
    monkeypatch: pytest.MonkeyPatch, cpus: float, threads: int
) -> None:
    torch.set_num_threads(5)
    worker = pool_with(Threads(), monkeypatch, PoolConfig(tasks=("embed",), cpus=cpus))
    batch = make_batch([1], [["embed"]])
    with ThreadPoolExecutor(2) as calls:  # as Ray calls it, from threads that have not set up torch
        found = [out["double"].to_pylist() for out in calls.map(worker, [batch, batch])]
    assert found == [[threads]] * 2


@pytest.mark.usefixtures("_torch_as_before")
@pytest.mark.parametrize(("dtype", "rounds"), [("float32", False), ("bfloat16", True), ("auto", True)])
def test_float32_that_was_asked_for_is_not_rounded_to_tf32(
    monkeypatch: pytest.MonkeyPatch, dtype: Dtype, rounds: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    loading.allow_tf32(not rounds)
    assert loading.set_up_torch(PoolConfig(tasks=("embed",), gpus=1), dtype) == "cuda"
    assert torch.backends.cudnn.allow_tf32 == rounds
    assert torch.backends.cuda.matmul.allow_tf32 == rounds


@pytest.mark.usefixtures("_torch_as_before")
@pytest.mark.parametrize(("gpus", "fraction"), [(0.25, [0.225]), (0.5, [0.45]), (1.0, []), (2.0, [])])
def test_actors_that_share_a_gpu_keep_to_their_part_of_its_memory(
    monkeypatch: pytest.MonkeyPatch, gpus: float, fraction: list[float]
) -> None:
    kept: list[float] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", kept.append)
    loading.set_up_torch(PoolConfig(tasks=("embed",), gpus=gpus))
    assert kept == fraction


@pytest.mark.usefixtures("_torch_as_before")
def test_a_thread_that_feeds_a_gpu_need_not_wait_for_the_interpreter_as_long_as_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    usual = sys.getswitchinterval()
    loading.set_up_torch(PoolConfig(tasks=("embed",)))
    assert sys.getswitchinterval() == usual
    loading.set_up_torch(PoolConfig(tasks=("embed",), gpus=1))
    assert sys.getswitchinterval() < usual / 10


@pytest.mark.usefixtures("_torch_as_before")
@pytest.mark.parametrize(
    ("initialised", "expected"),
    [(0, [("cuInit", 0), ("cuDevicePrimaryCtxSetFlags_v2", 0, 4)]), (100, [("cuInit", 0)]), (None, [])],
    ids=["driver", "no device", "no driver"],
)
def test_threads_that_wait_for_a_gpu_sleep(
    monkeypatch: pytest.MonkeyPatch, initialised: int | None, expected: list[tuple[Any, ...]]
) -> None:
    called: list[tuple[Any, ...]] = []

    class Driver:
        def __init__(self, name: str) -> None:
            if initialised is None:
                raise OSError(name)

        def __getattr__(self, name: str) -> Callable[..., int | None]:
            return lambda *given: called.append((name, *given)) or initialised

    monkeypatch.setattr(ctypes, "CDLL", Driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    loading.set_up_torch(PoolConfig(tasks=("embed",)))
    assert not called
    loading.set_up_torch(PoolConfig(tasks=("embed",), gpus=1))
    assert called == expected


GB = 1_000_000_000


@pytest.mark.parametrize(
    ("gpus", "dtype", "memory", "room"),
    [
        (1.0, "auto", (84, 85), Room()),
        (1.0, "auto", (42, 42.5), Room()),  # an A100 of 40 GB
        (0.5, "auto", (50, 85), Room()),
        (1.0, "auto", (23.8, 24.1), Room(128, 3)),  # an A10, an L4
        (1.0, "float32", (15.7, 15.8), Room(32, 3)),  # a T4
        (1.0, "auto", (15.7, 16), Room(64, 3)),
        (0.25, "auto", (84, 85), Room(128, 3)),
        (1.0, "auto", (20, 85), Room(128, 3)),  # another program has the rest
        (1.0, "auto", (0.5, 85), Room(16, 3)),
        (0.0, "auto", (0, 0), Room()),
    ],
)
def test_a_small_gpu_is_given_less_at_once(
    gpus: float, dtype: Dtype, memory: tuple[float, float], room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: tuple(size * GB for size in memory))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert room_for(PoolConfig(tasks=("embed",), gpus=gpus, batch_size=256), dtype) == room


class Counting(Doubling):
    """Tells how many rows it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __call__(self, batch: pa.Table) -> dict[str, pa.Array]:
        self.sizes.append(batch.num_rows)
        return super().__call__(batch)


def test_a_worker_does_as_much_at_once_as_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "room_for", lambda *_: Room(rows=4, calls=2))
    task, batch = Counting(), make_batch(list(range(20, 30)), [["embed"]] * 10)
    out = pool_with(task, monkeypatch, sized_by_memory=True)(batch)
    assert out["double"].to_pylist() == list(range(40, 60, 2))
    assert task.sizes == [4, 4, 2]
    assert out["at_once_embed"].null_count == 10, "memory never ran out"
    task.sizes.clear()
    pool_with(task, monkeypatch)(batch)
    assert task.sizes == [10], "where the job says a size it is kept"

    worker = pool_with(task, monkeypatch, sized_by_memory=True)
    inside, leave = threading.Semaphore(0), threading.Event()

    def process(batch: pa.Table) -> pa.Table:
        inside.release()
        assert leave.wait(20.0)
        return batch

    monkeypatch.setattr(worker, "_process", process)
    with ThreadPoolExecutor(5) as calls:
        done = [calls.submit(worker, batch) for _ in range(5)]
        assert all(inside.acquire(timeout=20.0) for _ in range(2))
        assert not inside.acquire(timeout=0.2)
        leave.set()
        assert [call.result(20.0).num_rows for call in done] == [10] * 5


def test_a_task_that_is_due_on_no_row_waits_for_no_other_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = pool_with(Doubling(), monkeypatch)
    counted = worker._tasks["embed"]
    counted._per_row = 8.0

    def with_work_of_another_thread(batch: pa.Table, _: Task) -> pa.Table:
        with ThreadPoolExecutor(1) as other:
            assert other.submit(lambda: [counted(batch), counted.flops]).result()[1] == 16.0
        return batch

    monkeypatch.setattr(pools, "_with_usage", with_work_of_another_thread)
    with ThreadPoolExecutor(2) as calls:
        with worker._turns.alone():
            out = calls.submit(worker, make_batch([1, 2], [["caption"], []])).result(20.0)
            due = calls.submit(worker, make_batch([1, 2], [[], ["embed"]]))
            with pytest.raises(TimeoutError):
                due.result(0.2)
        assert due.result(20.0)["double"].to_pylist() == [None, 4]
    assert out["double"].to_pylist() == [None, None]
    assert out["flops_embed"].to_pylist() == [0.0, 0.0]
    assert out["seconds_embed"].to_pylist() == [0.0, 0.0]
    assert sum(due.result()["flops_embed"].to_pylist()) == 8.0


class Ended(BaseException):
    """In the place of the end of a process."""


class Breaking(Doubling):
    """Breaks the device."""

    def __call__(self, batch: pa.Table) -> dict[str, pa.Array]:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def test_a_worker_whose_device_is_broken_ends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(pools.os, "_exit", end)
    monkeypatch.setattr(pools.logging, "shutdown", lambda: None)
    worker = pool_with(Breaking(), monkeypatch)
    with pytest.raises(Ended):
        worker(make_batch([1, 2], [["embed"]] * 2))
    assert "the device is broken" in caplog.text


def test_a_pool_says_how_many_images_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = pool_with(Greedy(), monkeypatch)
    assert worker(make_batch([1, 2], [["embed"]] * 2))["at_once_embed"].to_pylist() == [None, None]
    out = worker(make_batch(list(range(20, 28)), [["embed"]] * 8))
    assert out["double"].to_pylist() == list(range(40, 56, 2))
    assert out["at_once_embed"].to_pylist() == [2] * 8
    assert worker(make_batch([1], [["embed"]]))["at_once_embed"].to_pylist() == [2], "it is remembered"
