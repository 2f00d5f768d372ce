"""Run records, leases and the archive of policies."""

from __future__ import annotations

import datetime as dt
import os
import time
from asyncio import CancelledError
from pathlib import Path

import pytest

from tests.catalog_samples import config_of
from vlmflow.catalog import runs as runs_module
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.policies import PolicyStore
from vlmflow.catalog.runs import DEAD_AFTER, RunStore
from vlmflow.errors import CatalogError


@pytest.fixture
def runs(tmp_path: Path) -> RunStore:
    return RunStore(Folder(config_of(tmp_path)))


def test_a_run_is_live_from_start_to_finish(runs: RunStore) -> None:
    assert runs.state("r1") is None
    runs.start("r1", {"tasks": ["embed"]})
    assert runs.is_live("r1")
    assert runs.over() == set()
    runs.heartbeat("r1")
    runs.finish("r1", {"tasks": ["embed"], "rows": 3})
    assert runs.over() == {"r1"}
    assert runs.state("r1") == "finished"
    assert runs.get("r1") == {"run_id": "r1", "tasks": ["embed"], "rows": 3}


def test_a_run_without_a_heartbeat_for_ten_minutes_is_dead(runs: RunStore, tmp_path: Path) -> None:
    runs.start("r1", {})
    old = time.time() - DEAD_AFTER.total_seconds() - 5
    os.utime(tmp_path / "runs" / "r1.lease", (old, old))
    assert runs.state("r1") == "dead"
    assert runs.over() == set(), "its process may only be suspended, and commit"
    runs.heartbeat("r1")
    assert runs.state("r1") == "running"


def test_runs_are_listed_newest_first(runs: RunStore, tmp_path: Path) -> None:
    """By when they started, in whatever form: a vacuum buries an old one, and a disk may know whole seconds alone."""
    runs.start("without", {})
    for run, started_at in (("r9", "2026-03-01T02:00:00Z"), ("r2", "2026-03-02T02:00:00.5+00:00"), ("odd", "soon")):
        runs.start(run, {"started_at": started_at})
    for run in ("r0", "r1"):
        runs.start(run, {"started_at": "2026-03-02T02:00:00"})
    runs.finish("r1", {"started_at": "2026-03-02T02:00:00"})
    runs.bury("r9")
    for run in ("r9", "r2", "r1", "r0"):
        os.utime(tmp_path / "runs" / f"{run}.json", (1000, 1000))
    listed = {run.run_id: run for run in runs.list()}
    assert list(listed) == ["r2", "r1", "r0", "r9", "without", "odd"]
    assert (listed["r2"].state, listed["r1"].state) == ("running", "finished")
    assert isinstance(listed["r2"].seen_at, dt.datetime)
    assert listed["r1"].seen_at is None


def noted_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of runs whose records are read from now on."""
    read: list[str] = []
    original = RunStore.get

    def noted(self: RunStore, run_id: str) -> dict[str, object] | None:
        read.append(run_id)
        return original(self, run_id)

    monkeypatch.setattr(RunStore, "get", noted)
    return read


def test_records_are_read_as_they_are_asked_for(runs: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """An id begins with when its run started; runs of one second come as their records say, on whatever page."""
    monkeypatch.setattr(runs_module, "_READ_AT_ONCE", 2)
    for number in range(20):
        run = f"2026030{1 + number // 10}T0200{number % 10:02}-{(7 * number) % 20:08x}"
        runs.start(run, {"number": number, "started_at": "2020-01-01T00:00:00Z"})
    for run, second in (("20260302T020009-f", "09.1"), ("20260302T020009-0", "09.2"), ("flight", "08.5")):
        runs.start(run, {"started_at": f"2026-03-02T02:00:{second}Z"})
    read = noted_reads(monkeypatch)
    newest = runs.newest()
    assert [next(newest).run_id for _ in range(2)] == ["20260302T020009-0", "20260302T020009-f"]
    assert len(read) <= 4
    assert [run.record.get("number") for run in newest] == [19, None, *range(18, -1, -1)]
    assert len(read) == len(set(read)) == 23


def test_an_id_is_used_once(runs: RunStore) -> None:
    runs.start("r1", {})
    with pytest.raises(CatalogError, match="run r1 exists"):
        runs.start("r1", {})


def test_an_archived_policy_does_not_change(tmp_path: Path) -> None:
    policies = PolicyStore(Folder(config_of(tmp_path)))
    policies.put("abc", {"policy.yaml": b"one", "prompts.npz": b"\0\1"})
    policies.put("abc", {"policy.yaml": b"two"})
    assert policies.get("abc") == {"policy.yaml": b"one", "prompts.npz": b"\0\1"}
    assert policies.digests() == ["abc"]
    with pytest.raises(CatalogError, match="no policy xyz"):
        policies.get("xyz")


def test_upkeep_has_a_lease_while_it_works_and_a_record_afterwards(runs: RunStore) -> None:
    with runs.recorded("vacuum") as run_id:
        assert runs.is_live(run_id)
    assert runs.state(run_id) == "finished"
    record = runs.get(run_id)
    assert record is not None
    assert (record["operation"], record["status"]) == ("vacuum", "done")
    with pytest.raises(KeyError), runs.recorded("erase") as failed:
        raise KeyError
    assert (runs.get(failed) or {})["status"] == "failed"
    with pytest.raises(CancelledError), runs.recorded("backfill") as stopped:
        raise CancelledError  # as a flow run is ended
    assert (runs.get(stopped) or {})["status"] == "interrupted"


def test_what_is_done_every_few_seconds_leaves_no_record(runs: RunStore, tmp_path: Path) -> None:
    with runs.recorded("review", is_kept=False) as run_id:
        assert runs.is_live(run_id)
        assert (runs.get(run_id) or {})["operation"] == "review"
    with pytest.raises(KeyError), runs.recorded("review", is_kept=False):
        raise KeyError
    assert runs.states() == {}
    assert list((tmp_path / "runs").iterdir()) == []


def test_runs_that_are_spent_are_those_of_one_kind_that_have_ended(runs: RunStore) -> None:
    for run, operation in (("20260301T020000-a", "review"), ("20260301T020000-b", "erase"), ("odd", "review")):
        runs.start(run, {"operation": operation})
        runs.finish(run, {"operation": operation, "status": "done"})
    runs.start("20260301T020000-c", {"operation": "review"})
    with runs.recorded("review"):
        pass
    assert runs.spent(["review"], dt.timedelta(days=1)) == ["20260301T020000-a"]
    assert sorted(runs.spent(("review", "erase"), dt.timedelta(days=1))) == ["20260301T020000-a", "20260301T020000-b"]
    runs.forget(["20260301T020000-a"])
    assert runs.get("20260301T020000-a") is None


def test_to_find_spent_runs_no_record_of_an_enrichment_is_read(runs: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    enrichment = {"status": "done", "stages": [{"stage": "decode", "images": 3}] * 50}
    for year in range(2000, 2025):
        runs.finish(f"{year}0301T020000-{year:08x}", enrichment)
    runs.finish("20260301T020000-a", {"operation": "vacuum", "status": "done"})
    read = noted_reads(monkeypatch)
    assert runs.spent(("review", "vacuum"), dt.timedelta(days=1)) == read == ["20260301T020000-a"]
