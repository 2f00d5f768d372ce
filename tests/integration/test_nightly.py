"""The nightly flow against a real Prefect server and a real Ray: what it does, says and refuses."""

from __future__ import annotations

import datetime as dt
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

from pipelines.nightly import nightly_enrichment
from pipelines.steps import Golden
from tests.models import make_captioner, make_clip
from tests.pictures import picture, write_pictures
from tests.processes import prefect_server, wait_for
from vlmflow.catalog import Catalog
from vlmflow.config import Job, SourceConfig
from vlmflow.errors import ConfigError, RegressionError
from vlmflow.gate import golden_values, write_accepted

pytestmark = pytest.mark.usefixtures("ray_session")

FIRST, SECOND = dt.date(2026, 11, 1), dt.date(2026, 11, 2)


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("prefect")
    with prefect_server(folder) as url, temporary_settings({PREFECT_API_URL: url, PREFECT_HOME: folder}):
        yield url


@pytest.fixture
def job(make_job: Callable[..., Job], tmp_path: Path) -> Job:
    write_pictures(tmp_path / "images", 9)
    return make_job(tmp_path / "images")


@pytest.fixture
def job_file(job: Job, tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job.model_dump(mode="json", exclude_defaults=True)), encoding="utf-8")
    return path


@pytest.fixture
def golden(job: Job, tmp_path: Path) -> Golden:
    write_pictures(tmp_path / "golden", 4, first_seed=100)
    accepted = tmp_path / "accepted.json"
    write_accepted(accepted, golden_values(job, SourceConfig(uri=str(tmp_path / "golden"))))
    return Golden(uri=str(tmp_path / "golden"), accepted=accepted)


def run(job_file: Path, date: dt.date, **options: Any) -> Any:
    return nightly_enrichment(job_file, date=date, return_state=True, **options)


def artifacts(api: str) -> dict[str, dict[str, Any]]:
    """The newest artifact of each key, the catalog's part of the key left out."""
    found = httpx.post(f"{api}/artifacts/latest/filter", json={}).json()
    return {
        re.sub(r"-catalog-[0-9a-f]{6}", "", item["key"]): item for item in sorted(found, key=lambda i: i["updated"])
    }


def events(api: str, name: str) -> list[dict[str, Any]]:
    asked = {"filter": {"event": {"name": [name]}, "occurred": {"since": "2020-01-01T00:00:00Z"}}}
    return list(httpx.post(f"{api}/events/filter", json=asked).json()["events"])


def catalogs_of(found: list[dict[str, Any]]) -> set[str]:
    return {event["resource"]["prefect.resource.name"] for event in found}


def versions(job: Job) -> tuple[int, int]:
    catalog = Catalog.open(job.catalog)
    return catalog._images.refreshed_table().version(), catalog._embeddings.refreshed_table().version()


def test_nights_follow_one_another(api: str, job: Job, job_file: Path, golden: Golden, tmp_path: Path) -> None:
    first = run(job_file, FIRST, golden=golden)
    assert first.is_completed()
    assert first.message.startswith("2026-11-01: 9 rows new, 0 replaced")
    shown = artifacts(api)
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


def test_a_broken_checkpoint_stops_the_night_before_any_write(
    api: str, job: Job, job_file: Path, golden: Golden, tmp_path: Path
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
    assert "Quality gate closed" in artifacts(api)["gate"]["data"]
    wait_for(lambda: job.catalog.uri in catalogs_of(events(api, "vlmflow.gate.closed")), seconds=30)


def test_an_embedder_that_was_exchanged_is_told_by_its_margins(
    api: str, job: Job, job_file: Path, golden: Golden, tmp_path: Path
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


def test_what_is_missing_is_named_before_anything_runs(api: str, job_file: Path, tmp_path: Path) -> None:
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


def test_images_that_arrive_during_the_run_are_no_error(
    api: str, job: Job, job_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
