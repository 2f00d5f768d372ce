"""Manifests that are not as they should be: what is wrong is said, with the line; no row is lost for it."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlmflow.catalog import Catalog
from vlmflow.config import CatalogConfig
from vlmflow.errors import SourceError
from vlmflow.sources.tables import TableFile, open_table


def rows_of(table: TableFile) -> list[dict[str, object]]:
    return [row for batch in table.batches() for row in batch.to_pylist()]


def opened(tmp_path: Path, name: str, content: bytes) -> TableFile:
    (tmp_path / name).write_bytes(content)
    return open_table(tmp_path / name, name)


@pytest.mark.parametrize("header", ['uri,"title\na.jpg,"x', 'uri,"title\na.jpg,x\nb.jpg,"y'])
def test_a_quote_in_the_header_that_is_not_closed_takes_no_row_for_a_name(tmp_path: Path, header: str) -> None:
    table = opened(tmp_path, "list.csv", f"{header}\nc.jpg,z\n".encode())
    with pytest.raises(SourceError, match="line 1: a quote is not closed"):
        rows_of(table)


def test_a_name_of_two_lines_is_a_name(tmp_path: Path) -> None:
    table = opened(tmp_path, "list.csv", b'uri,"the\ntitle"\na.jpg,x\n')
    assert rows_of(table) == [{"uri": "a.jpg", "the\ntitle": "x"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("uri,title\na.jpg,caf\xe9\n".encode("latin-1"), "line 2 is not in UTF-8"),
        ("uri,caf\xe9\na.jpg,x\n".encode("latin-1"), "line 1 is not in UTF-8"),
        ("uri,title\na.jpg,x\n".encode("utf-16"), "list.csv is in UTF-16"),
        (b'uri,title\r\n\r\n"a\r\nb.jpg",x\r\nc.jpg\r\n', "line 5: 1 fields, where the header has 2"),
        (b"uri,title\ra.jpg,x,y\r", "line 2: 3 fields, where the header has 2"),
        (b"uri,title\na.jpg,x\nb.jpg," + b"y" * (3 << 20), "line 3: a row of 3,145,734 bytes"),
        (b"uri,title,,\na.jpg,x,,\n", "two columns without a name"),
    ],
)
def test_what_is_wrong_with_a_csv_file_is_said_with_the_line(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        rows_of(opened(tmp_path, "list.csv", content))
    assert caught.value.remedy


def test_a_value_that_does_not_fit_is_named_by_line_and_column(tmp_path: Path) -> None:
    lines = [f'{{"uri": "{number}.jpg", "price": {number}, "size": {number}}}' for number in range(200)]
    lines[120:120] = ["", '{"uri": "b.jpg", "size": "large", "price": 1}', '{"uri": "c.jpg", "price": "none"}']
    with pytest.raises(SourceError, match=r"line 122, column size: values do not fit together"):
        rows_of(opened(tmp_path, "list.jsonl", "\n".join(lines).encode()))


def test_members_without_a_value_have_no_type_yet(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"uri": "a.jpg", "meta": {"tags": [], "of": [{"tags": []}], "none": None, "in": {"x": {}}, "name": "it"}},
        {"uri": "b.jpg", "meta": {"tags": None, "of": [], "none": None, "in": {}, "name": None}},
    ]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    kept = [{"uri": "a.jpg", "meta": {"name": "it"}}, {"uri": "b.jpg", "meta": {"name": None}}]
    assert rows_of(opened(tmp_path, "list.jsonl", content)) == kept
    table = pa.table({"uri": ["a.jpg"], "meta": pa.array([{"tags": [], "none": None, "name": "it"}])})
    pq.write_table(table, tmp_path / "list.parquet")
    assert rows_of(open_table(tmp_path / "list.parquet", "list.parquet")) == kept[:1]


def test_objects_that_are_all_empty_have_no_type_yet(tmp_path: Path) -> None:
    table = opened(tmp_path, "list.jsonl", b'{"uri": "a.jpg", "meta": {}, "more": [{}]}\n{"uri": "b.jpg"}\n')
    assert table.schema.field("meta").type == table.schema.field("more").type == pa.null()
    assert rows_of(table) == [{"uri": f"{name}.jpg", "meta": None, "more": None} for name in "ab"]


@pytest.mark.parametrize("around", [("[", "]"), ('{"y": ', "}")])
def test_what_is_nested_deeper_than_libraries_hand_on_is_refused(tmp_path: Path, around: tuple[str, str]) -> None:
    def lines(levels: int) -> bytes:
        value = around[0] * levels + "1" + around[1] * levels
        return f'{{"uri": "a.jpg", "flat": {[[1]] * 60}}}\n{{"uri": "b.jpg", "x": {value}}}\n'.encode()

    deepest = opened(tmp_path, "list.jsonl", lines(30))
    catalog = Catalog.open_or_create(CatalogConfig(uri=str(tmp_path / "catalog")), deepest.schema)
    assert catalog.source_columns.field("x").type == deepest.schema.field("x").type
    rows = next(deepest.batches())
    pq.write_table(pa.table({"source": rows.to_struct_array()}), tmp_path / "rows.parquet")
    assert pq.read_table(tmp_path / "rows.parquet")["source"].to_pylist() == rows.to_pylist()
    for levels in (31, 100, 900, 5000):
        with pytest.raises(SourceError, match=r"list.jsonl, line 2 is nested too deep") as caught:
            rows_of(opened(tmp_path, "list.jsonl", lines(levels)))
        assert "more than 30 levels" in caught.value.remedy


def test_a_nested_column_of_parquet_that_is_too_deep_is_named(tmp_path: Path) -> None:
    kind = pa.int64()
    for _ in range(31):
        kind = pa.list_(kind)
    pq.write_table(pa.table({"uri": ["a.jpg"], "x": pa.nulls(1, kind)}), tmp_path / "list.parquet")
    with pytest.raises(SourceError, match=r"column x is nested in more than 30 levels"):
        rows_of(open_table(tmp_path / "list.parquet", "list.parquet"))
