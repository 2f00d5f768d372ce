"""Partitions of a backfill: a few at once, none after one has failed, shown now and then."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from prefect.futures import PrefectConcurrentFuture

from pipelines import artifacts, backfill
from tests.flows import write_job
from vlmflow.config import Job
from vlmflow.engine.remoderate_report import RemoderateReport
from vlmflow.errors import CatalogError, PolicyError

JOB = Job.model_validate({"source": {"uri": "/images"}, "catalog": {"uri": "/catalog"}, "profile": "starter"})
DATES = [dt.date(2026, 11, day) for day in range(1, 21)]
MOVED = RemoderateReport(run_id="r", dry_run=False, catalog="/catalog", policy="p 2", policy_digest="d", status="done",
                         started_at=dt.datetime(2026, 11, 1, tzinfo=dt.UTC))  # fmt: skip


class Moves:
    """In the place of the task: one partition fails at once, the others take a moment."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self.fails: dt.date | None = None
        self.seconds = 0.0
        self.begun: list[dt.date] = []
        self.done: list[dt.date] = []

    def submit(self, steps: Any, job: Job, date: dt.date, *_: Any) -> PrefectConcurrentFuture[RemoderateReport]:
        self.begun.append(date)
        return PrefectConcurrentFuture(uuid4(), self._pool.submit(self._move, date))

    def _move(self, date: dt.date) -> RemoderateReport:
        if date == self.fails:
            raise CatalogError("a file is damaged")
        time.sleep(self.seconds)
        self.done.append(date)
        return MOVED


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> Iterator[Moves]:
    with ThreadPoolExecutor(4) as pool:
        made = Moves(pool)
        monkeypatch.setattr(backfill, "move_partition", made)
        yield made


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many partitions were done each time that the tables were shown."""
    counts: list[int] = []

    def show(key: str, reports: Mapping[str, RemoderateReport | None]) -> None:
        counts.append(sum(report is not None for report in reports.values()))

    monkeypatch.setattr(backfill, "RunProgress", lambda _: SimpleNamespace(show=lambda *_: None))
    monkeypatch.setattr(artifacts, "show_partitions", show)
    monkeypatch.setattr(artifacts, "show_diff", lambda *_: None)
    return counts


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"policy": "policies/mine.yaml"}, "policy mine, first to last"),
        ({"policy": None, "dry_run": True}, "dry run, policy of the job, first to last"),
        ({"rollback": "c1cc7a", "start": DATES[0]}, "rollback of c1cc7a, 2026-11-01 to last"),
    ],
)
def test_the_name_of_a_run_says_where_rows_go(
    given: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backfill, "runtime", SimpleNamespace(flow_run=SimpleNamespace(parameters=given)))
    assert backfill._run_name() == name


def move(num: int, at_once: int) -> list[RemoderateReport]:
    steps: Any = None
    return backfill._all_partitions(steps, JOB, DATES[:num], None, None, False, at_once)


@pytest.mark.parametrize("fails", [0, 1])
def test_one_that_fails_ends_the_backfill_once_those_beside_it_are_over(
    moves: Moves, shown: list[int], fails: int
) -> None:
    moves.fails, moves.seconds = DATES[fails], 0.5
    with pytest.raises(CatalogError, match=rf"partition {DATES[fails]}, when \d of 4 were done: .*damaged"):
        move(4, at_once=2)
    assert moves.begun == DATES[:2]
    assert moves.done == [DATES[1 - fails]]
    assert shown == [1], "what was done before is shown"


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_policy_that_cannot_be_used_fails_before_any_partition(
    moves: Moves, shown: list[int], dry_run: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backfill, "log_to_flow_run", lambda: None)
    monkeypatch.setattr(backfill, "partitions", lambda *_: DATES)
    monkeypatch.setattr(backfill, "make_steps", lambda *_: SimpleNamespace())
    job_file = write_job(JOB, tmp_path / "job.yaml")
    with pytest.raises(PolicyError, match=r"no_such\.yaml"):
        backfill.moderation_backfill.fn(job_file, policy="no_such.yaml", dry_run=dry_run, partitions_at_once=4)
    assert moves.begun == []


def test_of_many_partitions_tables_are_made_now_and_then(
    moves: Moves, shown: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(move(20, at_once=3)) == 20
    assert moves.begun == DATES
    assert shown == [1, 20]
    shown.clear()
    move(1, at_once=3)
    assert shown == [1]
    shown.clear()
    monkeypatch.setattr(backfill, "_SHOW_INTERVAL_S", 0.0)
    move(3, at_once=1)
    assert shown == [1, 2, 3]
