"""Where reports of nights go, and which runs of nights have none yet."""

from __future__ import annotations

import datetime as dt
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipelines.reports import default_folder, is_told, note_told, publish_report, unreported
from tests.report_samples import put_record, put_rows, record
from vlmflow.catalog import Catalog
from vlmflow.catalog.runs import RunStore
from vlmflow.config import CatalogConfig, Job, SourceConfig
from vlmflow.engine import RunReport

# Once the report is written, and before it is where it belongs.
KILLED = """
import datetime as dt, os, signal, sys
from pipelines import reports
from vlmflow.config import Job
write = reports.write_report
reports.write_report = lambda *given, **options: (write(*given, **options), os.kill(os.getpid(), signal.SIGKILL))
reports.publish_report(Job.model_validate_json(sys.argv[1]), sys.argv[2], dt.date(2026, 3, 1), sys.argv[3], 30)
"""
NIGHT = dt.date(2026, 3, 1)
NEXT = NIGHT + dt.timedelta(days=1)
IDS = [f"2026030{day}T020000-0000000{day}" for day in range(1, 6)]


@pytest.fixture
def config(tmp_path: Path) -> CatalogConfig:
    config = CatalogConfig(uri=str(tmp_path / "catalog"))
    put_rows(config, ["a", "b"], run=IDS[0])
    put_night(config, IDS[0])
    return config


def put_night(catalog: CatalogConfig, run: str, **given: Any) -> None:
    put_record(catalog, run, **{"source": "/photos", "config": {"date": str(NIGHT)}, **given})


def job_of(config: CatalogConfig) -> Job:
    return Job(source=SourceConfig(uri="/photos/../photos"), catalog=config, profile="starter")


def left(config: CatalogConfig, day: dt.date = NIGHT, keep: int = 30) -> list[RunReport]:
    """The runs without a report, in the default folder."""
    return unreported(job_of(config), day, default_folder(config), keep)


def found(config: CatalogConfig, day: dt.date = NIGHT, keep: int = 30) -> list[str]:
    return [run.run_id for run in left(config, day, keep)]


def publish(config: CatalogConfig, run: str, keep: int = 30) -> None:
    publish_report(job_of(config), run, NIGHT, default_folder(config), keep)


def test_reports_lie_beside_the_catalog(config: CatalogConfig) -> None:
    folder = default_folder(CatalogConfig(uri="s3://bucket/catalog/"))
    assert folder == "s3://bucket/catalog-reports"
    place, written = publish_report(job_of(config), "20260301T020000-00000001", NIGHT, default_folder(config), 30)
    assert place == f"{config.uri}-reports/2026-03-01-20260301T020000-00000001.html"
    assert Path(place).read_text(encoding="utf-8").startswith("<!doctype html>")
    assert written.num_images == 2


