"""Many small files of verdicts become one, and nobody ever misses a verdict meanwhile."""

from __future__ import annotations

import datetime as dt
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pyarrow as pa
import pytest

from tests.catalog_samples import config_of, image_id, open_catalog
from vlmflow.catalog import Catalog, small_files
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.keys import to_binary
from vlmflow.catalog.reviews import EVENT, ReviewStore
from vlmflow.catalog.tombstones import Tombstones

AT = dt.datetime(2026, 11, 20, tzinfo=dt.UTC)
MANY = 8


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(small_files, "_MANY", MANY)
    open_catalog(tmp_path / "catalog")
    return tmp_path / "catalog"


def store(root: Path) -> ReviewStore:
    """As another process opens it."""
    return ReviewStore(Folder(config_of(root)))


def say(root: Path, *names: str) -> None:
    for name in names:
        at = AT + dt.timedelta(seconds=len(files(root)))
        event = {"image_id": image_id(name), "content_hash": "x", "decision": "block", "reviewer": "ada", "at": at}
        store(root).add(pa.Table.from_pylist([event], schema=EVENT))


def said(root: Path) -> list[str]:
    return sorted(store(root).events()["image_id"].to_pylist())


def files(root: Path) -> set[str]:
    return {path.name for path in (root / "reviews").glob("*.parquet")}


def merge(root: Path) -> None:
    folder = Folder(config_of(root))
    ReviewStore(folder).merge(Tombstones(folder), dt.datetime.now(dt.UTC))


def make_old(root: Path) -> None:
    then = time.time() - small_files._SETTLED.total_seconds() - 5
    for path in (root / "reviews").glob("*.parquet"):
        os.utime(path, (then, then))


def test_few_files_stay_as_they_are(root: Path) -> None:
    say(root, *"abcdefg")
    before = files(root)
    merge(root)
    make_old(root)
    merge(root)
    assert files(root) == before


def test_many_become_one_that_is_there_before_they_go(root: Path) -> None:
    say(root, *"abcdefgh")
    before, everything = files(root), said(root)
    merge(root)
    (merged,) = files(root) - before
    assert before < files(root), "whoever is listing the folder may not see the new one"
    assert said(root) == everything
    merge(root)
    assert files(root) == {*before, merged}, "they were put into another once more"
    make_old(root)
    merge(root)
    assert files(root) == {merged}
    assert said(root) == everything


def test_what_was_merged_is_merged_again_with_what_came_later(root: Path) -> None:
    for start in range(0, 3 * MANY, MANY - 1):
        say(root, *(f"n{number}" for number in range(start, start + MANY - 1)))
        merge(root)
        make_old(root)
        merge(root)
    assert len(files(root)) < MANY
    assert len(said(root)) == 4 * (MANY - 1)


def test_large_files_are_left_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_files, "_SMALL_ROWS", 1)
    say(root, *"abcdefgh")
    merge(root)
    assert len(files(root)) == MANY


def test_a_kill_between_writing_and_removing_doubles_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    say(root, *"abcdefgh")
    everything, before = said(root), files(root)

    def killed(*_: object) -> list[str]:
        raise KeyboardInterrupt

    merge(root)
    make_old(root)
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "delete_all", killed)
        with pytest.raises(KeyboardInterrupt):
            merge(root)
    assert said(root) == everything
    (root / "reviews" / sorted(before)[0]).unlink()  # or after the first
    assert said(root) == everything
    merge(root)
    assert len(files(root)) == 1
    assert said(root) == everything


def merge_before_the_first_is_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the files go that were merged, when the folder has been listed."""
    merge(root)
    make_old(root)
    original = Folder.read_parquet

    def beside_a_merge(self: Folder, path: str, columns: object = None) -> pa.Table:
        if path.startswith("reviews/"):
            monkeypatch.setattr(Folder, "read_parquet", original)
            merge(root)
        return original(self, path, columns)  # type: ignore[arg-type]

    monkeypatch.setattr(Folder, "read_parquet", beside_a_merge)


def test_readers_that_have_listed_what_goes_read_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    say(root, *"abcdefgh")
    everything = said(root)
    merge_before_the_first_is_read(root, monkeypatch)
    assert said(root) == everything
    assert len(files(root)) == 1


def test_an_erasure_that_has_listed_what_goes_finds_it_where_it_is_now(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(root, *"abcdefgh")
    merge_before_the_first_is_read(root, monkeypatch)
    result = Catalog.open(config_of(root)).erase(to_binary(pa.array([image_id("c")])))
    assert (result.is_complete, result.num_reviews) == (True, 1)
    assert image_id("c") not in said(root)
    assert len(said(root)) == MANY - 1


def test_readers_beside_writers_and_merges_miss_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_files, "_SETTLED", dt.timedelta(milliseconds=200))
    stop, missed = Event(), []

    def read() -> None:
        seen: set[str] = set()
        while not stop.is_set():
            now = set(said(root))
            missed.extend(seen - now)
            seen |= now

    with ThreadPoolExecutor() as pool:
        reading = pool.submit(read)
        try:
            for number in range(60):
                say(root, f"n{number}")
                merge(root)
        finally:
            stop.set()
    reading.result()  # raises what the reader raised
    assert missed == []
    assert len(said(root)) == 60
    assert len(files(root)) < 60


def test_an_erasure_empties_both_and_what_it_takes_away_does_not_come_back(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(root, *"abcdefgh")
    merge(root)
    keys = to_binary(pa.array([image_id("c")]))
    assert Catalog.open(config_of(root)).erase(keys).num_reviews == 1, "it stands in two files, and is one verdict"
    assert image_id("c") not in said(root)
    assert len(said(root)) == MANY - 1
    for _ in range(2):  # what the erasure has written anew says nothing of the files it was made of
        make_old(root)
        merge(root)
    assert len(files(root)) == 1
    assert len(said(root)) == MANY - 1

    # Beside a merge that has read the files already.
    say(root, *"ijklmnop")
    original = Folder.write_parquet

    def erased_first(self: Folder, path: str, rows: pa.Table, **options: object) -> int:
        if path.startswith("reviews/") and rows.num_rows > 1 and not erased:
            erased.append(path)
            Catalog.open(config_of(root)).erase(to_binary(pa.array([image_id("k")])))
        return original(self, path, rows, **options)

    erased: list[str] = []
    monkeypatch.setattr(Folder, "write_parquet", erased_first)
    merge(root)
    assert erased
    monkeypatch.undo()
    assert image_id("k") not in said(root)
    assert len(said(root)) == 2 * MANY - 2


@pytest.mark.parametrize("beside", [False, True])
def test_what_is_said_again_after_an_erasure_was_lifted_stays(root: Path, beside: bool) -> None:
    say(root, *"abcdefgh")
    event = store(root).events().slice(2, 1)
    catalog, keys = Catalog.open(config_of(root)), to_binary(event["image_id"])
    if beside:  # it decides when the merge is under way, and looks through the files afterwards
        Tombstones(Folder(config_of(root))).put(keys)
    merge(root)
    make_old(root)
    merge(root)
    catalog.erase(keys)
    assert event["image_id"][0].as_py() not in said(root)
    catalog.lift(keys)
    again = store(root).add(event)
    make_old(root)
    merge(root)
    assert (root / again).exists()
    assert len(said(root)) == MANY


def test_vacuum_and_what_brings_verdicts_in_merge_them(root: Path) -> None:
    say(root, *"abcdefgh")
    Catalog.open(config_of(root)).apply_verdicts()
    assert len(files(root)) == MANY + 1
    make_old(root)
    Catalog.open(config_of(root)).vacuum()
    assert len(files(root)) == 1
