"""Images whose source tells no version: they are read again when they were last read long ago, if a job asks for it."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from tests.catalog_samples import TASKS, enrich, open_catalog, references, request, rows_by_name
from vlmflow import schema
from vlmflow.catalog import Catalog, plan_parts, plan_without_catalog

DAY = dt.timedelta(days=1)
NOW = dt.datetime.now(dt.UTC)
UNKNOWN = references(["a", "b"], version=None)


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    catalog = open_catalog(tmp_path / "catalog")
    enrich(catalog, "r1", [UNKNOWN], version="tag-1")
    return catalog


def planned(catalog: Catalog, batch: pa.RecordBatch, **asked: Any) -> tuple[list[dict[str, Any]], set[str]]:
    """What is planned, and why."""
    with catalog.plan([batch], request(**asked)) as plan:
        assert plan.num_listed == plan.num_due + plan.num_unchanged + plan.num_exhausted
        return [row for rows in plan.batches() for row in rows.to_pylist()], {reason for _, reason in plan.counts}


def test_only_what_was_read_long_ago_and_has_no_version_is_read_again(catalog: Catalog) -> None:
    assert planned(catalog, UNKNOWN) == ([], set())
    assert planned(catalog, UNKNOWN, read_before=NOW - DAY) == ([], set())
    assert planned(catalog, references(["a", "b"], version="tag-1"), read_before=NOW + DAY) == ([], set())
    rows, reasons = planned(catalog, UNKNOWN, read_before=NOW + DAY)
    assert reasons == {"recheck"}
    assert [(row["due"], row["due_if_same"]) for row in rows] == [(list(TASKS), [])] * 2


def test_what_a_clock_that_was_ahead_says_it_has_read_is_read_again(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Earlier(dt.datetime):
        @classmethod
        def now(cls, tz: dt.tzinfo | None = None) -> Earlier:
            return cls.fromtimestamp((NOW - 365 * DAY).timestamp(), tz)

    monkeypatch.setattr(plan_parts, "dt", SimpleNamespace(datetime=Earlier, UTC=dt.UTC))
    assert planned(catalog, UNKNOWN, read_before=NOW - 372 * DAY)[1] == {"recheck"}
    assert planned(catalog, UNKNOWN) == ([], set()), "if nobody asks for it, nothing is"


def test_of_equal_bytes_nothing_but_the_time_of_reading_moves(catalog: Catalog) -> None:
    before = rows_by_name(catalog)
    enrich(catalog, "r2", [UNKNOWN], request(read_before=NOW + DAY), version="tag-1")
    after = rows_by_name(catalog)
    moved = {"run_id", "updated_at", "read_at"}
    for name, row in after.items():
        assert {column for column in row if row[column] != before[name][column]} == moved
        assert row["read_at"] > before[name]["read_at"]
    assert planned(catalog, UNKNOWN, read_before=before["a"]["read_at"] + dt.timedelta(microseconds=1)) == ([], set())


def test_labels_of_another_policy_are_told_of_images_that_are_read_again_too(catalog: Catalog) -> None:
    with catalog.plan([UNKNOWN], request(policy="policy-2", read_before=NOW + DAY)) as plan:
        assert (plan.num_due, plan.num_policy_differs) == (2, 2)


def test_of_other_bytes_everything_is_done_anew(catalog: Catalog) -> None:
    asked = request(read_before=NOW + DAY)
    enrich(catalog, "r2", [UNKNOWN], asked, version="tag-2", content="other", caption="a dog", decision="block")
    rows = rows_by_name(catalog)
    assert {(row["caption"], row["decision"], row["seen_version"]) for row in rows.values()} == {
        ("a dog", "block", "tag-2")
    }


@pytest.mark.parametrize("problem", [("decode", "corrupt"), ("read", "missing")])
def test_what_was_given_up_is_looked_at_again(tmp_path: Path, problem: tuple[str, str]) -> None:
    catalog = open_catalog(tmp_path / "catalog")
    for attempt in range(3):
        enrich(catalog, f"r{attempt}", [UNKNOWN], problem=problem)
    assert planned(catalog, UNKNOWN)[0] == []
    assert planned(catalog, UNKNOWN, read_before=NOW + DAY)[1] == {"recheck"}
    enrich(catalog, "r9", [UNKNOWN], request(read_before=NOW + DAY))
    assert {row["status"] for row in rows_by_name(catalog).values()} == {"ok"}


def test_other_reasons_stay_what_they_are(catalog: Catalog) -> None:
    asked = {"read_before": NOW + DAY, "fingerprints": {task: f"{task}-1" for task in TASKS} | {"caption": "caption-2"}}
    rows, reasons = planned(catalog, UNKNOWN, **asked)
    assert reasons == {"recheck", "fingerprint", "needed"}
    assert {tuple(row["due_if_same"]) for row in rows} == {("caption", "match")}


def without_column(column: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planning finds the files of the table as they were before it had the column."""
    read = plan_parts.read_rows

    def older(*given: Any) -> pa.Table:
        rows = read(*given)
        return rows.select([name for name in rows.column_names if name != column])

    monkeypatch.setattr(plan_parts, "read_rows", older)


