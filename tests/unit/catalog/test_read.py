"""What is read of the tables: no more than was asked for, and both of one time."""

from __future__ import annotations

import datetime as dt
import threading
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from tests.catalog_samples import config_of, enrich, image_id, open_catalog, references
from vlmflow.catalog import Catalog, export, read, writer
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.keys import index_of, to_binary
from vlmflow.catalog.log import DataFile, Snapshot
from vlmflow.catalog.pieces import ParquetPieces
from vlmflow.catalog.read import References, images_named
from vlmflow.search.live import LiveRows
from vlmflow.summary import summarize

NAMES = ["a", "b", "c"]


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    catalog = open_catalog(tmp_path)
    catalog.runs.start("r0", {})
    enrich(catalog, "r0", [references(NAMES)])
    catalog.runs.finish("r0", {})
    return catalog


def test_an_export_joins_the_small_files_of_many_nights(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        enrich(catalog, f"r{number + 1}", [references([f"{number}-{name}" for name in NAMES])])
    result = catalog.export(tmp_path / "one", with_embeddings=True)
    assert (result.num_images, result.num_embeddings, result.num_files) == (18, 36, 2)
    monkeypatch.setattr(export, "_FILE_BYTES", 1)
    assert catalog.export(tmp_path / "many", with_embeddings=False).num_files == 6
    one, many = (pq.read_table(tmp_path / name / "images").sort_by("uri") for name in ("one", "many"))
    assert one.num_rows == 18
    assert one.equals(many)


def test_rows_of_many_files_are_read_while_others_come(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        enrich(catalog, f"r{number + 1}", [references([f"{number}-{name}" for name in NAMES])])
    live = LiveRows(Folder(config_of(catalog.uri)), catalog.newest_images)
    together = threading.Barrier(3)
    read, met = Folder.read_parquet, []

    def waiting(self: Folder, path: str, columns: Sequence[str] | None = None) -> pa.Table:
        met.append(path)
        together.wait(timeout=60)  # broken where one is read after the other
        return read(self, path, columns)

    monkeypatch.setattr(Folder, "read_parquet", waiting)
    positions = np.arange(len(live))[::-1]
    rows = live.take(positions, ["uri"])
    assert len(met) == 6
    assert live.take(positions, ["uri"]).equals(rows)
    assert len(met) == 6, "they are kept"
    monkeypatch.setattr(Folder, "read_parquet", read)
    everything = pa.concat_tables(part for _, part in live.read(["uri"]))
    assert rows.equals(everything.take(pa.array(positions)))


def test_vectors_are_counted_without_being_read(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = catalog.embeddings()
    read = Folder.read_parquet
    asked: list[Sequence[str] | None] = []

    def watched(self: Folder, path: str, columns: Sequence[str] | None = None) -> pa.Table:
        if path.startswith("embeddings/"):
            asked.append(columns)
        return read(self, path, columns)

    monkeypatch.setattr(Folder, "read_parquet", watched)
    assert summarize(config_of(tmp_path)).num_vectors == 6
    assert all(columns is not None and "vector" not in columns for columns in asked)
    assert len(asked) == 1
    some = catalog.embeddings(["vector", "ingest_date", "image_id"])
    assert some.equals(whole.select(["vector", "ingest_date", "image_id"]))


def test_of_some_images_no_other_vectors_are_read(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(writer._EMBEDDING_OPTIONS, "row_group_size", 2)
    enrich(catalog, "r1", [references(["d", "e", "f"])])
    enrich(catalog, "r2", [references(["a"], version="v2")], content="others")  # leaves vectors that nobody refers to
    original = ParquetPieces.read
    read: list[int] = []

    def watched(self: Any, groups: Sequence[int], columns: Sequence[str] | None) -> pa.Table:
        if columns is None or "vector" in columns:
            read.append(len(groups))
        return original(self, groups, columns)

    whole = catalog.embeddings()
    monkeypatch.setattr(ParquetPieces, "read", watched)
    asked = pa.array([image_id(name) for name in ("a", "e", "unknown")])
    columns = ["vector", "ingest_date", "image_id", "view", "embed_run_id"]
    some = pa.concat_tables(catalog.embedding_batches(columns, of=index_of(to_binary(asked))))
    order = [("image_id", "ascending"), ("view", "ascending")]
    wanted = whole.filter(pc.is_in(whole["image_id"], value_set=asked)).select(columns)
    assert wanted.num_rows == 4
    assert some.sort_by(order).equals(wanted.sort_by(order))
    assert read == [1, 1], "one row group of one file, and one of another"
    assert not pa.concat_tables(catalog.embedding_batches(of=index_of(to_binary(asked[2:])))).num_rows


def test_of_an_image_by_name_no_other_file_is_read(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    enrich(catalog, "r1", [references(["d", "e"])])
    read = Folder.read_parquet
    asked: list[Sequence[str] | None] = []

    def watched(self: Folder, path: str, columns: Sequence[str] | None = None) -> pa.Table:
        asked.append(columns)
        return read(self, path, columns)

    monkeypatch.setattr(Folder, "read_parquet", watched)
    columns = ["uri", "labels", "ingest_date"]
    for name in ("mem://d", image_id("d"), "mem://unknown"):
        rows = images_named(catalog._folder, catalog.newest_images, pa.array([name]), columns)
        assert rows.column_names == columns
        assert rows["uri"].to_pylist() == ["mem://d"] * (name != "mem://unknown")
    assert sum("labels" in (some or ()) for some in asked) == 2
    assert len(asked) == 3 * 2 + 2


def replace_vectors(catalog: Catalog, monkeypatch: pytest.MonkeyPatch, *, at_look: int) -> None:
    """Before a look at the embeddings gives all rows other vectors, and drops those that they had."""
    refresh = catalog._embeddings.refresh
    looks: list[int] = []

    def late() -> Any:
        looks.append(1)
        if len(looks) == at_look:
            other = Catalog.open(catalog._folder.config)
            enrich(other, "r1", [references(NAMES, version="v2")], content="others")
            other.compact("r2")
        return refresh()

    monkeypatch.setattr(catalog._embeddings, "refresh", late)


def test_vectors_of_rows_are_read_though_they_are_replaced_meanwhile(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_vectors(catalog, monkeypatch, at_look=1)
    assert catalog.embeddings(["embed_run_id"])["embed_run_id"].to_pylist() == ["r1"] * 6


def test_vectors_that_are_replaced_meanwhile_are_not_called_lost(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_vectors(catalog, monkeypatch, at_look=3)  # two are for the files
    assert "lost_vectors" not in catalog.verify([references(NAMES)], {}).findings
    assert catalog.embeddings(["embed_run_id"])["embed_run_id"].to_pylist() == ["r1"] * 6


def test_what_a_date_refers_to_takes_few_bytes_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    num_files, num_rows = 20, 20_000
    date = dt.date(2026, 11, 28)
    files = {str(number): DataFile(str(number), 1, num_rows, date) for number in range(num_files)}

    def read_each(*_: object, ahead: int) -> Iterator[tuple[DataFile, pa.Table]]:
        for number, file in enumerate(files.values()):
            data = np.random.default_rng(number).bytes(16 * num_rows).hex()
            ids = pa.array([data[at : at + 32] for at in range(0, len(data), 32)])
            yield file, pa.table({"image_id": ids, "embed_run_id": pa.repeat("20261128T020611-35a41333", num_rows)})

    monkeypatch.setattr(read, "read_each", read_each)
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    references = References(None, Snapshot(0, 0, files, pa.schema([])), date)  # type: ignore[arg-type]
    held = tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes() - before
    tracemalloc.stop()
    assert held < 60 * num_files * num_rows
    for number, (_, rows) in enumerate(read_each(ahead=1)):
        assert references.find(rows).tolist() == list(range(number * num_rows, (number + 1) * num_rows))
    others = rows.set_column(1, "embed_run_id", pa.nulls(num_rows, pa.string()))
    assert (references.find(others) == -1).all()
    assert (references.find(others.set_column(1, "embed_run_id", pa.repeat("another", num_rows))) == -1).all()
