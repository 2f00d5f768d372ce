"""The thread that takes finished blocks: what ends it, and what is told while none comes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.data.exceptions import omit_traceback_stdout

from tests.processes import wait_for
from vlmflow.engine import consume
from vlmflow.engine.consume import FinishedBlocks


class Stopped:
    """A dataset under which Ray was stopped."""

    _create_executor = None

    @omit_traceback_stdout
    def iter_internal_ref_bundles(self) -> Iterator[Any]:
        raise RuntimeError("Ray has not been started yet")


@pytest.fixture
def printed() -> Iterator[list[str]]:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("ray.data")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def test_it_is_raised_and_not_printed_as_well(printed: list[str]) -> None:
    with FinishedBlocks(Stopped()) as finished, pytest.raises(RuntimeError, match="not been started"):  # type: ignore[arg-type]
        finished.next(60)
    assert printed == []
    with pytest.raises(RuntimeError):  # of everybody else Ray Data says it
        Stopped().iter_internal_ref_bundles()
    assert any("Full stack trace" in message for message in printed)


class Slow:
    """A dataset whose next block comes when it is let go."""

    _create_executor = None

    def __init__(self) -> None:
        self.go = threading.Semaphore(0)

    def iter_internal_ref_bundles(self) -> Iterator[Any]:
        for _ in range(2):
            self.go.acquire()
            yield SimpleNamespace(blocks=[])


def test_that_no_image_comes_is_told_once_in_each_silence(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slow = Slow()
    with FinishedBlocks(slow) as finished:  # type: ignore[arg-type]
        assert finished.next(0.01) == []
        assert caplog.messages == [], "there was no time for one"
        monkeypatch.setattr(consume, "_SILENCE_S", 0.0)
        for num_told in (1, 2):
            assert [finished.next(0.01) for _ in range(3)] == [[], [], []]
            assert len(caplog.messages) == num_told
            slow.go.release()
            assert finished.next(60) == []
        assert finished.next(60) is None
    assert "`ray status`" in caplog.messages[0]


class Executor:
    """Ray Data's, of which somebody else decides when it is started."""

    def __init__(self) -> None:
        self.ident: int | None = None
        self.calls: list[str] = []

    def shutdown(self, *, force: bool) -> None:
        self.calls.append("shutdown" if self.ident is not None else "shutdown of nothing")

    def join(self, timeout: float) -> None:
        self.calls.append("join")


class Begins:
    """A dataset that makes its executor, and then starts it, when it is let to."""

    def __init__(self) -> None:
        self.may_make, self.may_start = threading.Event(), threading.Event()
        self.made: list[Executor] = []

    def _create_executor(self) -> Executor:
        self.made.append(Executor())
        return self.made[-1]

    def iter_internal_ref_bundles(self) -> Iterator[Any]:
        self.may_make.wait(60)
        executor = self._create_executor()
        self.may_start.wait(60)
        executor.ident = 1
        yield from ()


def test_what_a_run_left_before_it_began_never_begins_or_is_ended_once_it_has() -> None:
    dataset = Begins()
    with FinishedBlocks(dataset) as finished:  # type: ignore[arg-type]
        threading.Timer(0.1, dataset.may_make.set).start()
    finished._thread.join(60)
    assert dataset.made == []

    dataset = Begins()
    dataset.may_make.set()
    with FinishedBlocks(dataset):  # type: ignore[arg-type]
        wait_for(lambda: bool(dataset.made))
        threading.Timer(0.1, dataset.may_start.set).start()
    assert dataset.made[0].calls == ["shutdown", "join"]


def test_an_executor_that_is_never_started_prints_no_trace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(consume, "_JOIN_S", 0.05)
    dataset = Begins()
    dataset.may_make.set()
    with FinishedBlocks(dataset):  # type: ignore[arg-type]
        wait_for(lambda: bool(dataset.made))
    dataset.may_start.set()
    assert dataset.made[0].calls == ["shutdown of nothing"]
    assert capsys.readouterr().err == ""
