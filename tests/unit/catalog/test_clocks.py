"""A machine whose clock is not that of the store takes no live run for dead."""

from __future__ import annotations

import datetime as dt
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from pipelines import at_work
from pipelines.at_work import backfill_at_work, night_at_work
from tests.catalog_samples import config_of, enrich, open_catalog, references
from tests.report_samples import put_rows, record
from vlmflow.catalog import Catalog
from vlmflow.catalog import commit as commit_module
from vlmflow.catalog import runs as runs_module
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.history import History
from vlmflow.catalog.runs import RunStore
from vlmflow.config import CatalogConfig, Job, SourceConfig
from vlmflow.errors import BackfillError, TransientError

HOUR = dt.timedelta(hours=1)


def set_clock(monkeypatch: pytest.MonkeyPatch, off_by: dt.timedelta) -> None:
    """Of this machine, as far as it reads and writes records."""

    class Clock(dt.datetime):
        @classmethod
        def now(cls, tz: dt.tzinfo | None = None) -> Clock:
            return cls.fromtimestamp((dt.datetime.now(tz) + off_by).timestamp(), tz)

    module = {name: getattr(dt, name) for name in dir(dt) if not name.startswith("__")}
    monkeypatch.setattr(runs_module, "dt", SimpleNamespace(**module | {"datetime": Clock}))


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CatalogConfig:
    """A catalog with a live run, of a machine whose clock is right; ours is ahead."""
    config = config_of(tmp_path / "catalog")
    put_rows(config, ["a"], run="before")
    Catalog.open(config).runs.start("live", record("live", status="running"))
    set_clock(monkeypatch, HOUR)
    return config


def test_a_vacuum_and_an_erasure_know_that_it_lives(config: CatalogConfig) -> None:
    assert Catalog.open(config).runs.state("live") == "dead", "who writes nothing goes by his own clock"
    result = Catalog.open(config).vacuum()
    assert (result.revoked, result.live_runs) == ((), ("live",))
    assert Catalog.open(config).erase(pa.array([b"0" * 16], pa.binary(16))).live_runs == ("live",)


def test_what_a_machine_that_is_ahead_has_replaced_is_an_old_file_and_no_orphan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = open_catalog(tmp_path)
    catalog.runs.start("r0", {})
    enrich(catalog, "r0", [references(["a"])])
    catalog.runs.finish("r0", {})
    ahead = SimpleNamespace(time=lambda: time.time() + HOUR.total_seconds(), sleep=time.sleep)
    monkeypatch.setattr(commit_module, "time", ahead)
    enrich(catalog, "r1", [references(["a"], version="v2")])
    result = catalog.vacuum()
    assert (result.num_kept, sum(result.num_files.values())) == (1, 0)
    assert len(list((tmp_path / "images").glob("ingest_date=*/r0-*.parquet"))) == 1


