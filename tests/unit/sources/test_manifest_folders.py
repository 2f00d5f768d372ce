"""Manifests of several files, as Spark and warehouses write them, and Delta tables."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake

from vlmflow.config import CatalogConfig, SourceConfig
from vlmflow.errors import EmptySourceError, SourceError
from vlmflow.sources import Source, open_source

# Rows 0 and 2, as PROTOCOL.md of Delta serialises a RoaringBitmapArray inline (Z85 of its bytes).
_DELETED = {
    "storageType": "i",
    "pathOrInlineDv": "^Bg9^0rr910000000000iXQKl0rr91000315c8Xg00062",
    "sizeInBytes": 36,
    "cardinality": 2,
}


def _write(path: Path, **columns: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".csv":
        pa.csv.write_csv(table, path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))


def _open(folder: Path, **options: Any) -> Source:
    return open_source(SourceConfig.model_validate({"uri": str(folder), "kind": "manifest", **options}))


def _rows(source: Source) -> list[tuple[str, dict[str, Any]]]:
    """Name and caller's columns of each image, as they are listed."""
    rows = [row for batch in source.list() for row in batch.to_pylist()]
    return [(Path(row["uri"]).name, row.get("source")) for row in rows]


@pytest.mark.parametrize("extension", ["parquet", "csv", "json", "jsonl", "ndjson"])
def test_the_files_of_a_folder_are_one_manifest(extension: str, tmp_path: Path) -> None:
    folder = tmp_path / "list"
    _write(folder / f"part-1.{extension}", uri=["b.jpg", "/c.jpg"], title=["two", None])
    _write(folder / f"part-0.{extension}", uri=["a.jpg"], title=["one"])
    _write(folder / "_SUCCESS.csv", uri=["never.jpg"])
    (folder / ".part-0.crc").write_bytes(b"x")
    if extension != "parquet":
        (folder / f"part-2.{extension}").write_bytes(b"")
    source = _open(folder)
    assert _rows(source) == [("a.jpg", {"title": "one"}), ("b.jpg", {"title": "two"}), ("c.jpg", {"title": None})]
    uris = [uri for batch in source.list() for uri in batch["uri"].to_pylist()]
    assert uris == [str(folder / "a.jpg"), str(folder / "b.jpg"), "/c.jpg"]
    assert source.version is None


@pytest.mark.parametrize(("packed", "packing"), [("gz", "gzip"), ("zst", "zstd"), ("bz2", "bz2")])
@pytest.mark.parametrize("extension", ["csv", "jsonl"])
def test_files_may_be_compressed(extension: str, packed: str, packing: str, tmp_path: Path) -> None:
    folder = tmp_path / "list"
    for number, name in enumerate(["a.jpg", "b.jpg"]):
        _write(tmp_path / f"plain.{extension}", uri=[f"/{name}"], title=[f"Grüße {number}"])
        plain = (tmp_path / f"plain.{extension}").read_bytes()
        folder.mkdir(exist_ok=True)
        with pa.CompressedOutputStream(str(folder / f"part-{number}.{extension}.{packed}"), packing) as file:
            file.write(plain)
    assert _rows(_open(folder)) == [("a.jpg", {"title": "Grüße 0"}), ("b.jpg", {"title": "Grüße 1"})]
    with pa.CompressedOutputStream(str(folder / f"part-2.{extension}.{packed}"), packing):
        pass  # a part without rows
    assert len(_rows(_open(folder))) == 2
    one = open_source(SourceConfig(uri=str(folder / f"part-1.{extension}.{packed}")))
    assert _rows(one) == [("b.jpg", {"title": "Grüße 1"})]
    assert one.version is not None
    whole = (folder / f"part-1.{extension}.{packed}").read_bytes()
    for damaged in (b"uri\n/a.jpg\n", whole[:-9]):
        (tmp_path / f"x.{extension}.{packed}").write_bytes(damaged)
        with pytest.raises(SourceError, match=rf"x\.{extension}\.{packed} is not compressed .* or is damaged"):
            _rows(open_source(SourceConfig(uri=str(tmp_path / f"x.{extension}.{packed}"))))


