"""The nightly flow against a real Prefect server and a real Ray: what it does, says and refuses."""

from __future__ import annotations

import datetime as dt
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.nightly import nightly_enrichment
from pipelines.steps import Golden
from tests.flows import Prefect, write_job
from tests.models import make_captioner, make_clip
from tests.pictures import picture, write_pictures
from tests.processes import wait_for
from vlmflow.catalog import Catalog
from vlmflow.config import Job, SourceConfig
from vlmflow.errors import ConfigError, RegressionError
from vlmflow.gate import golden_values, write_accepted

pytestmark = pytest.mark.usefixtures("ray_session")

FIRST, SECOND = dt.date(2026, 11, 1), dt.date(2026, 11, 2)


@pytest.fixture
def job(make_job: Callable[..., Job], tmp_path: Path) -> Job:
    write_pictures(tmp_path / "images", 9)
    return make_job(tmp_path / "images")


@pytest.fixture
def job_file(job: Job, tmp_path: Path) -> Path:
    return write_job(job, tmp_path / "job.yaml")


@pytest.fixture
def golden(job: Job, tmp_path: Path) -> Golden:
    write_pictures(tmp_path / "golden", 4, first_seed=100)
    accepted = tmp_path / "accepted.json"
    write_accepted(accepted, golden_values(job, SourceConfig(uri=str(tmp_path / "golden"))))
    return Golden(uri=str(tmp_path / "golden"), accepted=accepted)


def run(job_file: Path, date: dt.date, **options: Any) -> Any:
    return nightly_enrichment(job_file, date=date, return_state=True, **options)


def catalogs_of(found: list[dict[str, Any]]) -> set[str]:
    return {event["resource"]["prefect.resource.name"] for event in found}


def versions(job: Job) -> tuple[int, int]:
    catalog = Catalog.open(job.catalog)
    return catalog._images.refreshed_table().version(), catalog._embeddings.refreshed_table().version()


def test_nights_follow_one_another(prefect: Prefect, job: Job, job_file: Path, golden: Golden, tmp_path: Path) -> None:
    first = run(job_file, FIRST, golden=golden)
    assert first.is_completed()
    assert first.message.startswith("2026-11-01: 9 rows new, 0 replaced")
    shown = prefect.artifacts()
    assert {"doctor", "gate", "plan", "enrich", "counts", "verify", "report"} <= shown.keys()
    assert "Quality gate open" in shown["gate"]["data"]
    assert shown["enrich"]["data"] == 100.0
    assert shown["verify"]["description"] == "The catalog is sound."
    page = Path(f"{job.catalog.uri}-reports")
    assert str(page) in shown["report"]["data"]
    assert len(list(page.glob("2026-11-01-*.html"))) == 1

    # Once more for the same date: nothing is due, it says so, and touches nothing.
    before = versions(job)
    again = run(job_file, FIRST)
    assert again.message == "Nothing was due on 2026-11-01: 9 images listed, all up to date."
    assert versions(job) == before

    # A flow that was killed between its run and its report: the report is made up for, no row is touched.
    for report in page.glob("*.html"):
        report.unlink()
    late = run(job_file, FIRST)
    assert late.message.startswith("2026-11-01: 9 rows new, 0 replaced")
    assert len(list(page.glob("2026-11-01-*.html"))) == 1
    assert versions(job) == before

    # The next night finds a new image and a changed one.
    picture(500).save(tmp_path / "images" / "new.png")
    changed = sorted((tmp_path / "images").glob("*.png"))[-1]
    picture(501).save(changed)
    second = run(job_file, SECOND)
    assert second.message.startswith("2026-11-02: 1 rows new, 1 replaced")
    rows = Catalog.open(job.catalog).images(["uri", "ingest_date", "run_id"]).to_pylist()
    touched = [row for row in rows if row["run_id"] == second.message.rpartition("run ")[2].rstrip(".")]
    assert len(rows) == 10
    assert len(touched) == 2
    assert sum(row["ingest_date"] == SECOND for row in rows) == 1


@pytest.mark.slow
def test_a_broken_checkpoint_stops_the_night_before_any_write(
    prefect: Prefect, job: Job, job_file: Path, golden: Golden, tmp_path: Path
) -> None:
    assert run(job_file, FIRST).is_completed()
    before = versions(job)
    picture(500).save(tmp_path / "images" / "new.png")
    # Another checkpoint in the captioner's place, as a wrong upload would put it there.
    models = dict(yaml.safe_load(job_file.read_text())["models"])
    models["caption"] = {"family": "blip_caption", "path": str(make_captioner(tmp_path / "other", seed=7))}
    broken = tmp_path / "broken.yaml"
    broken.write_text(yaml.safe_dump(yaml.safe_load(job_file.read_text()) | {"models": models}))

    state = run(broken, SECOND, golden=golden)

    assert state.is_failed()
    with pytest.raises(RegressionError, match=r"captions are equal, at least 95.0% must be"):
        state.result()
    assert versions(job) == before
    assert "Quality gate closed" in prefect.artifacts()["gate"]["data"]
    wait_for(lambda: job.catalog.uri in catalogs_of(prefect.events("vlmflow.gate.closed")), seconds=30)


@pytest.mark.slow
def test_an_embedder_that_was_exchanged_is_told_by_its_margins(
    prefect: Prefect, job: Job, job_file: Path, golden: Golden, tmp_path: Path
) -> None:
    data = yaml.safe_load(job_file.read_text())
    data["models"]["embed"] = {"family": "open_clip", "path": str(make_clip(tmp_path / "other", seed=9))}
    data["accept_unbound"] = True
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(data))
    state = run(other, FIRST, golden=golden)
    with pytest.raises(RegressionError, match=r"margins moved by more than 0.02"):
        state.result()
    assert not Catalog.exists(job.catalog)


def test_what_is_missing_is_named_before_anything_runs(prefect: Prefect, job_file: Path, tmp_path: Path) -> None:
    data = yaml.safe_load(job_file.read_text())
    shutil.rmtree(tmp_path / "images")
    state = run(job_file, FIRST)
    with pytest.raises(ConfigError, match=r"source .*images"):
        state.result()
    data["models"]["caption"]["path"] = str(tmp_path / "absent")
    job_file.write_text(yaml.safe_dump(data))
    state = run(job_file, FIRST)
    with pytest.raises(ConfigError, match="absent"):
        state.result()


@pytest.mark.slow
def test_images_that_arrive_during_the_run_are_no_error(
    prefect: Prefect, job: Job, job_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines import nightly

    verify = nightly.verify_catalog
    calls: list[int] = []

    def arrive_first(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        picture(600 + len(calls)).save(tmp_path / "images" / f"late {len(calls)}.png")
        return verify(*arguments, **options)

    monkeypatch.setattr(nightly, "verify_catalog", arrive_first)
    state = run(job_file, FIRST)
    assert state.is_completed(), state.message
    assert len(calls) == 2
    # The one that came before the first look has its row; the one before the second is the next night's.
    assert Catalog.open(job.catalog).images(["uri"]).num_rows == 10
