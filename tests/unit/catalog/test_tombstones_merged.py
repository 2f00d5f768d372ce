"""Tombstones of many erasures become one file, and no erasure is ever forgotten meanwhile."""

from __future__ import annotations

import datetime as dt
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pyarrow as pa
import pytest

from tests.catalog_samples import config_of, open_catalog
from vlmflow import schema
from vlmflow.catalog import Catalog, small_files
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.tombstones import Tombstones

MANY = 8


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(small_files, "_MANY", MANY)
    return tmp_path


def keys(*numbers: int) -> pa.Array:
    return pa.array([number.to_bytes(16, "big") for number in numbers], schema.KEY)


def tombstones(root: Path) -> Tombstones:
    """As another process opens them."""
    return Tombstones(Folder(config_of(root)))


def erase(root: Path, *numbers: int) -> None:
    for number in numbers:
        tombstones(root).put(keys(number))


def erased(root: Path) -> list[int]:
    return sorted(int.from_bytes(key, "big") for key in tombstones(root).keys().to_pylist())


def files(root: Path) -> set[str]:
    return {path.name for path in (root / "tombstones").glob("*.parquet")}


def merge(root: Path) -> None:
    tombstones(root).merge(dt.datetime.now(dt.UTC))


def make_old(root: Path) -> None:
    then = time.time() - small_files._SETTLED.total_seconds() - 5
    for path in (root / "tombstones").glob("*.parquet"):
        os.utime(path, (then, then))


def test_many_become_one_that_is_there_before_they_go(root: Path) -> None:
    erase(root, *range(MANY))
    before = files(root)
    merge(root)
    (merged,) = files(root) - before
    assert before < files(root), "whoever is listing the folder may not see the new one"
    merge(root)
    assert files(root) == {*before, merged}, "they were put into another once more"
    make_old(root)
    merge(root)
    assert files(root) == {merged}
    assert erased(root) == [*range(MANY)]


def test_what_was_lifted_and_what_was_erased_again_stay_so(root: Path) -> None:
    erase(root, *range(MANY))
    tombstones(root).lift(keys(1, 2))
    erase(root, 2)
    tombstones(root).put(keys(50), ["mem://x"])
    tombstones(root).put_found(keys(51), keys(52))
    here = tombstones(root)
    expected = erased(root)
    assert expected == [0, *range(2, MANY), 50, 51]
    for _ in range(2):
        merge(root)
        assert erased(root) == expected
        make_old(root)
    assert len(files(root)) == 1
    assert sorted(here.keys().to_pylist()) == sorted(tombstones(root).keys().to_pylist())
    assert len(tombstones(root).erased().addresses) == len(here.erased().addresses) == 1
    tombstones(root).lift(keys(3), ["mem://x"])
    assert erased(root) == [number for number in expected if number != 3]
    assert len(tombstones(root).erased().addresses) == 0


def test_files_of_before_addresses_are_joined_too(root: Path) -> None:
    erase(root, *range(MANY - 1))
    at = pa.array([dt.datetime(2025, 1, 1, tzinfo=dt.UTC)], schema.TIMESTAMP)
    rows = pa.table({"image_id": keys(70), "at": at, "lifted": pa.array([False])})
    Folder(config_of(root)).write_parquet("tombstones/20250101T000000000000-aaaaaaaa.parquet", rows)
    for _ in range(2):
        merge(root)
        make_old(root)
    assert len(files(root)) == 1
    assert erased(root) == [*range(MANY - 1), 70]


def test_a_kill_while_they_are_removed_forgets_nothing(root: Path) -> None:
    erase(root, *range(MANY))
    before = files(root)
    merge(root)
    for name in sorted(before):
        assert erased(root) == [*range(MANY)]
        (root / "tombstones" / name).unlink()
    assert erased(root) == [*range(MANY)]


def test_erasures_and_readers_beside_merges_miss_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_files, "_SETTLED", dt.timedelta(milliseconds=200))
    stop, missed = Event(), []

    def read(reader: Tombstones | None) -> None:
        seen: set[bytes] = set()
        while not stop.is_set():
            now = set((reader or tombstones(root)).keys().to_pylist())
            missed.extend(seen - now)
            seen |= now

    with ThreadPoolExecutor() as pool:
        reading = [pool.submit(read, None), pool.submit(read, tombstones(root))]
        try:
            for number in range(60):
                erase(root, number)
                merge(root)
        finally:
            stop.set()
    for each in reading:
        each.result()  # raises what the reader raised
    assert missed == []
    assert erased(root) == [*range(60)]
    assert len(files(root)) < 60


def test_vacuum_merges_them(root: Path) -> None:
    catalog = open_catalog(root)
    erase(root, *range(MANY))
    catalog.vacuum(dry_run=True)
    assert len(files(root)) == MANY
    catalog.vacuum()
    assert len(files(root)) == MANY + 1
    make_old(root)
    Catalog.open(config_of(root)).vacuum()
    assert len(files(root)) == 1
    assert len(catalog.erased_keys) == MANY
