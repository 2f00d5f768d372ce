"""An image that fails costs one row, and what is recorded of it stays the same from run to run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
import torch

from vlmflow import schema
from vlmflow.device_errors import is_device_broken, is_out_of_memory, release_on_demand
from vlmflow.tasks import Columns
from vlmflow.tasks.run import BatchLimit, run_contained


class FakeTask:
    """Doubles numbers, and fails as it is told."""

    name = "caption"
    reads = ("number",)
    writes = pa.schema([("double", pa.int64()), ("word", pa.string())])

    def __init__(self, fail: Callable[[list[int]], None]) -> None:
        self._fail = fail
        self.sizes: list[int] = []

    def __call__(self, batch: pa.Table) -> Columns:
        numbers: list[int] = batch["number"].to_pylist()
        self.sizes.append(len(numbers))
        self._fail(numbers)
        return {
            "double": pa.array([2 * n for n in numbers], pa.int64()),
            "word": pa.array(map(str, numbers), pa.string()),
        }


def numbers(count: int) -> pa.Table:
    return pa.table({"number": pa.array(range(count), pa.int64())})


def raises_on(*bad: int, error: Exception) -> Callable[[list[int]], None]:
    def fail(found: list[int]) -> None:
        if set(bad) & set(found):
            raise error

    return fail


def more_than(rows: int) -> Callable[[list[int]], None]:
    def fail(found: list[int]) -> None:
        if len(found) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.31 GiB")

    return fail


def messages(errors: pa.Array) -> list[Any]:
    return [error and error["message"] for error in errors.to_pylist()]


def test_one_image_that_fails_costs_one_row() -> None:
    columns, errors = run_contained(FakeTask(raises_on(2, error=ValueError("bad image"))), numbers(4), BatchLimit())
    assert columns["double"].to_pylist() == [0, 2, None, 6]
    assert columns["word"].to_pylist() == ["0", "1", None, "3"]
    assert errors.type == schema.ERROR
    assert errors.to_pylist() == [
        None,
        None,
        {"stage": "caption", "class": "task_failed", "message": "ValueError: bad image"},
        None,
    ]


@pytest.mark.parametrize("bad", [(0,), (6,), (0, 3, 6), tuple(range(7))])
def test_rows_stay_in_order_whichever_fail(bad: tuple[int, ...]) -> None:
    columns, errors = run_contained(FakeTask(raises_on(*bad, error=KeyError("x"))), numbers(7), BatchLimit())
    assert columns["double"].to_pylist() == [None if n in bad else 2 * n for n in range(7)]
    assert [error is not None for error in errors.to_pylist()] == [n in bad for n in range(7)]


def test_nothing_is_tried_twice_where_nothing_fails() -> None:
    task = FakeTask(raises_on(error=ValueError()))
    run_contained(task, numbers(8), BatchLimit())
    assert task.sizes == [8]


def test_out_of_memory_halves_and_is_remembered() -> None:
    task, limit = FakeTask(more_than(3)), BatchLimit()
    columns, errors = run_contained(task, numbers(16), limit)
    assert columns["double"].to_pylist() == [2 * n for n in range(16)]
    assert errors.null_count == 16
    assert limit.rows == 2
    task.sizes.clear()
    run_contained(task, numbers(5), limit)
    assert task.sizes == [2, 2, 1]


def test_an_image_that_alone_does_not_fit_is_out_of_memory() -> None:
    _, errors = run_contained(FakeTask(more_than(0)), numbers(2), BatchLimit())
    assert [error["class"] for error in errors.to_pylist()] == ["out_of_memory"] * 2
    assert messages(errors) == ["out of memory with a batch of one image"] * 2


def test_another_failure_does_not_make_batches_smaller() -> None:
    limit = BatchLimit()
    run_contained(FakeTask(raises_on(1, error=ValueError())), numbers(4), limit)
    assert limit.rows is None


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError(), "ValueError"),
        (ValueError("first\nsecond"), "ValueError: first"),
        (TypeError("<Image at 0x7F12ab>"), "TypeError: <Image at 0x?>"),
        (OSError("no /home/me/models/a.json here"), "OSError: no <path> here"),
        (ValueError("3/4 and a/b stay"), "ValueError: 3/4 and a/b stay"),
        (ValueError("x" * 500), "ValueError: " + "x" * 188),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: 7 bytes"),
            "out of memory with a batch of one image",
        ),
    ],
)
def test_messages_hold_nothing_of_the_machine(error: Exception, message: str) -> None:
    _, errors = run_contained(FakeTask(raises_on(0, error=error)), numbers(1), BatchLimit())
    assert messages(errors) == [message]


def accelerator_error(code: int) -> torch.AcceleratorError:
    error = torch.AcceleratorError("CUDA error")
    error.error_code = code  # as torch sets it
    return error


@pytest.mark.parametrize(
    ("error", "is_memory", "is_broken"),
    [
        (torch.OutOfMemoryError("9.75 GiB asked for"), True, False),
        (accelerator_error(2), True, False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True, False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), True, False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True, False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"), True, False),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True, False),
        (accelerator_error(209), False, False),  # no kernel for this GPU
        (accelerator_error(701), False, False),  # more registers than it has
        (accelerator_error(901), False, False),  # a capture that was invalidated
        (accelerator_error(700), False, True),  # an illegal address
        (torch.AcceleratorError("without a code"), False, True),
        (RuntimeError("shapes differ"), False, False),
    ],
)
def test_what_an_error_of_the_device_means(error: Exception, is_memory: bool, is_broken: bool) -> None:
    assert is_out_of_memory(error) == is_memory
    assert is_device_broken(error) == is_broken


def test_where_memory_runs_out_all_that_is_kept_for_speed_is_let_go() -> None:
    class Keeper:
        released = 0

        def release(self) -> None:
            self.released += 1

    keeper = Keeper()
    release_on_demand(keeper)
    run_contained(FakeTask(raises_on(0, error=accelerator_error(2))), numbers(1), BatchLimit())
    assert keeper.released == 1


def test_a_broken_device_is_not_contained() -> None:
    with pytest.raises(torch.AcceleratorError):
        run_contained(FakeTask(raises_on(0, error=torch.AcceleratorError("illegal access"))), numbers(2), BatchLimit())


def test_a_task_that_writes_the_wrong_number_of_values_is_our_mistake_and_shows() -> None:
    task = FakeTask(raises_on(error=ValueError()))
    task.__class__ = type("Short", (FakeTask,), {"__call__": lambda self, batch: {"double": [], "word": []}})
    with pytest.raises(ValueError, match="0 values for 2 rows"):
        run_contained(task, numbers(2), BatchLimit())


def test_no_rows_are_no_call_and_typed_columns() -> None:
    task = FakeTask(raises_on(error=ValueError()))
    columns, errors = run_contained(task, numbers(0), BatchLimit())
    assert task.sizes == []
    assert {name: values.type for name, values in columns.items()} == {"double": pa.int64(), "word": pa.string()}
    assert errors.type == schema.ERROR


def test_no_row_is_lost_where_another_thread_lowers_the_limit() -> None:
    """Between any two looks at it."""

    class Falling(BatchLimit):
        looks = iter([128, 64, 32, 16, *[16] * 100])

        @property  # type: ignore[override]
        def rows(self) -> int:
            return next(self.looks)

        @rows.setter
        def rows(self, rows: int | None) -> None:
            pass

    columns, errors = run_contained(FakeTask(more_than(1_000)), numbers(256), Falling())
    assert len(errors) == 256
    assert {len(column) for column in columns.values()} == {256}
