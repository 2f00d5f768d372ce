"""Following a catalog: each row that changed is told once, with what changed; none is left out, whatever was done."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import polars
import pyarrow as pa
import pytest
from deltalake import DeltaTable

from tests.catalog_samples import (
    config_of,
    enrich,
    fingerprints,
    image_id,
    on_both_stores,
    open_catalog,
    references,
    request,
    write,
)
from tests.erasing import key
from tests.following import Follower
from tests.terminal import run
from vlmflow.catalog import Catalog
from vlmflow.catalog import changes as changes_module
from vlmflow.catalog.changes import ChangeCounts
from vlmflow.catalog.follow import Bookmark
from vlmflow.catalog.history import History
from vlmflow.catalog.reviews import EVENT
from vlmflow.config import CatalogConfig
from vlmflow.errors import CatalogError, ConfigError

NAMES = [f"image {number}" for number in range(6)]
NOW = dt.timedelta()
OTHER_DATE = dt.date(2026, 3, 2)

on_disk = pytest.mark.parametrize("config", ["local"], indirect=True)  # files are reached by their paths


@pytest.fixture
def catalog(config: CatalogConfig) -> Catalog:
    """A catalog with six images, all of one file."""
    made = Catalog.open_or_create(config, pa.schema([]))
    enrich(made, "r1", [references(NAMES)])
    return made


@pytest.fixture
def follower(catalog: Catalog) -> Follower:
    """One that has taken over these."""
    found = Follower()
    assert found.follow(catalog) == ChangeCounts(num_added=len(NAMES))
    return found


def told(catalog: Catalog, since: Any, columns: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """What a reader is told, by the id of the image."""
    rows = pa.concat_tables(catalog.changes(since, columns).tables()).to_pylist()
    return {row["image_id"]: row for row in rows}


@on_both_stores
def test_rows_are_told_with_what_changed_in_them(catalog: Catalog, follower: Follower) -> None:
    enrich(catalog, "r2", [references(["new"])])
    asked = request(fingerprints=fingerprints(caption="caption-2"))
    enrich(catalog, "r3", [references(NAMES[:2])], asked, caption="a dog")
    found = told(catalog, follower.since)
    assert {image: row["change"] for image, row in found.items()} == {
        image_id("new"): "added", image_id(NAMES[0]): "changed", image_id(NAMES[1]): "changed",
    }  # fmt: skip
    changed = found[image_id(NAMES[0])]
    assert changed["caption"] == "a dog"
    assert {"caption", "alt_text", "caption_fingerprint"} <= set(changed["changed_columns"])
    assert not {"run_id", "updated_at", "embed_run_id", "uri"} & set(changed["changed_columns"])
    counts = follower.follow(catalog)
    assert (counts.num_added, counts.num_changed, counts.num_removed, counts.num_unknown) == (1, 2, 0, 0)
    assert counts.columns["caption"] == 2
    assert follower.follow(catalog) == ChangeCounts()


def test_decisions_that_moved_are_counted(catalog: Catalog, follower: Follower) -> None:
    judged = {
        "image_id": image_id(NAMES[0]),
        "content_hash": f"bytes-mem://{NAMES[0]}",
        "decision": "block",
        "reviewer": "ada",
        "at": dt.datetime(2026, 3, 2, tzinfo=dt.UTC),
    }
    catalog.reviews.add(pa.Table.from_pylist([judged], schema=EVENT))
    catalog.apply_verdicts()
    (row,) = told(catalog, follower.since).values()
    assert (row["decision_before"], row["decision"]) == ("allow", "block")
    counts = follower.follow(catalog)
    assert counts.decisions == {("allow", "block"): 1}
    assert counts.columns == {"decision": 1, "decision_reason": 1, "verdict": 1}


def test_files_that_were_only_rewritten_tell_nothing(catalog: Catalog, follower: Follower) -> None:
    enrich(catalog, "r2", [references(["new"])])
    follower.follow(catalog)
    files = catalog.live_files("images").keys()
    catalog.compact("upkeep")
    assert not files & catalog.live_files("images").keys()
    assert follower.follow(catalog) == ChangeCounts()


def test_what_only_moves_with_each_run_is_told_to_whoever_asks_for_it(catalog: Catalog, follower: Follower) -> None:
    asked = request(fingerprints=fingerprints(caption="caption-2"))
    enrich(catalog, "r2", [references(NAMES[:1])], asked)
    assert [row["changed_columns"] for row in told(catalog, follower.since).values()] == [["caption_fingerprint"]]
    (row,) = told(catalog, follower.since, ["run_id", "caption"]).values()
    assert row["changed_columns"] == ["run_id"]
    assert list(row) == ["image_id", "change", "changed_columns", "uri", "caption", "run_id"]
    assert told(catalog, follower.since, ["caption"]) == {}


def test_a_row_that_was_computed_before_and_committed_after_is_told(catalog: Catalog, follower: Follower) -> None:
    """By the time in the row it would be missed."""
    late = write(catalog, "r2", [references(["late"])])
    enrich(catalog, "r3", [references(["early"])])
    follower.follow(catalog)
    catalog.commit("r2", late)
    newest = max(row["updated_at"] for row in follower.rows.values())
    assert follower.follow(catalog).num_added == 1
    assert follower.rows[image_id("late")]["updated_at"] < newest


def test_the_callers_columns_are_told_one_by_one(config: CatalogConfig) -> None:
    price, brand = pa.field("price", pa.float64()), pa.field("brand", pa.list_(pa.string()))
    catalog = Catalog.open_or_create(config, pa.schema([price]))
    rows = [{"price": float("nan")}, {"price": 2.0}]
    enrich(catalog, "r1", [references(["a", "b"], source=rows, source_type=pa.struct([price]))])
    follower = Follower()
    follower.follow(catalog)
    catalog = Catalog.open_or_create(config, pa.schema([price, brand]))
    assert follower.follow(catalog) == ChangeCounts()
    kind = pa.struct([price, brand])
    rows = [{"price": float("nan"), "brand": ["x"]}, {"price": 3.0, "brand": None}]
    enrich(catalog, "r2", [references(["a", "b"], version="v2", source=rows, source_type=kind)], content="other")
    found = told(catalog, follower.since)
    of_source = {
        image: [name for name in row["changed_columns"] if name.startswith("source")] for image, row in found.items()
    }
    assert of_source == {image_id("a"): ["source.brand"], image_id("b"): ["source.price"]}


def test_erased_images_are_told_by_their_id_alone(catalog: Catalog, follower: Follower) -> None:
    catalog.erase(key(NAMES[0]))
    found = told(catalog, follower.since)
    gone = found.pop(image_id(NAMES[0]))
    assert gone.pop("change") == "removed"
    assert set(gone.values()) == {None, image_id(NAMES[0])}
    # The file that held it is gone, so what the others were is not known any more.
    assert {row["change"] for row in found.values()} == {"changed"}
    assert {row["changed_columns"] for row in found.values()} == {None}
    counts = follower.follow(catalog)
    assert (counts.num_changed, counts.num_removed, counts.num_unknown) == (5, 1, 5)


def test_an_image_that_comes_back_on_another_date_is_there(catalog: Catalog, follower: Follower) -> None:
    catalog.erase(key(NAMES[0]))
    catalog.lift(key(NAMES[0]))
    enrich(catalog, "r2", [references(NAMES[:1])], request(date=OTHER_DATE))
    counts = follower.follow(catalog)
    assert (counts.num_added, counts.num_removed) == (0, 0)
    assert follower.rows[image_id(NAMES[0])]["ingest_date"] == OTHER_DATE


@on_disk
def test_an_image_that_moves_to_another_date_while_all_files_are_there_is_changed(
    catalog: Catalog, follower: Follower, tmp_path: Path
) -> None:
    """Another program has deleted its row, say, and the next run found the image new."""
    DeltaTable(str(tmp_path / "catalog" / "images")).delete(f"image_id = '{image_id(NAMES[0])}'")
    assert [row["change"] for row in told(catalog, follower.since).values()] == ["removed"]
    enrich(catalog, "r2", [references(NAMES[:1])], request(date=OTHER_DATE))
    (row,) = told(catalog, follower.since).values()
    assert (row["change"], row["changed_columns"], row["ingest_date"]) == ("changed", None, OTHER_DATE)


def test_after_a_vacuum_what_was_written_since_is_told_as_changed(catalog: Catalog, follower: Follower) -> None:
    asked = request(fingerprints=fingerprints(caption="caption-2"))
    enrich(catalog, "r2", [references([*NAMES[:1], "new"])], asked, caption="a dog")
    catalog.vacuum(retention=NOW)
    counts = follower.follow(catalog)
    assert (counts.num_added, counts.num_changed, counts.num_removed) == (0, 7, 0)
    assert counts.num_unknown == 7


def test_an_erasure_of_before_is_not_told_again_after_a_vacuum(catalog: Catalog, follower: Follower) -> None:
    catalog.erase(key(NAMES[0]))
    catalog.lift(key(NAMES[0]))
    enrich(catalog, "r2", [references(NAMES[:1])], request(date=OTHER_DATE))
    follower.follow(catalog)
    enrich(catalog, "r3", [references(NAMES[1:2], version="v2")], content="other")
    catalog.vacuum(retention=NOW)
    assert follower.follow(catalog).num_removed == 0


def test_a_file_that_goes_while_it_is_read_makes_its_rows_changed(
    catalog: Catalog, follower: Follower, tmp_path: Path
) -> None:
    asked = request(fingerprints=fingerprints(caption="caption-2"))
    enrich(catalog, "r2", [references(NAMES[:1])], asked, caption="a dog")
    feed = catalog.changes(follower.since)
    tables = feed.tables()
    next(tables)
    compare = changes_module._Before.rows

    def later(before: changes_module._Before, at: Any) -> Any:
        catalog.vacuum(retention=NOW)
        return compare(before, at)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(changes_module._Before, "rows", later)
        rows = pa.concat_tables(tables).to_pylist()
    assert {(row["change"], row["changed_columns"]) for row in rows} == {("changed", None)}
    assert len(rows) == feed.counts.num_unknown == len(NAMES)


def test_more_of_the_earlier_version_than_fits_is_read_again(
    catalog: Catalog, follower: Follower, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        enrich(catalog, f"r{number + 2}", [references([f"another {number}"])])
    follower.follow(catalog)
    catalog.compact("upkeep")
    monkeypatch.setattr(changes_module, "_CACHED_BYTES", 0)
    monkeypatch.setattr(changes_module, "_PIECE_BYTES", 1)  # and a row at a time
    assert follower.follow(catalog) == ChangeCounts()
    enrich(catalog, "r5", [references(NAMES[:2], version="v2")], content="other", caption="a dog")
    assert follower.follow(catalog).num_changed == 2


@on_disk
def test_a_time_stands_for_the_version_before_the_first_that_came_after_it(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    enrich(catalog, "r2", [references(["new"])])
    enrich(catalog, "r3", [references(["newer"])])
    times = {version: dt.datetime(2026, 3, version + 1, tzinfo=dt.UTC) for version in range(4)}
    read = History._of

    def at(history: History, number: int) -> Any:
        notes = read(history, number)
        return type(notes)(notes.commit_id, notes.run_id, notes.revoked, times[number])

    monkeypatch.setattr(History, "_of", at)

    def since(day: int, hour: int = 0) -> int:
        return open_catalog(catalog.uri).changes(dt.datetime(2026, 3, day, hour, tzinfo=dt.UTC)).since

    assert [since(1), since(2), since(2, 12), since(3, 23), since(4), since(9)] == [0, 1, 1, 2, 3, 3]
    assert open_catalog(catalog.uri).changes(dt.datetime(2025, 1, 1, tzinfo=dt.UTC)).since == 0
    assert open_catalog(catalog.uri).changes(dt.datetime.min.replace(tzinfo=dt.UTC)).since == 0
    assert open_catalog(catalog.uri).changes(dt.datetime(2026, 3, 2)).since == 1
    times[3] = dt.datetime(2026, 3, 2, 12, tzinfo=dt.UTC)  # of a machine whose clock is late
    assert [since(2), since(2, 12), since(3)] == [1, 1, 2]
    times[3], times[2] = times[2], dt.datetime(2026, 3, 5, tzinfo=dt.UTC)  # and early
    assert since(4) == 1


@on_disk
def test_a_log_that_does_not_go_back_so_far_is_told(catalog: Catalog, tmp_path: Path) -> None:
    enrich(catalog, "r2", [references(["new"])])
    DeltaTable(str(tmp_path / "catalog" / "images")).create_checkpoint()
    for number in range(2):
        (tmp_path / "catalog" / "images" / "_delta_log" / f"{number:020d}.json").unlink()
    again = open_catalog(catalog.uri)
    for since in (1, dt.datetime(2026, 1, 1, tzinfo=dt.UTC)):
        with pytest.raises(CatalogError, match="does not go back to version 1 any more") as refused:
            again.changes(since)
        assert "version 0" in refused.value.remedy
    assert len(told(again, 0)) == len(NAMES) + 1
    assert told(again, 2) == {}


def test_versions_and_columns_that_are_not_there_are_refused(catalog: Catalog) -> None:
    for since in (-1, 2):
        with pytest.raises(ConfigError, match=f"has no version {since}: the newest is 1"):
            catalog.changes(since)
    with pytest.raises(ConfigError, match="no column 'captoin'") as refused:
        catalog.changes(0, ["captoin", "decision"])
    assert "caption" in refused.value.remedy
    with pytest.raises(ConfigError, match=r"no column 'source\.price'") as refused:
        catalog.changes(0, ["source.price"])
    assert refused.value.remedy == "Name `source`: all of the caller's columns are in it."


def test_vectors_that_are_asked_for_before_the_rows_are_not_silently_none(catalog: Catalog) -> None:
    feed = catalog.changes(0)
    rows = feed.tables()
    for _ in range(2):
        next(rows)
        with pytest.raises(ValueError, match="to its end"):
            list(feed.vectors())
    assert list(rows) == []
    assert sum(table.num_rows for table in feed.vectors()) == 2 * len(NAMES)


@on_disk
def test_the_command_writes_what_changed_and_moves_its_bookmark(
    catalog: Catalog, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark, uri = tmp_path / "shop.bookmark", catalog.uri
    assert run("changes", uri, tmp_path / "first", "--bookmark", mark) == 0
    assert "added    6" in capsys.readouterr().out
    enrich(catalog, "r2", [references(["new"])])
    enrich(catalog, "r3", [references(NAMES[:1], version="v2")], content="other", decision="block")
    assert run("changes", uri, tmp_path / "second", "--bookmark", mark) == 0
    shown = capsys.readouterr().out
    assert "version 1 (" in shown
    assert "decisions: allow -> block 1" in shown
    assert f"{mark} stands at version 3" in shown.replace("\n", "")
    rows = polars.read_parquet(tmp_path / "second" / "images" / "*.parquet")
    assert sorted(rows["change"]) == ["added", "changed"]
    vectors = polars.read_parquet(tmp_path / "second" / "embeddings" / "*.parquet")
    assert set(vectors["image_id"]) == set(rows["image_id"])
    assert run("changes", uri, "--bookmark", mark, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["since"], answer["version"], answer["num_changed"]) == (3, 3, 0)
    assert run("changes", uri, tmp_path / "third", "--since", "1", "--columns", "decision") == 0
    assert "next time: --since 3" in capsys.readouterr().out
    assert polars.read_parquet(tmp_path / "third" / "images" / "*.parquet").columns == [
        "image_id", "change", "changed_columns", "decision_before", "uri", "decision"
    ]  # fmt: skip
    assert not (tmp_path / "third" / "embeddings").exists()


@on_disk
def test_who_only_looks_moves_no_bookmark(catalog: Catalog, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """He has taken nothing over: the rows that he was told the number of would never be told again."""
    mark = tmp_path / "shop.bookmark"
    assert run("changes", catalog.uri, "--bookmark", mark) == 0
    assert "was left at version 0: with DIR rows are written" in " ".join(capsys.readouterr().out.split())
    assert not mark.exists()
    assert run("changes", catalog.uri, tmp_path / "first", "--bookmark", mark) == 0
    enrich(catalog, "r2", [references(["new"])])
    before = mark.read_text()
    assert run("changes", catalog.uri, "--bookmark", mark) == 0
    assert mark.read_text() == before
    assert run("changes", catalog.uri, tmp_path / "second", "--bookmark", mark) == 0
    assert polars.read_parquet(tmp_path / "second" / "images" / "*.parquet")["change"].to_list() == ["added"]
    assert Bookmark.read(mark) == catalog.changes(2).bookmark


@on_disk
def test_a_bookmark_of_another_catalog_is_refused(
    catalog: Catalog, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = open_catalog(tmp_path / "other")
    mark = tmp_path / "bookmark"
    mark.write_text(Bookmark(other.changes(0).bookmark.table_id, 0).as_json())
    before = mark.read_text()
    assert run("changes", catalog.uri, "--bookmark", mark) == 2
    assert f"the bookmark is not of the catalog that is at {catalog.uri} now" in capsys.readouterr().err
    assert mark.read_text() == before
    with pytest.raises(CatalogError, match="not of the catalog"):
        Catalog.open(config_of(tmp_path / "catalog")).changes(other.changes(0).bookmark)


@on_disk
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "neither --since nor --bookmark"),
        (["--since", "1", "--bookmark", "{tmp}/mark"], "both given"),
        (["--since", "yesterday"], "'yesterday' is neither a version nor a time"),
        (["--since", "2999-01-01"], "still to come"),
        (["--since", "1", "--embeddings", "with"], "no DIR"),
        (["--since", "1", "--columns", " ,"], "--columns names none"),
        (["--bookmark", "{tmp}"], "is a folder"),
        (["--bookmark", "{tmp}/none/mark"], "no folder"),
        (["--bookmark", "{tmp}/text"], "it is no bookmark"),
        (["--bookmark", "{tmp}/nested"], "it is no bookmark"),
        (["{tmp}/rows.csv", "--since", "0"], "is the name of a file"),
        (["{tmp}/full", "--since", "0"], "is not empty"),
    ],
)
def test_what_cannot_be_followed_is_refused_in_words(
    catalog: Catalog, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], message: str
) -> None:
    (tmp_path / "text").write_text("[1]")
    (tmp_path / "nested").write_text("[" * 200_000)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert run("changes", catalog.uri, *(one.replace("{tmp}", str(tmp_path)) for one in given)) == 2
    assert message in " ".join(capsys.readouterr().err.split())
