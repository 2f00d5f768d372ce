"""Where reports of nights go, and which night has none yet."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest

from pipelines.reports import default_folder, publish_report, unreported
from tests.report_samples import put_record, put_rows
from vlmflow.catalog import Catalog
from vlmflow.config import CatalogConfig

NIGHT = dt.date(2026, 3, 1)


@pytest.fixture
def config(tmp_path: Path) -> CatalogConfig:
    config = CatalogConfig(uri=str(tmp_path / "catalog"))
    put_rows(config, ["a", "b"], run="20260301T020000-00000001")
    put_record(config, "20260301T020000-00000001")
    return config


def test_reports_lie_beside_the_catalog(config: CatalogConfig) -> None:
    folder = default_folder(CatalogConfig(uri="s3://bucket/catalog/"))
    assert folder == "s3://bucket/catalog-reports"
    place, written = publish_report(config, "20260301T020000-00000001", NIGHT, default_folder(config), 30)
    assert place == f"{config.uri}-reports/2026-03-01-20260301T020000-00000001.html"
    assert Path(place).read_text(encoding="utf-8").startswith("<!doctype html>")
    assert written.num_images == 2


def test_only_the_newest_of_ours_are_kept(config: CatalogConfig) -> None:
    folder = Path(default_folder(config))
    folder.mkdir()
    others = ["index.html", "2026-03-01.html", "2026-03-01-notes.html", "2026-03-01-20260301T020000-00000001.pdf"]
    old = [f"2026-02-0{day}-2026020{day}T020000-0000000{day}.html" for day in range(1, 6)]
    for name in [*others, *old]:
        (folder / name).write_text("")
    publish_report(config, "20260301T020000-00000001", NIGHT, str(folder), 1)
    left = {path.name for path in folder.iterdir()}
    assert left == {*others, "2026-03-01-20260301T020000-00000001.html"}


def test_runs_without_a_report_are_found_once(config: CatalogConfig) -> None:
    folder = default_folder(config)
    (found,) = unreported(config, NIGHT, folder)
    assert (found.run_id, found.num_added) == ("20260301T020000-00000001", 3)
    assert unreported(config, dt.date(2026, 3, 2), folder) == []
    publish_report(config, found.run_id, NIGHT, folder, 30)
    assert unreported(config, NIGHT, folder) == []


def test_a_run_over_late_images_does_not_hide_the_one_before(config: CatalogConfig) -> None:
    ids = ["20260301T020000-00000001", "20260301T030000-00000002", "20260301T040000-00000003"]
    for late in ids[1:]:
        put_record(config, late)
    folder = default_folder(config)
    assert [run.run_id for run in unreported(config, NIGHT, folder)] == ids
    publish_report(config, ids[1], NIGHT, folder, 30)
    assert [run.run_id for run in unreported(config, NIGHT, folder)] == ids[2:]


def test_a_run_that_changed_nothing_or_is_of_another_kind_needs_no_report(config: CatalogConfig) -> None:
    folder = default_folder(config)
    publish_report(config, "20260301T020000-00000001", NIGHT, folder, 30)
    put_record(config, "20260301T030000-00000002", num_added=0, num_replaced=0)
    with Catalog.open(config).runs.recorded("vacuum"):
        pass
    assert unreported(config, NIGHT, folder) == []


def test_a_record_of_another_version_is_passed_over(config: CatalogConfig) -> None:
    put_record(config, "20260301T030000-00000002", tasks="embed", added_by_a_later_version=1)
    assert [run.run_id for run in unreported(config, NIGHT, default_folder(config))] == ["20260301T020000-00000001"]
