"""The preflight: what it measures is printed, decides batch sizes where the job does not, and writes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from tests.pictures import write_broken, write_pictures
from vlmflow.catalog import Catalog
from vlmflow.config import Job, PoolConfig
from vlmflow.engine import enrich, preflight
from vlmflow.errors import ConfigError, SourceError
from vlmflow.views_preflight import as_yaml, print_preflight

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.mark.slow
def test_pools_are_tried_in_their_order_and_nothing_is_written(
    make_job: Callable[..., Job], real: dict[str, Any], tmp_path: Path
) -> None:
    write_pictures(tmp_path / "images", 12)
    write_broken(tmp_path / "images")
    pools = (
        {"tasks": ("embed", "moderate"), "cpus": 0.5},
        {"tasks": ("caption", "match"), "cpus": 0.5, "batch_size": 6, "max_actors": 2},
    )
    report = preflight(make_job(tmp_path / "images", pools=pools, **real))

    assert not (tmp_path / "catalog").exists()
    assert (report.num_due, report.num_sampled) == (16, 16)
    first, second = report.pools
    sizes = [trial.batch_size for trial in first.trials]
    assert sizes[:2] == [4, 8]
    assert first.pool.batch_size in sizes
    assert set(first.trials[0].tasks) == {"embed", "moderate"}
    assert [trial.batch_size for trial in second.trials] == [6], "the job says it"
    assert (second.pool.batch_size, second.pool.max_actors) == (6, 2)
    assert set(second.trials[0].tasks) == {"caption", "match"}
    assert all(trial.fits and trial.images_per_s > 0 for plan in report.pools for trial in plan.trials)
    assert 0 < first.memory_bytes < first.memory_total
    assert report.hours == pytest.approx(16 / report.images_per_s / 3600, abs=0.001)

    said = yaml.safe_load(as_yaml(report.chosen))["pools"]
    assert tuple(PoolConfig(**pool) for pool in said) == report.chosen
    console = Console(record=True, width=200)
    print_preflight(report, console)
    assert report.limited_by in console.export_text()
    assert json.loads(report.model_dump_json())["pools"][1]["pool"]["batch_size"] == 6


def test_a_job_may_ask_for_it_before_it_runs(make_job: Callable[..., Job], tmp_path: Path) -> None:
    write_pictures(tmp_path / "images", 5)
    job = make_job(tmp_path / "images", tasks=("embed",), pools=[{"tasks": ("embed",), "cpus": 0.5}], preflight=True)
    report = enrich(job)
    assert report.num_added == 5
    assert Catalog.open(job.catalog).images(["status"])["status"].to_pylist() == ["ok"] * 5
    with pytest.raises(ConfigError, match="nothing is due"):
        preflight(job)


def test_a_source_without_a_good_image_is_told(make_job: Callable[..., Job], tmp_path: Path) -> None:
    write_broken(tmp_path / "images")
    with pytest.raises(SourceError, match="none of the first 4 images"):
        preflight(make_job(tmp_path / "images", tasks=("embed",)))
