"""An erasure beside readers and writers: it removes at once the files that it replaces."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.catalog_samples import DATE, enrich, image_id, open_catalog, references, request, rows_by_name, write
from vlmflow.catalog import Catalog
from vlmflow.catalog import read as read_module
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.keys import to_binary
from vlmflow.catalog.reviews import EVENT
from vlmflow.engine.relabel_files import Done, relabel_file
from vlmflow.errors import MAY_PASS, CatalogChangedError, CatalogError
from vlmflow.moderation.relabel import Changes, Target

NAMES = ["a", "b"]
DAYS = 5


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    made = open_catalog(tmp_path)
    for day in range(DAYS):
        asked = request(date=DATE + dt.timedelta(days=day))
        enrich(made, f"r{day}", [references([f"{name}{day}" for name in NAMES])], asked)
    return made


def erase(catalog: Catalog, *names: str) -> None:
    other = Catalog.open(catalog._folder.config)
    assert other.erase(to_binary(pa.chunked_array([[image_id(name) for name in names]]))).num_rows == len(names)


def erase_before_reading(monkeypatch: pytest.MonkeyPatch, catalog: Catalog, table: str, *names: str) -> None:
    """Has images erased between the look at a table's version and the first file that is read of it."""
    original = Folder.read_parquet

    def read(self: Folder, path: str, columns: Sequence[str] | None = None) -> pa.Table:
        if path.startswith(f"{table}/"):
            monkeypatch.setattr(Folder, "read_parquet", original)
            erase(catalog, *names)
        return original(self, path, columns)

    monkeypatch.setattr(Folder, "read_parquet", read)


@pytest.mark.parametrize(
    "batches",
    [lambda catalog: catalog.image_batches(["uri"]), lambda catalog: catalog.embedding_batches(["view"])],
    ids=["images", "embeddings"],
)
def test_a_reader_of_the_version_before_is_told_to_ask_again(
    catalog: Catalog, batches: Callable[[Catalog], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_module, "_SMALL_BYTES", 0)  # else all files have been read already
    reading = batches(catalog)
    next(reading)
    next(reading)
    erase(catalog, *(f"a{day}" for day in range(DAYS)))
    with pytest.raises(CatalogChangedError, match="is gone: the catalog has changed") as caught:
        list(reading)
    assert isinstance(caught.value, MAY_PASS)
    assert caught.value.remedy == "Run the same command again."
    assert sum(rows.num_rows for rows in batches(catalog)) == sum(
        rows.num_rows for rows in batches(Catalog.open(catalog._folder.config))
    )


def test_a_file_that_the_table_still_has_is_lost(catalog: Catalog, tmp_path: Path) -> None:
    next((tmp_path / "images").rglob("*.parquet")).unlink()
    with pytest.raises(CatalogError, match="is gone although the table refers to it") as caught:
        catalog.images()
    assert not isinstance(caught.value, MAY_PASS)
    assert "Restore" in caught.value.remedy


@pytest.mark.parametrize("version", ["v1", "v2"], ids=["new rows", "replaced rows"])
def test_a_commit_decides_again(catalog: Catalog, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    names = ["b0"] if version == "v2" else ["b0", "c0"]
    written = write(catalog, "late", [references(names, version=version)], request(), content="new")
    if version == "v1":  # whose rows come beside rows that another run has added since planning
        enrich(Catalog.open(catalog._folder.config), "other", [references(["a9", "d9"])])
        erase_before_reading(monkeypatch, catalog, "images", "d9")
    else:
        erase_before_reading(monkeypatch, catalog, "images", "a0")
    done = catalog.commit("late", written)
    assert (done.num_added, done.num_replaced) == ((0, 1) if version == "v2" else (1, 0))
    rows = rows_by_name(catalog)
    assert len(rows) == (9 if version == "v2" else 12)
    assert rows["b0"]["content_hash"] == ("new-mem://b0" if version == "v2" else "bytes-mem://b0")


def test_verdicts_are_brought_into_the_rows_where_they_are_now(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {"decision": "block", "reviewer": "ada", "at": dt.datetime(2026, 11, 20, tzinfo=dt.UTC)}
    images = [{"image_id": image_id(name), "content_hash": f"bytes-mem://{name}"} for name in ("b0", "b4")]
    catalog.reviews.add(pa.Table.from_pylist([image | said for image in images], schema=EVENT))
    erase_before_reading(monkeypatch, catalog, "images", "a0", "a3")
    assert catalog.apply_verdicts().num_changed == 2
    blocked = {name for name, row in rows_by_name(catalog).items() if row["decision"] == "block"}
    assert blocked == {"b0", "b4"}


@pytest.mark.parametrize("table", ["images", "embeddings"])
def test_a_compaction_leaves_to_the_next_what_has_moved(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch, table: str
) -> None:
    for name in NAMES:
        enrich(catalog, f"more-{name}", [references([f"more-{name}"])])
    erase_before_reading(monkeypatch, catalog, table, "a0", "a1")
    catalog.compact("tidy")
    assert len(rows_by_name(catalog)) == 2 * DAYS
    assert len(catalog.embeddings(["image_id"])["image_id"].unique()) == 2 * DAYS


def test_a_backfill_leaves_a_file_that_is_gone_to_its_next_round(catalog: Catalog) -> None:
    images = catalog.newest_images
    file = next(file for file in images.files.values() if file.ingest_date == DATE)
    erase(catalog, "a0")
    target: Target = None  # type: ignore[assignment] # nothing is moderated
    done = relabel_file(catalog._folder, file, images.schema, target, None, False)
    assert done == Done(file, None, Changes())
    with pytest.raises(CatalogChangedError):
        relabel_file(catalog._folder, file, images.schema, target, None, True)