def test_a_folder_of_empty_files_names_no_image(tmp_path: Path) -> None:
    (tmp_path / "part-0.csv").write_bytes(b"")
    with pytest.raises(SourceError, match="has no column uri; it has none"):
        _rows(_open(tmp_path))
    (tmp_path / "part-0.csv").unlink()
    _write(tmp_path / "part-0.parquet", uri=["/a.jpg"])
    (tmp_path / "part-1.parquet").write_bytes(b"")  # no writer leaves such: an upload that failed does
    with pytest.raises(SourceError, match=r"part-1\.parquet is not a Parquet file, or is damaged"):
        _rows(_open(tmp_path))


def test_files_share_their_columns(tmp_path: Path) -> None:
    _write(tmp_path / "a.parquet", uri=["a.jpg"], price=pa.array([3], pa.int32()), of=[{"x": 1}], new=pa.nulls(1))
    _write(tmp_path / "b.parquet", uri=["b.jpg"], price=[1.5], of=[{"x": 2, "y": ["z"]}], new=["text"])
    _write(tmp_path / "c.parquet", uri=["c.jpg"], more=[True])
    source = _open(tmp_path)
    kinds = {field.name: str(field.type) for field in source.columns}
    assert kinds["price"] == "double"
    assert (kinds["new"], kinds["more"]) == ("string", "bool")
    assert _rows(source) == [
        ("a.jpg", {"price": 3.0, "of": {"x": 1, "y": None}, "new": None, "more": None}),
        ("b.jpg", {"price": 1.5, "of": {"x": 2, "y": ["z"]}, "new": "text", "more": None}),
        ("c.jpg", {"price": None, "of": None, "new": None, "more": True}),
    ]


def test_folders_that_are_partitions_give_columns(tmp_path: Path) -> None:
    _write(tmp_path / "day=2026-01-02/shop=a%3Ab/x.parquet", uri=["/a.jpg"])
    _write(tmp_path / "day=__HIVE_DEFAULT_PARTITION__/shop=c/x.parquet", uri=["/b.jpg"], shop=["its own"])
    expected = [
        ("a.jpg", {"day": "2026-01-02", "shop": "a:b"}),
        ("b.jpg", {"day": None, "shop": "its own"}),
    ]
    assert _rows(_open(tmp_path)) == expected
    assert _rows(_open(tmp_path, columns=["day"])) == [(name, {"day": row["day"]}) for name, row in expected]


def test_what_does_not_fit_is_named_with_its_file(tmp_path: Path) -> None:
    _write(tmp_path / "a.parquet", uri=["a.jpg"], sku=[1], title=["x"])
    _write(tmp_path / "b.parquet", uri=["b.jpg"], sku=[2.0], title=["y"])
    assert len(_rows(_open(tmp_path))) == 2
    with pytest.raises(SourceError, match=r"b\.parquet: column sku is double, and int64 in the files before it"):
        _rows(_open(tmp_path, key_column="sku"))
    _write(tmp_path / "b.parquet", uri=["b.jpg"], sku=[2], title=[False])
    with pytest.raises(SourceError, match=r"b\.parquet: its columns do not fit those of the files before it.*title"):
        _rows(_open(tmp_path))
    _write(tmp_path / "c.csv", uri=["b.jpg"])
    with pytest.raises(SourceError, match=r"holds \.csv and \.parquet files") as caught:
        _rows(_open(tmp_path))
    assert "a folder of their own" in caught.value.remedy
    with pytest.raises(SourceError, match="regions_column of a manifest of several files"):
        _rows(_open(tmp_path, regions_column="regions"))


def test_a_file_that_is_replaced_meanwhile_is_named(tmp_path: Path) -> None:
    _write(tmp_path / "a.parquet", uri=["/a.jpg"], title=["x"])
    source = _open(tmp_path)
    assert source.columns.names == ["title"]
    _write(tmp_path / "a.parquet", uri=["/a.jpg"])
    with pytest.raises(SourceError, match=r"a\.parquet was changed while it was read: it has no column title"):
        _rows(source)


