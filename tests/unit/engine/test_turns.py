"""Which batches and tasks of a worker run side by side, and the time that is counted for them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from vlmflow.engine import turns
from vlmflow.engine.turns import Turns, Usage

TASKS = {"embed": 1, "caption": 1}
PATIENCE_S = 20.0


def in_threads(*calls: Callable[[], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(calls)) as threads:
        return [future.result(PATIENCE_S) for future in [threads.submit(call) for call in calls]]


def meets(turns: Turns, first: str, second: str, *, within_s: float = 0.3) -> bool:
    """Whether two batches are in these tasks at one moment. Those that meet may take long to, on a busy machine."""
    both = threading.Barrier(2)

    def work(task: str) -> bool:
        with turns.batch(), turns.task(task):
            try:
                both.wait(within_s)
            except threading.BrokenBarrierError:
                return False
            return True

    return any(in_threads(lambda: work(first), lambda: work(second)))


def test_two_tasks_are_at_two_batches_side_by_side() -> None:
    assert meets(Turns(TASKS, side_by_side=True), "embed", "caption", within_s=PATIENCE_S)


def test_a_task_is_at_one_batch_at_a_time() -> None:
    assert not meets(Turns(TASKS, side_by_side=True), "embed", "embed")


def test_one_after_the_other_a_batch_goes_through_all_tasks() -> None:
    assert not meets(Turns(TASKS, side_by_side=False), "embed", "caption")


def test_alone_means_that_no_task_is_at_work() -> None:
    turns = Turns(TASKS, side_by_side=True)
    with turns.batch(), turns.alone():
        assert in_threads(*(partial(slots.acquire, blocking=False) for slots in turns._slots.values())) == [
            False,
            False,
        ]
    with turns.batch(), turns.task("embed"):
        assert in_threads(partial(turns._slots["caption"].acquire, blocking=False)) == [True]


def test_a_task_may_be_at_as_many_batches_as_it_can_hold() -> None:
    turns = Turns({"embed": 1, "caption": 2}, side_by_side=True)
    assert meets(turns, "caption", "caption", within_s=PATIENCE_S)
    with turns.task("caption"):
        assert in_threads(partial(turns._slots["caption"].acquire, blocking=False)) == [True]
        assert in_threads(partial(turns._slots["caption"].acquire, blocking=False)) == [False], "the third"
        turns._slots["caption"].release()
    with turns.alone("caption"):
        assert in_threads(partial(turns._slots["caption"].acquire, blocking=False)) == [False]


def test_threads_that_want_to_be_alone_do_not_wait_for_each_other() -> None:
    turns = Turns({"embed": 1, "caption": 2}, side_by_side=True)

    def work() -> None:
        for _ in range(200):
            with turns.batch(), turns.task("caption"):
                pass
            with turns.batch(), turns.alone():
                pass

    in_threads(work, work, work)


def test_a_task_that_fails_leaves_its_turn() -> None:
    turns = Turns(TASKS, side_by_side=False)
    with pytest.raises(ValueError, match="of the task"), turns.batch(), turns.task("embed"):
        raise ValueError("of the task")
    with turns.batch(), turns.alone():
        pass


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(turns, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def set_clock(now: float) -> None:
        clock.now = now

    return set_clock


@pytest.mark.parametrize("of", [lambda turns: turns.batch(), lambda turns: turns.task("caption")], ids=["all", "one"])
def test_every_second_is_counted_once(at: Callable[[float], None], of: Callable[[Turns], Any]) -> None:
    """Batches from 1 to 4, 3 to 6 and 10 to 11."""
    order = Turns({"caption": 2}, side_by_side=True)
    first, second, third = of(order), of(order), of(order)
    found: dict[int, Usage] = {}
    steps: Iterable[tuple[float, Callable[[], Any]]] = (
        (1.0, lambda: found.update({1: first.__enter__()})),
        (3.0, lambda: found.update({2: second.__enter__()})),
        (4.0, lambda: first.__exit__(None, None, None)),
        (6.0, lambda: second.__exit__(None, None, None)),
        (10.0, lambda: found.update({3: third.__enter__()})),
        (11.0, lambda: third.__exit__(None, None, None)),
    )
    for moment, step in steps:
        at(moment)
        step()
    assert [found[number].busy for number in (1, 2, 3)] == [3.0, 2.0, 1.0]
    assert [found[number].waited for number in (1, 2, 3)] == [0.0, 0.0, 4.0]
