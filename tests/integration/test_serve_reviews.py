"""Verdicts of the app beside lists of known images, and what they cost and leave behind in the catalog."""

from __future__ import annotations

import datetime as dt
import gc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.web_samples import Served, by_id, flush, serving, shown_ids, small_catalog
from vlmflow.catalog import Catalog, small_files
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.keys import to_binary
from vlmflow.catalog.known_images import KnownList
from vlmflow.catalog.reviews import EVENT
from vlmflow.engine.late_verdicts import bring_in_late_verdicts
from vlmflow.errors import CatalogError


def test_what_a_list_blocks_stays_blocked_when_a_verdict_is_taken_back(served: Served) -> None:
    row = next(row for row in by_id(served).values() if row["decision"] == "allow")
    served.desk.shelf.catalog.known_images.put(KnownList("banned", "block", (row["content_hash"],)))
    served.desk.shelf.catalog.apply_verdicts(lists_changed=True)
    served.desk.shelf.refresh()
    browser = served.browser().review_as("ada")

    def shown(verdict: str) -> tuple[str, bool, int]:
        page = browser.get(f"/image/{row['image_id']}").text
        decision = served.desk.image(row["image_id"])["decision"]
        return decision, 'class="reveal"' in page, len(shown_ids(browser.get(f"/?verdict={verdict}").text))

    assert shown("list") == ("block", True, 1)
    browser.judge(row, "allow")
    assert shown("person") == ("allow", False, 1)
    browser.write("/undo", json={})
    assert shown("list") == ("block", True, 1)
    seen = served.desk.said(row).mark
    browser.judge(row, "allow", seen=seen)
    flush(served)
    assert shown("person") == ("allow", False, 1)
    browser.write("/undo", json={})  # whether a list knows it, the row will tell
    assert shown("nobody")[:2] == ("review", True)
    flush(served)
    assert shown("list") == ("block", True, 1)


def test_a_label_said_of_bytes_that_are_gone_is_not_said_of_those_that_came(served: Served) -> None:
    browser = served.browser().review_as("ada")
    row = next(iter(by_id(served).values()))
    before = {"image_id": row["image_id"], "content_hash": "before", "label": "gun", "value": True, "reviewer": "ada"}
    said = pa.Table.from_pylist([before | {"at": dt.datetime(2026, 3, 1, tzinfo=dt.UTC)}], schema=EVENT)
    Catalog.open(served.config).reviews.add(said)
    assert "Nothing" not in browser.judge(row, None, labels={"knife": False}).json()["message"]
    assert 'data-label="gun" data-said=""' in browser.get(f"/image/{row['image_id']}").text

    assert "Labels noted" in browser.judge(row, None, labels={"gun": True}).json()["message"]

    events = Catalog.open(served.config).reviews.events().to_pylist()
    assert [event["content_hash"] for event in events if event["label"] == "gun"] == ["before", row["content_hash"]]


def test_verdicts_leave_no_record_each_time_they_are_brought_in(served: Served) -> None:
    runs = served.desk.shelf.catalog.runs
    before = runs.states().keys()
    browser = served.browser().review_as("ada")
    for row in list(by_id(served).values())[:3]:
        assert browser.judge(row, "block").status_code == 200
        assert served.desk.judging.flush() == 1
    assert runs.states().keys() == before


def test_the_next_run_brings_in_what_an_app_that_was_killed_had_not(served: Served) -> None:
    """As long as a verdict waits for its row, the app has a lease, which a killed one leaves behind."""
    row = next(row for row in by_id(served).values() if row["decision"] == "allow")
    served.browser().review_as("ada").judge(row, "block")
    assert by_id(served)[row["image_id"]]["decision"] == "allow"
    bring_in_late_verdicts(Catalog.open(served.config), "night", None, [])
    assert by_id(served)[row["image_id"]]["decision"] == "block"


def test_the_next_run_brings_in_what_the_app_could_not_write_before_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_catalog(tmp_path, 3)

    def busy(*_: object, **__: object) -> None:
        raise CatalogError("other writers are always first")

    def serve() -> str:
        with serving(config) as served:
            row = next(row for row in by_id(served).values() if row["decision"] == "allow")
            served.browser().review_as("ada").judge(row, "block")
            monkeypatch.setattr(Catalog, "apply_verdicts", busy)
        raise AssertionError("it was to fail")

    with pytest.raises(CatalogError):
        serve()
    monkeypatch.undo()
    gc.collect()
    catalog = Catalog.open(config)
    assert catalog.images(["verdict"])["verdict"].null_count == 3
    bring_in_late_verdicts(catalog, "night", None, [])
    assert catalog.images(["verdict"])["verdict"].null_count == 2


def test_a_verdict_lists_the_others_once_and_reads_none_again(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    browser, rows = served.browser().review_as("ada"), list(by_id(served).values())
    asked: list[str] = []

    def noting(original: Any) -> Any:
        def noted(self: Folder, path: str, *given: Any) -> Any:
            asked.append(path)
            return original(self, path, *given)

        return noted

    for name in ("list", "read_parquet"):
        monkeypatch.setattr(Folder, name, noting(getattr(Folder, name)))
    for row in rows[:3]:
        asked.clear()
        assert browser.judge(row, "block").status_code == 200
        assert [path for path in asked if path.startswith("reviews")] == ["reviews"]


def test_files_of_verdicts_that_become_one_change_nothing_of_what_was_said(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_files, "_MANY", 4)
    monkeypatch.setattr(small_files, "_SETTLED", dt.timedelta(0))
    browser, rows = served.browser().review_as("ada"), list(by_id(served).values())
    judging = served.desk.judging
    for row in rows[:6]:
        assert browser.judge(row, "block", labels={"gun": True}).status_code == 200
        judging.flush()
    held, said = judging._said, dict(judging._said)
    assert browser.judge(rows[6], "allow").status_code == 200
    assert len(served.desk.shelf.catalog.reviews.files()) < 7
    assert {key: value for key, value in judging._said.items() if key in said} == said
    assert judging._said is held, "all was forgotten, and read anew"
    assert judging.labels_of(rows[0]["image_id"], rows[0]["content_hash"], "ada", ["gun"]) == {"gun": True}
    served.desk.shelf.catalog.erase(to_binary(pa.array([rows[0]["image_id"]])))
    served.desk.shelf.refresh()
    assert browser.judge(rows[7], "allow").status_code == 200
    assert judging.said(rows[0]["image_id"], rows[0]["content_hash"]) is None