def test_a_row_of_before_there_was_a_time_is_read_again_once(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    without_column("read_at", monkeypatch)
    assert len(planned(catalog, UNKNOWN, read_before=NOW - DAY)[0]) == 2


def known_reads(catalog: Catalog, **asked: Any) -> list[dict[str, Any] | None]:
    """What planning says of the bytes that each image had, where a server may be asked whether it has them yet."""
    rows, _ = planned(catalog, UNKNOWN, **{"read_before": NOW + DAY} | asked)
    assert len(rows) == 2
    return [row["previous_read"] for row in rows]


def test_where_nothing_else_is_due_a_server_is_asked_by_what_the_row_knows_of_its_bytes(tmp_path: Path) -> None:
    catalog = open_catalog(tmp_path / "catalog")
    enrich(catalog, "r1", [UNKNOWN], version="tag", validator='"tag"')
    live = rows_by_name(catalog)
    assert known_reads(catalog) == [{field.name: live[name][field.name] for field in schema.READ} for name in "ab"]
    assert live["a"]["http_validator"] == '"tag"'
    others = {"fingerprints": {task: f"{task}-1" for task in TASKS} | {"caption": "caption-2"}}
    assert known_reads(catalog, **others) == [None] * 2, "the bytes are needed"
    assert known_reads(catalog, decoder="other") == [None] * 2, "it may make other facts of them"
    with_extras = known_reads(catalog, decoder="decoder-1+heif+video")
    assert with_extras == known_reads(catalog), "it reads more, and these as before"
    enrich(catalog, "r2", [UNKNOWN], request(read_before=NOW + DAY), version="tag")
    assert known_reads(catalog) == [None] * 2, "of the bytes that were read last"


@pytest.mark.parametrize("result", [{"failed": ["caption"]}, {"problem": ("decode", "corrupt")}])
def test_of_rows_that_are_not_good_the_bytes_are_read(tmp_path: Path, result: dict[str, Any]) -> None:
    catalog = open_catalog(tmp_path / "catalog")
    for attempt in range(3):
        enrich(catalog, f"r{attempt}", [UNKNOWN], version="tag", validator='"tag"', **result)
    assert planned(catalog, UNKNOWN, read_before=NOW + DAY)[1] == {"recheck"}
    assert known_reads(catalog) == [None] * 2


def test_a_validator_of_other_bytes_is_asked_by_no_more(tmp_path: Path) -> None:
    """As an older version leaves it behind, which writes a row anew and does not know the column."""
    catalog = open_catalog(tmp_path / "catalog")
    enrich(catalog, "r1", [UNKNOWN], version="new tag", validator='"tag"')
    assert known_reads(catalog) == [None] * 2
    modified = "Sun, 01 Mar 2026 02:00:00 GMT"
    enrich(catalog, "r2", [UNKNOWN], request(read_before=NOW + DAY), version=modified, validator=modified)
    assert None not in known_reads(catalog)


def test_rows_of_before_there_were_validators_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = open_catalog(tmp_path / "catalog")
    enrich(catalog, "r1", [UNKNOWN], version="tag", validator='"tag"')
    without_column("http_validator", monkeypatch)
    assert known_reads(catalog) == [None] * 2


def test_images_at_urls_that_nobody_watches_are_counted() -> None:
    urls = pc.replace_substring(UNKNOWN["uri"], "mem://", "https://")
    batch = UNKNOWN.set_column(1, UNKNOWN.schema.field("uri"), urls)
    known = batch.set_column(3, batch.schema.field("object_version"), pa.array(["tag", None]))
    for listed, asked, count in (
        (UNKNOWN, request(), 0),
        (batch, request(), 2),
        (known, request(), 1),
        (batch, request(read_before=NOW), 0),
    ):
        with plan_without_catalog([listed], asked) as plan:
            assert plan.num_unwatched == count
