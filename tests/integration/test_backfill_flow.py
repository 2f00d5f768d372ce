"""The backfill flow against a real Prefect server: dry, done, killed and resumed beside a night, rolled back."""

from __future__ import annotations

import datetime as dt
import re
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines import at_work, backfill
from pipelines.backfill import moderation_backfill
from pipelines.nightly import nightly_enrichment
from tests.flows import Prefect, process, write_job
from tests.pictures import picture, write_pictures
from vlmflow.catalog import Catalog, runs
from vlmflow.config import Job, ModelConfig
from vlmflow.engine import enrich
from vlmflow.errors import BackfillError, ConfigError, UnboundPolicyError
from vlmflow.models import identify
from vlmflow.moderation.policy import bind, load_policy, write_binding

pytestmark = pytest.mark.usefixtures("ray_session")

MODERATION = ("labels", "policy_version", "policy_digest", "decision", "decision_reason")
NIGHT = dt.date(2026, 11, 9)

Rows = dict[str, dict[str, Any]]


@pytest.fixture
def strict(policy: str, models: dict[str, dict[str, Any]], tmp_path: Path) -> str:
    """The policy of conftest with thresholds that everything passes."""
    data = yaml.safe_load(Path(policy).read_text(encoding="utf-8"))
    data |= {"version": "2", "bindings": []}
    data["categories"][0]["labels"][0] |= {"review": 0.0, "block": 0.0}
    path = tmp_path / "strict.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    write_binding(path, bind(load_policy(str(path)), identify("embed", ModelConfig(**models["embed"]))))
    return str(path)


def job_of(make_job: Callable[..., Job], folder: Path, dates: Sequence[dt.date]) -> Job:
    """A job whose catalog holds two images of each date."""
    pools = [{"tasks": ("embed", "moderate"), "cpus": 0.5, "batch_size": 8}]
    ray = {"num_cpus": 2, "object_store_bytes": 200 * 1024 * 1024}
    job = make_job(folder / "images", tasks=("embed", "moderate"), pools=pools, ray=ray)
    for number, date in enumerate(dates):
        write_pictures(folder / "images", 2 * (number + 1))
        enrich(job.model_copy(update={"date": date}))
    return job


def rows_of(job: Job) -> Rows:
    table = Catalog.open(job.catalog).images(["uri", "ingest_date", "content_hash", *MODERATION])
    rows = {row.pop("uri").rsplit("/", 1)[-1]: row for row in table.to_pylist()}
    assert len(rows) == table.num_rows, "an image is there twice"
    return rows


def moderation(rows: Rows) -> Rows:
    return {name: {column: row[column] for column in MODERATION} for name, row in rows.items()}


def moved_dates(job: Job) -> set[dt.date]:
    """Dates of which every row carries the new policy."""
    rows = rows_of(job).values()
    return {row["ingest_date"] for row in rows} - {row["ingest_date"] for row in rows if row["policy_version"] == "1"}


def run(job_file: Path, **options: Any) -> Any:
    return moderation_backfill(job_file, return_state=True, **options)


def test_dry_then_done_then_rolled_back(
    prefect: Prefect, make_job: Callable[..., Job], strict: str, tmp_path: Path
) -> None:
    dates = [dt.date(2026, 11, day) for day in (1, 2, 3)]
    job = job_of(make_job, tmp_path, dates)
    job_file = write_job(job, tmp_path / "job.yaml")
    before, version = rows_of(job), Catalog.open(job.catalog).version

    dry = run(job_file, policy=strict, dry_run=True, end=dates[1])
    assert dry.message == "Policy test 2, dry run: 4 rows, 2 partitions."
    assert (rows_of(job), Catalog.open(job.catalog).version) == (before, version)
    would = prefect.artifacts()["backfill-diff"]["data"]
    assert "4 images would move." in would
    assert "| `gun` |" in would
    assert ".jpg" in would

    done = run(job_file, policy=strict, end=dates[1], partitions_at_once=2)
    assert done.message == "Policy test 2: 4 rows, 2 partitions."
    shown = prefect.artifacts()
    told = shown["backfill-diff"]["data"]
    assert told.partition("images moved.")[2] == would.partition("images would move.")[2].replace("would come", "came")
    assert shown["backfill"]["data"] == 100.0
    partitions = yaml.safe_load(shown["backfill-partitions"]["data"])
    assert [(row["partition"], row["state"], row["images"]) for row in partitions] == [
        ("2026-11-01", "done", 2),
        ("2026-11-02", "done", 2),
    ]
    assert moved_dates(job) == set(dates[:2])
    assert run(job_file, policy=strict, end=dates[1]).message == "Policy test 2: 0 rows, 2 partitions."
    assert prefect.runs("moderation-backfill")[0]["name"] == "policy strict, first to 2026-11-02"

    digest = rows_of(job)["picture 00000.jpg"]["policy_digest"]
    back = run(job_file, rollback=digest[:12])
    first = before["picture 00000.jpg"]["policy_digest"]
    assert back.message == f"Rollback of policy {digest[:12]}: 4 rows, back to test 1 ({first[:12]}), 3 partitions."
    assert rows_of(job) == before