def test_of_two_backfills_the_second_is_refused(config: CatalogConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs_module, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(at_work, "_POLL_S", 0.02)
    first, refused = Catalog.open(config).flows, pytest.raises(BackfillError, match="other is at work")
    first.start("other", {"operation": "backfill: policy strict 2"})
    with first.keep_alive("other"), refused, backfill_at_work(config, "policy lax 3"):
        pytest.fail("two policies at once")


def test_a_night_sees_the_other(config: CatalogConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs_module, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(at_work, "_POLL_S", 0.02)
    store = Catalog.open(config).runs
    given = {"source": "/photos", "config": {"date": "2026-03-01"}}
    store.start("night", record("night", status="running", **given))
    with store.keep_alive("night"):
        other = night_at_work(Job(source=SourceConfig(uri="/photos"), catalog=config, profile="starter"))
    assert other is not None
    assert other.run_id == "night"
    assert set(store.states()) == {"live", "night"}, "the file that tells the time is no run"


@pytest.mark.parametrize("off_by", [HOUR, -HOUR])
def test_a_live_run_is_not_settled_by_who_looks_at_all_rows(
    config: CatalogConfig, monkeypatch: pytest.MonkeyPatch, off_by: dt.timedelta
) -> None:
    set_clock(monkeypatch, off_by)
    Catalog.open(config).apply_verdicts(lists_changed=True)
    assert Catalog.open(config).runs.unsettled() == {"live"}


def test_nor_by_a_record_that_does_not_tell_the_time_of_the_store(config: CatalogConfig) -> None:
    runs = Catalog.open(config).runs
    with runs.recorded("review", every_row=True) as run_id:
        pass
    written = runs.get(run_id) or {}
    runs.finish(run_id, written | {"every_row": True})  # as written before
    assert runs.unsettled() == {"live"}


def test_a_run_that_can_have_no_record_leaves_no_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Folder.write

    def full(self: Folder, path: str, data: bytes, **options: Any) -> None:
        if path.endswith(".json"):
            raise TransientError("no room")
        original(self, path, data, **options)

    runs = RunStore(Folder(config_of(tmp_path)))
    monkeypatch.setattr(Folder, "write", full)
    with pytest.raises(TransientError, match="no room"):
        runs.start("r1", {})
    assert runs.states() == {}


def test_what_ended_an_upkeep_is_told_and_not_that_its_record_could_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def lost(self: RunStore, run_id: str, record: dict[str, Any], **_: Any) -> None:
        raise TransientError(f"out of reach: {json.dumps(record['status'])}")

    monkeypatch.setattr(RunStore, "finish", lost)
    runs = RunStore(Folder(config_of(tmp_path)))
    with pytest.raises(KeyError), runs.recorded("erase"):
        raise KeyError
    assert 'could not be completed: out of reach: "failed"' in caplog.text


def test_a_lease_of_a_time_when_the_clock_was_ahead_keeps_no_run_alive(config: CatalogConfig) -> None:
    lease = Path(config.uri) / "runs" / "live.lease"
    runs = Catalog.open(config).runs
    runs.set_clock()
    for ahead, state in [(HOUR, "running"), (100 * HOUR, "dead")]:
        at = time.time() + ahead.total_seconds()
        os.utime(lease, (at, at))
        assert runs.state("live") == state, "a clock may be set back while a run lives, which beats again soon"
    assert Catalog.open(config).vacuum().revoked == ("live",)


def test_nor_does_a_night_wait_for_it_for_as_long(config: CatalogConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(at_work, "_LOOK_S", 0.2)
    monkeypatch.setattr(at_work, "_POLL_S", 0.02)
    store = Catalog.open(config).runs
    store.start("night", record("night", status="running", source="/photos", config={"date": "2026-03-01"}))
    at = time.time() + HOUR.total_seconds()
    os.utime(Path(config.uri) / "runs" / "night.lease", (at, at))
    assert night_at_work(Job(source=SourceConfig(uri="/photos"), catalog=config, profile="starter")) is None


def log_of(folder: Path, times: list[tuple[dt.datetime, dt.datetime]]) -> History:
    """Entries of a log, each with the time that it says and the time at which it was put there."""
    place = folder / "images" / "_delta_log"
    place.mkdir(parents=True)
    for number, (said, put) in enumerate(times):
        entry = place / f"{number:020d}.json"
        entry.write_text(json.dumps({"commitInfo": {"timestamp": int(said.timestamp() * 1000)}}))
        os.utime(entry, (put.timestamp(), put.timestamp()))
    return History(Folder(config_of(folder)), "images")


BEGAN = dt.datetime(2026, 3, 1, tzinfo=dt.UTC)


@pytest.mark.parametrize("wrong", ["of the machine", "of a node of a store"])
def test_what_a_clock_that_was_behind_has_made_since_a_time_is_never_left_out(tmp_path: Path, wrong: str) -> None:
    """Fifty versions of a right clock, an hour apart, fifty of one a year behind, and perhaps a right one again."""
    right = [BEGAN + number * HOUR for number in range(100)]
    told = right[:50] + [at - 8760 * HOUR for at in right[50:]]
    put = told if wrong == "of the machine" else right
    log = log_of(tmp_path / "a", list(zip(told, put, strict=True)))
    minute = HOUR / 60
    for number in (3, 20, 48, 49):
        assert log.version_before(right[number] + minute, 99) == number
    assert log.version_before(right[60], 99) == 49, "of which of them came before it nothing tells"
    healed = right[99] + HOUR
    log = log_of(tmp_path / "b", [*zip(told, put, strict=True), (healed, healed)])
    assert log.version_before(right[60], 100) == 49
    assert log.version_before(healed + minute, 100) == 100, "the right one shows that they came before"


def test_a_copy_of_a_catalog_goes_by_what_its_versions_say(tmp_path: Path) -> None:
    copied = BEGAN + 10_000 * HOUR
    log = log_of(tmp_path, [(BEGAN + number * HOUR, copied) for number in range(100)])
    assert [log.version_before(BEGAN + number * HOUR, 99) for number in (0, 50, 99)] == [0, 50, 99]


def test_an_erasure_is_told_to_who_follows_though_the_clock_was_ahead_before(config: CatalogConfig) -> None:
    put_rows(config, ["b"], run="more")
    catalog = Catalog.open(config)
    since = catalog.version
    entry = Path(config.uri) / "images" / "_delta_log" / f"{since:020d}.json"
    ahead = dt.datetime.now(dt.UTC) + 1000 * HOUR
    lines = [json.loads(line) for line in entry.read_text().splitlines()]
    for line in lines:
        if "commitInfo" in line:
            line["commitInfo"]["timestamp"] = int(ahead.timestamp() * 1000)
    entry.write_text("".join(json.dumps(line) + "\n" for line in lines))
    image_id = catalog.images(["image_id"])["image_id"][0].as_py()
    catalog.erase(pa.array([bytes.fromhex(image_id)], pa.binary(16)))
    feed = Catalog.open(config).changes(since)
    removed = [row for rows in feed.tables() for row in rows.to_pylist() if row["change"] == "removed"]
    assert [row["image_id"] for row in removed] == [image_id]
