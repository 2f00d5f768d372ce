"""Types of the caller's columns: what one night's values leave open, the next night's decide."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlmflow.catalog import Catalog
from vlmflow.catalog.columns import checked_numbers, missing_columns, source_columns, storable
from vlmflow.config import CatalogConfig, SourceConfig
from vlmflow.errors import CatalogError
from vlmflow.sources import open_source


def manifest(folder: Path, extension: str, values: list[Any]) -> Path:
    """A manifest with a column ``price``."""
    path = folder / f"list.{extension}"
    rows = [{"uri": f"{number}.jpg", "price": value} for number, value in enumerate(values)]
    if extension == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def references(path: Path, **options: Any) -> pa.Table:
    return pa.Table.from_batches(list(open_source(SourceConfig(uri=str(path), **options)).list()))


def kept_as(path: Path) -> pa.DataType | None:
    """The type under which a catalog keeps the prices; None: it keeps none yet."""
    columns = storable(open_source(SourceConfig(uri=str(path))).columns)
    return columns.field("price").type if "price" in columns.names else None


@pytest.mark.parametrize("extension", ["jsonl", "parquet"])
@pytest.mark.parametrize("values", [[None, None], [[], None]])
def test_a_column_without_values_has_no_type_yet(tmp_path: Path, extension: str, values: list[Any]) -> None:
    path = manifest(tmp_path, extension, values)
    assert kept_as(path) is None
    refs = references(path, text_column="price", questions_column="price")
    assert refs["text"].to_pylist() == refs["questions"].to_pylist() == [None, None]
    assert refs["source"].to_pylist() == [{"price": None}] * 2


@pytest.mark.parametrize("extension", ["jsonl", "parquet"])
def test_the_night_that_brings_numbers_decides(tmp_path: Path, extension: str) -> None:
    config = CatalogConfig(uri=str(tmp_path / "catalog"))
    for values, held in (([None], None), ([1.5], pa.float64()), ([None], pa.float64()), ([2], pa.float64())):
        path = manifest(tmp_path, extension, values)
        columns = open_source(SourceConfig(uri=str(path))).columns
        catalog = Catalog.open_or_create(config, columns)
        catalog.check_source(columns)
        kept = {field.name: field.type for field in catalog.source_columns}
        assert kept == ({} if held is None else {"price": held})


def test_whole_numbers_of_json_are_doubles_where_a_double_holds_them(tmp_path: Path) -> None:
    path = manifest(tmp_path, "jsonl", [1, 2])
    assert kept_as(path) == pa.float64()
    refs = references(path, key_column="price", text_column="price")
    assert refs["source"].to_pylist() == [{"price": 1.0}, {"price": 2.0}]
    assert refs["key"].to_pylist() == refs["text"].to_pylist() == ["1", "2"]
    large = 2**53 + 1
    path = manifest(tmp_path, "jsonl", [1, large])
    assert kept_as(path) == pa.int64()
    assert references(path)["source"].to_pylist() == [{"price": 1}, {"price": large}]


def test_whole_numbers_within_lists_and_objects_of_json_are_doubles_too(tmp_path: Path) -> None:
    large = 2**53 + 1
    kinds = {
        json.dumps([{"w": 1, "of": [2]}, None]): pa.list_(
            pa.struct([("w", pa.float64()), ("of", pa.list_(pa.float64()))])
        ),
        json.dumps({"w": 1, "h": large}): pa.struct([("w", pa.int64()), ("h", pa.int64())]),
        json.dumps([1, 2.5]): pa.list_(pa.float64()),
    }
    for value, kind in kinds.items():
        path = manifest(tmp_path, "jsonl", [json.loads(value)])
        assert kept_as(path) == kind
        assert references(path)["source"].to_pylist() == [{"price": json.loads(value)}]


def test_of_several_files_the_first_with_values_tells_the_type(tmp_path: Path) -> None:
    for name, prices in (("a", pa.nulls(1)), ("b", pa.array([1.5])), ("c", pa.nulls(1))):
        pq.write_table(pa.table({"image": pa.array([b"x"]), "price": prices}), tmp_path / f"{name}.parquet")
    refs = references(tmp_path, kind="parquet")
    assert refs["source"].to_pylist() == [{"price": None}, {"price": 1.5}, {"price": None}]
    assert refs.schema.field("source").type.field("price").type == pa.float64()


def test_of_several_files_the_first_with_values_tells_the_types_of_members(tmp_path: Path) -> None:
    metas = ({"a": None, "of": [], "b": 1.5}, {"a": "x", "of": [{"n": None}], "b": 2.5}, {"of": [{"n": 7}]})
    for name, meta in zip("abc", metas, strict=True):
        pq.write_table(pa.table({"image": pa.array([b"x"]), "meta": pa.array([meta])}), tmp_path / f"{name}.parquet")
    refs = references(tmp_path, kind="parquet")
    assert [row["meta"] for row in refs["source"].to_pylist()] == [
        {"a": None, "of": [], "b": 1.5},
        {"a": "x", "of": [{"n": None}], "b": 2.5},
        {"a": None, "of": [{"n": 7}], "b": None},
    ]


def test_columns_and_members_that_the_first_file_lacks_are_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, own in (("a", {"n": None}), ("b", {"n": None, "b": 1, "c": {"d": 1}}), ("c", {"b": 1})):
        table = pa.table({"image": pa.array([b"x"]), "meta": pa.array([{"a": 1, **own}])})
        if "b" in own:  # of a type that no catalog could keep
            table = table.append_column("lasts", pa.array([1], pa.duration("s")))
        pq.write_table(table, tmp_path / f"{name}.parquet")
    refs = references(tmp_path, kind="parquet")
    assert refs["source"].to_pylist() == [{"meta": {"a": 1}}] * 3
    (told,) = caplog.messages
    assert "b.parquet has columns that" in told
    assert "a.parquet lacks and that no row keeps: meta.b, meta.c, lasts;" in told


def test_of_many_such_columns_some_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, more in (("a", {}), ("b", {f"c{number}": [1] for number in range(12)})):
        pq.write_table(pa.table({"image": pa.array([b"x"]), "title": ["x"], **more}), tmp_path / f"{name}.parquet")
    references(tmp_path, kind="parquet")
    (told,) = caplog.messages
    assert "c8, c9 and 2 more;" in told


@pytest.mark.parametrize(("price", "told"), [(1.5, "does not become int64"), ("free", "holds it as int64")])
def test_what_the_type_of_the_catalog_does_not_hold_is_refused_with_a_way_out(price: Any, told: str) -> None:
    table = pa.schema([("source", pa.struct([("price", pa.int64())]))])
    batches = [pa.record_batch({"source": pa.array([{"price": price}])})]
    with pytest.raises(CatalogError, match=told) as caught:
        check(table, batches)
    assert "another name in the source" in caught.value.remedy


def test_whole_doubles_go_into_a_catalog_of_integers() -> None:
    table = pa.schema([("source", pa.struct([("price", pa.int64())]))])
    check(table, [pa.record_batch({"source": pa.array([{"price": 2.0}, {"price": None}, None])})])


def check(table: pa.Schema, batches: list[pa.RecordBatch]) -> None:
    """Holds references against the columns of a table, as planning does."""
    missing_columns(table, source_columns(batches[0].schema))
    assert list(checked_numbers(batches, table)) == batches