def test_of_a_report_whose_night_is_killed_nothing_stays(
    config: CatalogConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    killed = [sys.executable, "-c", KILLED, job_of(config).model_dump_json(), IDS[0], default_folder(config)]
    done = subprocess.run(killed, env=os.environ | {"TMPDIR": str(temporary)}, check=False)
    assert done.returncode == -signal.SIGKILL
    assert list(temporary.rglob("*.html")), "it was killed with a report written"
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    publish(config, IDS[0])
    assert list(temporary.iterdir()) == []


def test_what_a_night_that_was_killed_had_put_there_goes_with_the_next(config: CatalogConfig) -> None:
    folder = Path(default_folder(config))
    folder.mkdir()
    ours, young, others = (folder / name for name in (f"{NIGHT}-{IDS[1]}.html#1", f"{NIGHT}-{IDS[2]}.html#1", "a#1"))
    for path in (ours, young, others):
        path.write_text("half a report")
    for path in (ours, others):
        os.utime(path, (0, 0))
    publish(config, IDS[0])
    assert {path.name for path in folder.iterdir()} == {f"{NIGHT}-{IDS[0]}.html", young.name, others.name}


def test_only_the_newest_of_ours_are_kept(config: CatalogConfig) -> None:
    folder = Path(default_folder(config))
    folder.mkdir()
    others = ["index.html", "2026-03-01.html", "2026-03-01-notes.html", "2026-03-01-20260301T020000-00000001.pdf"]
    old = [f"2026-02-0{day}-2026020{day}T020000-0000000{day}.html" for day in range(1, 6)]
    for name in [*others, *old]:
        (folder / name).write_text("")
    publish_report(job_of(config), "20260301T020000-00000001", NIGHT, str(folder), 1)
    left = {path.name for path in folder.iterdir()}
    assert left == {*others, "2026-03-01-20260301T020000-00000001.html"}


def test_runs_without_a_report_are_found_once(config: CatalogConfig) -> None:
    assert found(config) == IDS[:1]
    publish(config, IDS[0])
    assert found(config) == []


def test_no_report_hides_another_run(config: CatalogConfig) -> None:
    for run in IDS[1:4]:
        put_night(config, run)
    assert found(config) == IDS[:4]
    publish(config, IDS[0])
    publish(config, IDS[2])
    assert found(config) == [IDS[1], IDS[3]]


@pytest.mark.parametrize("status", ["failed", "interrupted", "unreconciled"])
def test_a_run_that_did_not_come_to_its_end_is_reported_by_a_later_night(config: CatalogConfig, status: str) -> None:
    publish(config, IDS[0])
    put_night(config, IDS[1], status=status, message="the store is away", num_added=0, num_replaced=2)
    for days, expected in ((-1, []), (0, IDS[1:2]), (6, IDS[1:2]), (7, [])):
        assert found(config, NIGHT + dt.timedelta(days=days)) == expected, days


def test_a_run_that_has_ended_is_reported_though_it_keeps_its_lease(config: CatalogConfig) -> None:
    publish(config, IDS[0])
    runs = Catalog.open(config).runs
    given = record(IDS[1], source="/photos", config={"date": str(NIGHT)})
    runs.start(IDS[1], given | {"status": "running"})
    runs.finish(IDS[1], given | {"status": "failed"}, keep_lease=True)
    assert found(config) == IDS[1:2]


@pytest.mark.parametrize("is_buried", [False, True])
def test_what_a_killed_run_committed_is_counted_and_reported_once_it_is_dead(
    config: CatalogConfig, is_buried: bool
) -> None:
    publish(config, IDS[0])
    runs = Catalog.open(config).runs
    given = {"source": "/photos", "status": "running", "finished_at": None, "num_added": 0}
    given |= {"statuses": {}, "decisions": {}, "errors": {}}
    for run, date in ((IDS[1], NIGHT), (IDS[2], NEXT), (IDS[3], NEXT)):  # the last committed nothing
        runs.start(run, record(run, config={"date": str(date)}, date=str(date), **given))
    put_rows(config, ["c", "d", "e"], run=IDS[1], decision=["allow", "block", "review"], status=["ok", "ok", "failed"])
    put_rows(config, ["f"], run=IDS[2])  # an image that the night before saw first
    assert found(config, NEXT) == [], "they may go on"
    for run in IDS[1:4]:
        os.utime(Path(config.uri) / "runs" / f"{run}.lease", (1000, 1000))
        if is_buried:
            runs.bury(run)
    first, second = left(config, NEXT)
    assert (first.run_id, first.num_added, first.num_replaced) == (IDS[1], 3, 0)
    assert (second.run_id, second.num_added, second.num_replaced) == (IDS[2], 0, 1)
    assert first.decisions == {"allow": 1, "block": 1, "review": 1}
    assert first.statuses == {"ok": 2, "failed": 1}
    publish(config, IDS[1])
    page = Path(f"{default_folder(config)}/{NIGHT}-{IDS[1]}.html").read_text(encoding="utf-8")
    assert "is counted here from the table" in page
    assert ("gave no sign of life for ten minutes" in page) == (not is_buried)
    assert found(config, NEXT) == IDS[2:3]
    put_rows(config, ["f"], run=IDS[4], replace=True)
    assert found(config, NEXT) == [], "another run has written its row since"


def test_a_report_that_was_removed_is_not_made_again(config: CatalogConfig) -> None:
    for run in IDS[1:]:
        put_night(config, run)
    for run in (IDS[1], IDS[3], IDS[2]):  # a run that ended late is reported late
        publish(config, run, keep=2)
    assert found(config, keep=2) == IDS[4:]


def test_a_run_is_reported_though_every_report_is_of_a_later_one(config: CatalogConfig) -> None:
    """Such as the first of all tries: it was killed, and the next try came through while its lease was fresh."""
    put_night(config, IDS[1])
    publish(config, IDS[1])
    assert found(config) == IDS[:1]


def test_people_were_told_until_the_report_is_there(config: CatalogConfig, tmp_path: Path) -> None:
    folder = default_folder(config)
    put_night(config, IDS[1])
    first, second = left(config)
    assert not is_told(config, first, folder)
    for run in (first, second):
        note_told(config, run, folder)
    assert is_told(config, first, folder)
    assert found(config) == IDS[:2], "a note is no report"
    notes = Path(folder).glob("*.told")
    publish(config, IDS[0])
    assert [note.name for note in notes] == [f"{NIGHT}-{IDS[1]}.told"]
    publish_report(job_of(config), IDS[0], NIGHT + dt.timedelta(days=7), folder, 30)
    assert not is_told(config, second, folder), "no night looks for its report any more"
    for away in ("foo://reports", str(tmp_path / "a file")):
        (tmp_path / "a file").touch()
        note_told(config, first, away)
        assert not is_told(config, first, away), "better told twice than never"


def test_a_run_that_changed_nothing_or_is_none_of_a_night_needs_no_report(config: CatalogConfig) -> None:
    publish(config, IDS[0])
    put_night(config, IDS[1], num_added=0, num_replaced=0)
    put_night(config, IDS[2], config={})  # by hand, without a date
    put_night(config, IDS[3], source="/other")
    runs = Catalog.open(config).runs
    given = {"source": "/photos", "config": {"date": str(NIGHT)}}
    runs.start(IDS[4], record(IDS[4], status="running", **given))  # and still runs
    with runs.recorded("vacuum"):
        pass
    assert found(config) == []


def test_a_record_of_another_version_is_passed_over(config: CatalogConfig) -> None:
    put_night(config, IDS[1], tasks="embed", added_by_a_later_version=1)
    assert found(config) == IDS[:1]


def test_runs_of_years_ago_are_not_looked_at(config: CatalogConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    for year in range(2000, 2025):
        put_night(config, f"{year}0301T020000-{year:08x}", date=f"{year}-03-01")
    put_night(config, IDS[1])
    read: list[str] = []
    original = RunStore._read

    def noted(self: RunStore, run_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        read.extend(run_ids)
        return original(self, run_ids)

    monkeypatch.setattr(RunStore, "_read", noted)
    assert found(config) == IDS[:2]
    assert len(read) <= 16
