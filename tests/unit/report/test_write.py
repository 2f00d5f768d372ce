"""The page is written even where parts of it cannot be had."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.catalog_samples import config_of
from tests.report_samples import put_pictures, put_rows
from vlmflow.report.write import write_report
from vlmflow.search import duplicates


def test_without_an_index_large_catalogs_are_compared_by_their_bytes_and_the_page_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path / "catalog")
    put_rows(config, ["a", "b", "c"], content_hash=["same", "same", "other"])
    monkeypatch.setattr(duplicates, "ALL_PAIRS", 1)
    page = tmp_path / "report.html"
    write_report(config, page)
    text = page.read_text(encoding="utf-8")
    assert "Images alike by embedding were not looked for" in text
    assert "--build-index" in text
    assert "or narrow the images with --where of `vlmflow duplicates`." in text, "this command has no such option"
    assert "1 of 3 images repeat another one, in 1 groups." in text, "no cosine counted"


def test_an_image_that_has_changed_or_is_gone_has_no_picture_but_a_reason(tmp_path: Path) -> None:
    config = config_of(tmp_path / "catalog")
    uris, hashes = put_pictures(tmp_path / "images", 2)
    gone = str(tmp_path / "images" / "gone.jpg")
    put_rows(config, ["a", "b", "c"], uri=[*uris, gone], content_hash=[hashes[0], "another", "another"])
    page = tmp_path / "report.html"
    assert write_report(config, page).num_pictures == 1
    text = page.read_text(encoding="utf-8")
    assert "the image has changed since it was enriched" in text
    assert "listed, but gone when read" in text


def test_a_file_is_replaced_in_one_step_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    config = config_of(tmp_path / "catalog")
    put_rows(config, ["a"])
    page = tmp_path / "report.html"
    page.write_text("old", encoding="utf-8")
    written = write_report(config, page)
    assert written.size_bytes == page.stat().st_size > 10_000
    assert sorted(file.name for file in tmp_path.iterdir()) == ["catalog", "report.html"]
