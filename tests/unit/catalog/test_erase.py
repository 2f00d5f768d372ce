"""Erasing many images from many small files: what it costs, and that it finds them all."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest

from tests.catalog_samples import config_of, enrich, image_id, open_catalog, references
from vlmflow import schema
from vlmflow.catalog import Catalog
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.keys import to_binary
from vlmflow.catalog.redact import blotter
from vlmflow.catalog.reviews import REVIEWS
from vlmflow.catalog.runs import RUNS
from vlmflow.catalog.tombstones import Tombstones


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    catalog = open_catalog(tmp_path)
    enrich(catalog, "r0", [references(["a", "secret"])])
    return catalog


def at_once(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many files are being read whenever the reading of another begins.

    The store answers late, from now on until five are.
    """
    begun, counts, now = threading.Condition(), list[int](), [0]

    def late(name: str) -> None:
        original = getattr(Folder, name)

        def read(self: Folder, path: str, *given: Sequence[str]) -> object:
            with begun:
                now[0] += 1
                counts.append(now[0])
                begun.notify_all()
                begun.wait_for(lambda: max(counts) > 4, timeout=0.3)
            try:
                return original(self, path, *given)
            finally:
                with begun:
                    now[0] -= 1

        monkeypatch.setattr(Folder, name, read)

    late("read")
    late("read_parquet")
    return counts


def test_many_tombstones_are_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(config_of(tmp_path))
    writer = Tombstones(folder)
    for number in range(20):
        writer.put(pa.array([bytes([number]) * 16], schema.KEY))
    counts = at_once(monkeypatch)
    assert len(Tombstones(folder).keys()) == 20
    assert max(counts) > 4


def test_many_verdicts_and_records_are_looked_through_at_once(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(20):
        name = "secret" if number == 7 else "a"
        rows = pa.table({"image_id": [image_id(name), image_id("other")]})
        catalog._folder.write_parquet(f"{REVIEWS}/{number}.parquet", rows)
        catalog.runs.finish(f"run{number}", {"message": f"such as mem://{name}"})
    counts = at_once(monkeypatch)
    result = catalog.erase(to_binary(pa.array([image_id("secret")])))
    assert (result.num_reviews, result.num_records, result.is_complete) == (1, 1, True)
    assert max(counts) > 4
    records = [catalog.runs.get(f"run{number}") or {} for number in range(20)]
    assert [record["message"] for record in records].count("such as <erased>") == 1


@pytest.mark.parametrize(
    "strange",
    [b'{"image_id": "abc", "uri": "mem://x", "message": "mem://secret"}', b'"mem://secret \xff', b"[" * 100_000, b""],
)
def test_a_record_that_is_damaged_or_of_others_keeps_nothing_from_being_erased(
    catalog: Catalog, strange: bytes
) -> None:
    catalog._folder.write(f"{RUNS}/strange.json", strange)
    assert catalog.erase(to_binary(pa.array([image_id("secret")]))).is_complete
    assert catalog._folder.read(f"{RUNS}/strange.json") == strange.replace(b"mem://secret", b"<erased>")


def test_files_that_no_version_refers_to_are_read_at_once(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pa.table({"image_id": [image_id("a")], "uri": ["mem://a"]})
    secret = pa.table({"image_id": [image_id("secret")], "uri": ["mem://secret"]})
    for number in range(20):
        name = f"ingest_date=2026-03-01/r1-{number:032x}.parquet"
        catalog._folder.write_parquet(f"images/{name}", secret if number == 7 else rows)
        catalog._folder.write_parquet(f"embeddings/{name}", rows)
    catalog._folder.write(f"images/ingest_date=2026-03-01/r1-{20:032x}.parquet", b"damaged")
    catalog.runs.finish("r1", {})
    counts = at_once(monkeypatch)
    result = catalog.erase(to_binary(pa.array([image_id("secret")])))
    assert max(counts) > 4
    assert result.is_complete
    left = sorted(file.path[-10:-8] for file in catalog._folder.list("images") if "/r1-" in file.path)
    assert left == [f"{number:02x}" for number in range(20) if number != 7]


def test_verdicts_that_are_moved_to_another_file_meanwhile_are_found(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rows = catalog._folder, pa.table({"image_id": [image_id("secret"), image_id("a")]})
    folder.write_parquet(f"{REVIEWS}/small.parquet", rows)
    read = Folder.read_parquet

    def moved(self: Folder, path: str, *given: Sequence[str]) -> pa.Table:
        if path == f"{REVIEWS}/small.parquet":
            self.write_parquet(f"{REVIEWS}/joined.parquet", rows)
            self.delete(path)
        return read(self, path, *given)

    monkeypatch.setattr(Folder, "read_parquet", moved)
    result = catalog.erase(to_binary(pa.array([image_id("secret")])))
    assert (result.num_reviews, result.is_complete) == (1, True)
    monkeypatch.undo()
    left = [folder.read_parquet(file.path)["image_id"].to_pylist() for file in folder.list(REVIEWS)]
    assert left == [[image_id("a")]]


def test_of_texts_that_begin_alike_the_longest_is_blotted_out() -> None:
    blotted = blotter(["s3://b/a", "s3://b/a.jpg", "s3://b/other"])
    assert blotted("s3://b/a.jpg, s3://b/a; s3://b/b s3://b/a.jp") == "<erased>, <erased>; s3://b/b <erased>.jp"
    assert blotted("s3://b/othe") == "s3://b/othe"
    assert blotter(["abcdef", "xyzxyz"])("_abcdefxyzxyzxyz") == "_<erased><erased>xyz"
    assert blotter([])("as it was") == "as it was"


def test_a_hundred_thousand_addresses_take_no_longer_than_few() -> None:
    texts = [f"s3://bucket/folder/{number}/image-{'x' * (number % 50)}.jpg" for number in range(100_000)]
    record = '{"message": "such as ' + ", ".join(texts[:3]) + '", "rows": ' + "[0, 1, 2], " * 2000 + "}"
    blotted = blotter(texts)
    started = time.thread_time()
    assert blotted(record).count("<erased>") == 3
    assert time.thread_time() - started < 0.2