def test_a_folder_may_be_called_as_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "products.parquet"
    _write(folder / "part-0.parquet", uri=["/a.jpg"])
    _write(folder / "part-1.parquet", uri=["/b.jpg"])
    for uri in (folder, f"{folder}/"):
        assert [name for name, _ in _rows(open_source(SourceConfig(uri=str(uri))))] == ["a.jpg", "b.jpg"]
    _write(folder / "part-0.parquet", image=[b"bytes"])
    _write(folder / "part-1.parquet", image=[b"others"])
    assert len(_rows(open_source(SourceConfig(uri=str(folder))))) == 2


def test_the_catalog_in_the_folder_is_no_part_of_it(tmp_path: Path) -> None:
    _write(tmp_path / "a.parquet", uri=["/a.jpg"])
    _write(tmp_path / "catalog/images/x.parquet", uri=["/never.jpg"])
    config = SourceConfig(uri=str(tmp_path), kind="manifest")
    assert _rows(open_source(config, CatalogConfig(uri=str(tmp_path / "catalog")))) == [("a.jpg", None)]


def test_a_folder_of_tables_is_no_folder_of_images(tmp_path: Path) -> None:
    _write(tmp_path / "part-0.parquet", uri=["a.jpg"])
    with pytest.raises(SourceError, match=r"holds tables and no images: .*part-0\.parquet") as caught:
        list(open_source(SourceConfig(uri=str(tmp_path))).list())
    assert "Set source.kind" in caught.value.remedy
    (tmp_path / "a.jpg").write_bytes(b"x")
    assert len(_rows(open_source(SourceConfig(uri=str(tmp_path))))) == 2
    (tmp_path / "none").mkdir()
    with pytest.raises(EmptySourceError, match=r"holds no \.parquet, \.csv"):
        _rows(_open(tmp_path / "none"))


def _delta(place: Path, **columns: Any) -> None:
    write_deltalake(place, pa.table(columns), mode="append", partition_by=["shop"] if "shop" in columns else None)


def _mark_deleted(place: Path) -> None:
    """Two of the three rows of a table's one file, as Databricks does it."""
    log = place / "_delta_log"
    entries = [json.loads(line) for file in sorted(log.glob("*.json")) for line in file.read_text().splitlines()]
    add = next(entry["add"] for entry in entries if "add" in entry)
    metadata = next(entry["metaData"] for entry in entries if "metaData" in entry)
    features = ["deletionVectors"]
    protocol = {
        "minReaderVersion": 3, "minWriterVersion": 7, "readerFeatures": features, "writerFeatures": features,
    }  # fmt: skip
    removed = {"path": add["path"], "dataChange": True, "deletionTimestamp": 0, "partitionValues": {}}
    lines = (
        {"commitInfo": {"timestamp": int(time.time() * 1000), "operation": "DELETE"}},
        {"protocol": protocol},
        {"metaData": metadata | {"configuration": {"delta.enableDeletionVectors": "true"}}},
        {"remove": removed},
        {"add": add | {"deletionVector": _DELETED}},
    )
    (log / f"{1:020d}.json").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_of_a_delta_table_the_rows_count_that_are_there(tmp_path: Path) -> None:
    place = tmp_path / "products"
    _delta(place, uri=["a.jpg", "/b.jpg"], price=[1, 2], shop=["x y", None], **{"A title.": ["one", "two"]})
    _delta(place, uri=["/c.jpg"], price=[3], shop=["z"], **{"A title.": ["three"]})
    table = DeltaTable(place)
    table.delete("uri = '/b.jpg'")
    table.update(predicate="uri = '/c.jpg'", updates={"price": "30"})
    assert len(list(place.glob("*/*.parquet"))) > len(table.file_uris())  # those of before are there still
    source = _open(place, text_column="A title.")
    assert sorted(_rows(source)) == [
        ("a.jpg", {"price": 1, "shop": "x y", "A title.": "one"}),
        ("c.jpg", {"price": 30, "shop": "z", "A title.": "three"}),
    ]
    texts = {Path(row["uri"]): row["text"] for batch in source.list() for row in batch.to_pylist()}
    assert texts == {place / "a.jpg": "one", Path("/c.jpg"): "three"}
    assert {name for name, _ in _rows(_open(place, columns=["price"]))} == {"a.jpg", "c.jpg"}