def test_what_cannot_be_asked_for_is_named(
    prefect: Prefect, make_job: Callable[..., Job], strict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(make_job, tmp_path, [NIGHT])
    job_file = write_job(job, tmp_path / "job.yaml")
    unbound = tmp_path / "unbound.yaml"
    unbound.write_text(re.sub(r"(?ms)^bindings:.*", "", Path(strict).read_text(encoding="utf-8")), encoding="utf-8")
    with monkeypatch.context() as patched:
        for begun in ("_all_partitions", "backfill_at_work"):
            patched.setattr(backfill, begun, lambda *_: pytest.fail("the backfill has begun"))
        with pytest.raises(ConfigError, match="names both a policy and a rollback"):
            run(job_file, policy=strict, rollback="abc").result()
        for dry_run in (False, True):
            with pytest.raises(ConfigError, match="no_such_column"):
                run(job_file, policy=strict, where="no_such_column = 1", dry_run=dry_run).result()
        with pytest.raises(ConfigError, match="abcabc"):
            run(job_file, rollback="abcabc").result()
        with pytest.raises(UnboundPolicyError, match="bound: none"):
            run(job_file, policy=str(unbound)).result()
    nothing = run(job_file, policy=strict, start=dt.date(2030, 1, 1))
    assert nothing.message.startswith("Nothing to do: ")
    monkeypatch.setattr(runs, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(at_work, "_POLL_S", 0.1)
    with Catalog.open(job.catalog).flows.recorded("backfill: policy lax 3", is_kept=False):
        with pytest.raises(BackfillError, match="is at work, backfill: policy lax 3"):
            run(job_file, policy=strict).result()
        assert run(job_file, policy=strict, dry_run=True).is_completed()
    assert moved_dates(job) == set()


@pytest.mark.slow
def test_killed_after_two_of_five_and_resumed_beside_a_night(
    prefect: Prefect, make_job: Callable[..., Job], strict: str, tmp_path: Path
) -> None:
    dates = [dt.date(2026, 11, day) for day in range(1, 6)]
    job = job_of(make_job, tmp_path, dates)
    job_file = write_job(job, tmp_path / "job.yaml")
    before = rows_of(job)
    backfill = ["--job-file", str(job_file), "--policy", strict, "--end", str(dates[-1])]

    third = ["tests.kill", "in the commit, before it is written", "3", "backfill"]
    with process(prefect, tmp_path / "killed.log", *third, *backfill) as killed:
        assert killed.wait(280) == -signal.SIGKILL, (tmp_path / "killed.log").read_text()
    at_kill = moderation(rows_of(job))
    assert moved_dates(job) == set(dates[:2])
    assert "2 of 5 partitions" in (tmp_path / "killed.log").read_text()
    # Tables are as old as a minute.
    partitions = yaml.safe_load(prefect.artifacts()["backfill-partitions"]["data"])
    assert [row["state"] for row in partitions[:1] + partitions[2:]] == ["done"] + ["waiting"] * 3
    assert "of 5 partitions" in prefect.artifacts()["backfill-diff"]["data"]

    # It goes on beside a night that finds an image that is new and one that has changed.
    picture(500).save(tmp_path / "images" / "new.png")
    picture(501).save(tmp_path / "images" / "picture 00001.png")
    with process(prefect, tmp_path / "resumed.log", "pipelines.backfill", *backfill) as resumed:
        night = nightly_enrichment(job_file, date=NIGHT, return_state=True)
        assert resumed.wait(280) == 0, (tmp_path / "resumed.log").read_text()
    # With the runs of the 3rd to the 5th, which nobody has reported: they were given their dates, as nights are.
    assert night.message.startswith("2026-11-09: 7 rows new, 19 replaced"), night.message
    # Images that the night replaced after their partition had moved carry the job's policy: once more.
    assert run(job_file, policy=strict, end=dates[-1]).is_completed()

    after = rows_of(job)
    assert after.keys() == before.keys() | {"new.png"}
    assert moved_dates(job) == set(dates)
    assert after["new.png"]["policy_version"] == "1"
    assert after["picture 00001.png"]["content_hash"] != before["picture 00001.png"]["content_hash"]
    touched = {"new.png", "picture 00001.png"}
    untouched, final = before.keys() - touched, moderation(after)
    # Every row at the time of the kill was wholly the old one or wholly the new one.
    old = moderation(before)
    assert all(at_kill[name] in (old[name], final[name]) for name in untouched)
    assert any(at_kill[name] == final[name] for name in untouched)

    back = run(job_file, rollback=after["picture 00000.jpg"]["policy_digest"])
    assert back.is_completed()
    final = moderation(rows_of(job))
    assert {name: final[name] for name in untouched} == {name: old[name] for name in untouched}
    assert {row["policy_version"] for row in final.values()} == {"1"}
