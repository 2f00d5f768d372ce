"""Who is taken for being at work on a catalog."""

from __future__ import annotations

import datetime as dt
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from pipelines import at_work
from pipelines.at_work import backfill_at_work, night_at_work, night_begun
from tests.report_samples import put_rows, record
from vlmflow.catalog import Catalog, runs
from vlmflow.config import CatalogConfig, Job, SourceConfig
from vlmflow.errors import BackfillError, StorageAccessError, TransientError

NIGHT = {"source": "/photos", "config": {"date": "2026-03-01"}}
FIRST, LAST = "20260301T020000-00000000", "99990301T020000-00000000"  # ids of runs before and after those of now


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CatalogConfig:
    config = CatalogConfig(uri=str(tmp_path / "catalog"))
    put_rows(config, ["a"], run="before")
    monkeypatch.setattr(runs, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(at_work, "_POLL_S", 0.02)
    monkeypatch.setattr(at_work, "_LOOK_S", 60.0)
    return config


@contextmanager
def at_work_on(config: CatalogConfig, run: str, given: dict[str, Any]) -> Iterator[None]:
    """A run, or by its operation a flow, that gives signs of life."""
    catalog = Catalog.open(config)
    store = catalog.flows if ": " in str(given.get("operation")) else catalog.runs
    store.start(run, given)
    with store.keep_alive(run):
        yield
    store.finish(run, given)


def job(config: CatalogConfig, source: str = "/photos") -> Job:
    return Job(source=SourceConfig(uri=source), catalog=config, profile="starter")


def found(config: CatalogConfig, source: str = "/photos", own: str | None = None) -> str | None:
    other = night_at_work(job(config, source), own)
    return None if other is None else other.run_id


def test_a_night_over_the_same_source_is_at_work_until_it_is_over(config: CatalogConfig) -> None:
    assert found(config) is None
    with at_work_on(config, "other", record("other", status="running", **NIGHT)):
        assert found(config) == "other"
        assert found(config, "/drawings") is None
    assert found(config) is None


def test_where_no_catalog_is_no_night_is_at_work(tmp_path: Path) -> None:
    config = CatalogConfig(uri=str(tmp_path / "none"))
    assert found(config) is None
    with night_begun(job(config)) as own:
        assert own is None
        assert found(config, own=own) is None
    assert not Catalog.exists(config)


def test_of_nights_that_begin_at_once_the_first_to_say_so_goes_on(config: CatalogConfig) -> None:
    with night_begun(job(config)) as first, night_begun(job(config)) as second:
        assert found(config) in (first, second), "one that has not begun keeps away"
        assert found(config, own=first) is None
        assert found(config, own=second) == first
        assert found(config, "/drawings") is None
        with at_work_on(config, "other", record("other", status="running", **NIGHT)):
            assert found(config, own=first) == "other", "one that computes was before all who are on their way"
    assert found(config) is None
    assert Catalog.open(config).flows.list() == [], "nothing is left of them"


def test_a_night_that_was_killed_on_its_way_keeps_nobody_away(
    config: CatalogConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(at_work, "_LOOK_S", 0.5)
    flows = Catalog.open(config).flows
    flows.start(FIRST, {"operation": "night: /photos", "started_at": "2026-03-01T02:00:00+00:00"})
    assert found(config) is None
    os.utime(Path(config.uri) / "flows" / f"{FIRST}.lease", (1000, 1000))
    with night_begun(job(config)) as own:
        assert [*flows.states()] == [own], "it was swept away"


def test_runs_that_commit_nothing_make_nobody_look_through_rows_or_wait(config: CatalogConfig) -> None:
    catalog = Catalog.open(config)
    before = catalog.runs.unsettled()
    with night_begun(job(config)), backfill_at_work(config, "policy lax 3"):
        assert len(catalog.flows.running()) == 2
        assert catalog.runs.unsettled() == before
        assert catalog.vacuum().live_runs == ()
        assert catalog.erase(pa.array([b"0" * 16], pa.binary(16))).live_runs == ()


def test_no_night_fails_for_not_having_said_that_it_begins(
    config: CatalogConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise TransientError("the store is throttling")

    monkeypatch.setattr(runs.RunStore, "start", refuse)
    with night_begun(job(config)) as own:
        assert own is None
    assert "will not know of this one: the store is throttling" in caplog.text
    with pytest.raises(TransientError, match="in the night"), night_begun(job(config)):
        raise TransientError("in the night")


def test_a_night_that_may_not_say_that_it_begins_fails(config: CatalogConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its role may write no prefix ``flows/``: each night would be the only one that it knows of."""

    def refuse(*_: object, **__: object) -> None:
        raise StorageAccessError("the store refused")

    monkeypatch.setattr(runs.RunStore, "start", refuse)
    with pytest.raises(StorageAccessError), night_begun(job(config)):
        pytest.fail("it began")


@pytest.mark.parametrize("given", [{"source": "/photos", "config": {"date": None}}, {"operation": "vacuum"}])
def test_other_runs_are_no_night(config: CatalogConfig, given: dict[str, Any]) -> None:
    with at_work_on(config, "other", record("other", status="running", **given)):
        assert found(config) is None


def test_a_night_that_was_killed_keeps_nobody_away(config: CatalogConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(at_work, "_LOOK_S", 0.5)
    store = Catalog.open(config).runs
    store.start("killed", record("killed", status="running", **NIGHT))
    assert store.is_live("killed"), "for ten minutes its lease says so"
    assert found(config) is None


def test_a_night_that_was_killed_at_work_is_looked_for_once(
    config: CatalogConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(at_work, "_LOOK_S", 10.0)
    monkeypatch.setattr(at_work, "_POLL_S", 1.0)
    catalog, slept = Catalog.open(config), []
    catalog.runs.start("killed", record("killed", status="running", **NIGHT))
    catalog.flows.start(FIRST, {"operation": "night: /photos", "started_at": "2026-03-01T02:00:00+00:00"})
    monkeypatch.setattr(at_work, "time", SimpleNamespace(sleep=slept.append, monotonic=lambda: sum(slept)))
    monkeypatch.setattr(runs, "time", SimpleNamespace(monotonic=lambda: sum(slept)))
    with caplog.at_level("INFO", "vlmflow"):
        assert found(config) is None
    assert 9.0 <= sum(slept) <= 10.0
    assert f"for up to 10 seconds, of what may be at work: killed, {FIRST}" in caplog.text


def test_a_night_that_ends_while_one_looks_is_not_waited_for(
    config: CatalogConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(at_work, "_LOOK_S", 1000.0)
    store = Catalog.open(config).runs
    store.start("ending", record("ending", status="running", **NIGHT))

    def sleep(_: float) -> None:
        store.finish("ending", record("ending", status="done", **NIGHT))

    monkeypatch.setattr(at_work, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    assert found(config) is None


def test_who_has_been_silent_for_long_is_not_waited_for(config: CatalogConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a night, which looks before each of its steps, waits once for one that was killed."""
    monkeypatch.setattr(at_work, "_LOOK_S", 90.0)
    Catalog.open(config).runs.start("killed", record("killed", status="running", **NIGHT))
    silent = time.time() - 95
    os.utime(Path(config.uri) / "runs" / "killed.lease", (silent, silent))
    waits = SimpleNamespace(sleep=lambda _: pytest.fail("it was waited for"), monotonic=time.monotonic)
    monkeypatch.setattr(at_work, "time", waits)
    assert found(config) is None


# A run of the same second has an id that may come before or after.
@pytest.mark.parametrize("run", [FIRST, LAST])
def test_of_backfills_to_two_policies_the_second_is_refused(config: CatalogConfig, run: str) -> None:
    with (
        at_work_on(config, run, {"operation": "backfill: policy strict 2"}),
        pytest.raises(BackfillError, match=f"{run} is at work, backfill: policy strict 2"),
        backfill_at_work(config, "policy lax 3"),
    ):
        pytest.fail("two policies at once")


@pytest.mark.parametrize(
    ("run", "operation"),
    [
        (FIRST, "backfill: policy lax 3"),  # the same, killed and started again
        (FIRST, "remoderate"),
    ],
)
def test_a_backfill_goes_on_beside_others(config: CatalogConfig, run: str, operation: str) -> None:
    with at_work_on(config, run, {"operation": operation}), backfill_at_work(config, "policy lax 3"):
        own = [other for other in Catalog.open(config).flows.list() if other.run_id != run]
        assert [(other.state, other.record["operation"]) for other in own] == [("running", "backfill: policy lax 3")]


def test_a_backfill_that_was_killed_keeps_no_other_away(config: CatalogConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(at_work, "_LOOK_S", 0.5)
    Catalog.open(config).flows.start(FIRST, {"operation": "backfill: policy strict 2"})
    with backfill_at_work(config, "policy lax 3"):
        pass


def test_the_last_sign_of_life_is_that_of_the_lease(config: CatalogConfig) -> None:
    store = Catalog.open(config).runs
    assert store.seen_at("none") is None
    store.start("run", {})
    os.utime(Path(config.uri) / "runs" / "run.lease", (1000, 1000))
    assert store.seen_at("run") == dt.datetime.fromtimestamp(1000, dt.UTC)