def test_rows_that_a_deletion_vector_marks_are_gone(tmp_path: Path) -> None:
    place = tmp_path / "products"
    _delta(place, uri=["/a.jpg", "/b.jpg", "/c.jpg"])
    _mark_deleted(place)
    assert [name for name, _ in _rows(_open(place))] == ["b.jpg"]


def test_columns_that_files_call_otherwise_are_mapped(tmp_path: Path) -> None:
    _delta(tmp_path, uri=["/a.jpg"], **{"a title": ["one"]})
    (entry,) = (tmp_path / "_delta_log").glob("*.json")
    actions = [json.loads(line) for line in entry.read_text().splitlines()]
    metadata = next(action["metaData"] for action in actions if "metaData" in action)
    columns = json.loads(metadata["schemaString"])
    for number, field in enumerate(columns["fields"], start=1):
        names = {"delta.columnMapping.id": number, "delta.columnMapping.physicalName": f"column-{number}"}
        field["metadata"] = names
    configuration = {"delta.columnMapping.mode": "name", "delta.columnMapping.maxColumnId": "2"}
    metadata |= {"schemaString": json.dumps(columns), "configuration": configuration}
    add = next(action["add"] for action in actions if "add" in action)
    rows = pq.read_table(tmp_path / add["path"])
    pq.write_table(rows.rename_columns(["column-1", "column-2"]), tmp_path / add["path"])
    add |= {"size": (tmp_path / add["path"]).stat().st_size, "stats": None}
    written = ({"protocol": {"minReaderVersion": 2, "minWriterVersion": 5}}, {"metaData": metadata}, {"add": add})
    entry.write_text("".join(json.dumps(action) + "\n" for action in written))
    assert _rows(_open(tmp_path)) == [("a.jpg", {"a title": "one"})]
    with pytest.raises(SourceError, match="column mapping"):
        _rows(_open(tmp_path, kind="parquet"))


def test_of_a_delta_table_of_image_bytes_live_files_are_read(tmp_path: Path) -> None:
    place = tmp_path / "images"
    _delta(place, image=[b"1", b"2", b"3"], title=["a", "b", "c"])
    DeltaTable(place).delete("title = 'b'")
    source = _open(place, kind="parquet")
    assert sorted(row["title"] for _, row in _rows(source)) == ["a", "c"]
    other = tmp_path / "marked"
    _delta(other, image=[b"1", b"2", b"3"])
    _mark_deleted(other)
    with pytest.raises(SourceError, match="rows that are deleted") as caught:
        _rows(_open(other, kind="parquet"))
    assert "APPLY (PURGE)" in caught.value.remedy


@pytest.mark.parametrize("elsewhere", ["../other/x.parquet", "..%2Fother%2Fx.parquet", "file:///other/x.parquet"])
def test_files_outside_the_folder_of_a_delta_table_are_not_read(elsewhere: str, tmp_path: Path) -> None:
    _delta(tmp_path / "images", image=[b"1"])
    _write(tmp_path / "other/x.parquet", image=[b"not of the table"])
    (entry,) = (tmp_path / "images/_delta_log").glob("*.json")
    path = json.loads(next(line for line in entry.read_text().splitlines() if '"add"' in line))["add"]["path"]
    entry.write_text(entry.read_text().replace(path, elsewhere))
    with pytest.raises(SourceError, match="files lie outside its folder"):
        _rows(_open(tmp_path / "images", kind="parquet"))


def test_a_delta_table_without_rows_names_no_image(tmp_path: Path) -> None:
    _delta(tmp_path, uri=["/a.jpg"], price=[1])
    DeltaTable(tmp_path).delete()
    for kind in ("manifest", "parquet"):
        with pytest.raises(EmptySourceError):
            _rows(_open(tmp_path, kind=kind))
        assert _rows(_open(tmp_path, kind=kind, allow_empty=True)) == []


def test_a_delta_table_that_is_damaged_is_named(tmp_path: Path) -> None:
    _delta(tmp_path, uri=["/a.jpg"])
    _delta(tmp_path, uri=["/b.jpg"])
    (tmp_path / "_delta_log" / f"{0:020d}.json").unlink()
    with pytest.raises(SourceError, match="is a Delta table that cannot be read"):
        _rows(_open(tmp_path))
