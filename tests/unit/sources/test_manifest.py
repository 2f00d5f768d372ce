"""Manifests: columns carried along, duplicates and conflicts, memory."""

from __future__ import annotations

import asyncio
import gc
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from vlmflow.config import ImageLimits, SourceConfig
from vlmflow.errors import EmptySourceError, RowErrorClass, SourceError
from vlmflow.schema import REFERENCE, with_source
from vlmflow.sources import open_source

ROWS = [
    {"uri": "a.jpg", "title": "first", "price": 1.5},
    {"uri": "sub/b c.jpg", "title": None, "price": 2.0},
    {"uri": "https://host/c.jpg?X-Amz-Signature=5ec7e7", "title": "third", "price": None},
]


def write_manifest(folder: Path, extension: str, rows: list[dict[str, Any]] = ROWS) -> Path:
    path = folder / f"list.{extension}"
    rows_table = pa.Table.from_pylist(rows)
    if extension == "parquet":
        pq.write_table(rows_table, path)
    elif extension == "csv":
        pa.csv.write_csv(rows_table, path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def references(path: Path, **options: Any) -> pa.Table:
    source = open_source(SourceConfig(uri=str(path), **options))
    batches = list(source.list())
    schema = with_source(REFERENCE, source.columns)
    for batch in batches:
        assert batch.schema == schema
        batch.validate(full=True)
    return pa.Table.from_batches(batches, schema)


@pytest.mark.parametrize("extension", ["parquet", "csv", "jsonl", "ndjson"])
def test_a_manifest_carries_its_columns(tmp_path: Path, extension: str) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/b c.jpg").write_bytes(b"12345")
    path = write_manifest(tmp_path, extension)
    refs = references(path, text_column="title")
    assert refs["uri"].to_pylist() == [str(tmp_path / "a.jpg"), str(tmp_path / "sub/b c.jpg"), "https://host/c.jpg"]
    assert refs["locator"].to_pylist()[2] == ROWS[2]["uri"]
    assert refs["text"].to_pylist() == ["first", None, "third"]
    assert refs["size_bytes"].to_pylist() == [None, 5, None]
    versions = refs["object_version"].to_pylist()
    assert (versions[0], versions[2]) == (None, None), "a file that is not there, and an http url that is not asked"
    assert versions[1].endswith("-5")
    prices = ["1.5", "2", None] if extension == "csv" else [1.5, 2.0, None]
    assert refs["source"].to_pylist() == [
        {"title": row["title"], "price": price} for row, price in zip(ROWS, prices, strict=True)
    ]


def test_reading_a_manifests_images_records_those_that_are_missing(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"data")
    rows = [{"uri": "a.jpg"}, {"uri": "gone.jpg"}, {"uri": "ftp://host/x.jpg"}, {"uri": "s3://"}]
    path = write_manifest(tmp_path, "jsonl", rows)
    refs = references(path)
    fetched = open_source(SourceConfig(uri=str(path))).reader(ImageLimits()).read(refs)
    assert [item.error_class for item in fetched] == [
        None,
        RowErrorClass.MISSING,
        RowErrorClass.READ_FAILED,
        RowErrorClass.READ_FAILED,
    ]
    assert fetched[0].data == b"data"
    assert "ftp:// is not a store" in fetched[2].message


def test_a_row_that_names_no_place_costs_itself_alone(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"data")
    uris = ["x.jpg", "file://", "file://[a/no-such-file.jpg", "http://[bad/a.jpg"]
    path = write_manifest(tmp_path, "jsonl", [{"uri": uri} for uri in uris])
    refs = references(path)
    assert refs["uri"].to_pylist() == [str(tmp_path / "x.jpg"), "file://", "/no-such-file.jpg", "http://[bad/a.jpg"]
    fetched = open_source(SourceConfig(uri=str(path))).reader(ImageLimits()).read(refs)
    assert [item.error_class for item in fetched] == [
        None,
        RowErrorClass.READ_FAILED,
        RowErrorClass.MISSING,
        RowErrorClass.READ_FAILED,
    ]
    assert fetched[1].message == "the uri 'file://' names no place"


@pytest.mark.parametrize("extension", ["parquet", "csv", "jsonl"])
@pytest.mark.parametrize("option", ["uri_column", "key_column", "text_column"])
def test_a_column_that_is_missing_is_named_with_those_there_are(tmp_path: Path, extension: str, option: str) -> None:
    path = write_manifest(tmp_path, extension)
    with pytest.raises(SourceError, match=r"has no column link.*; it has .*title"):
        references(path, **{option: "link"})


def test_the_uri_column_may_have_another_name(tmp_path: Path) -> None:
    path = write_manifest(tmp_path, "csv", [{"uri": "x", "link": "s3x.jpg"}])
    refs = references(path, uri_column="link")
    assert refs["uri"].to_pylist() == [str(tmp_path / "s3x.jpg")]
    assert refs["source"].to_pylist() == [{"uri": "x"}]


def test_equal_rows_are_one_image(tmp_path: Path) -> None:
    rows = [
        {"uri": "https://h/a.jpg?X-Amz-Signature=1", "title": "t"},
        {"uri": "b.jpg", "title": "t"},
        {"uri": "https://h/a.jpg?X-Amz-Signature=2", "title": "t"},
    ]
    path = write_manifest(tmp_path, "jsonl", rows)
    refs = references(path)
    assert refs["uri"].to_pylist() == ["https://h/a.jpg", str(tmp_path / "b.jpg")]
    source = open_source(SourceConfig(uri=str(path)))
    assert sum(batch.num_rows for batch in source.list()) == 2
    assert source.num_repeated == 1
    assert refs["locator"].to_pylist()[0] == rows[0]["uri"], "the first row stands"


def test_rows_of_one_image_that_differ_stop_the_listing_with_examples(tmp_path: Path) -> None:
    rows = [{"uri": f"{index % 5}.jpg", "title": f"title {index}", "price": 1} for index in range(10)]
    source = open_source(SourceConfig(uri=str(write_manifest(tmp_path, "jsonl", rows))))
    with pytest.raises(SourceError, match=r"0\.jpg \(title: 'title 0' and 'title 5'\)") as caught:
        next(iter(source.list()))
    assert "2.jpg" in str(caught.value)
    assert "3.jpg" not in str(caught.value), "three examples are enough"
    assert "source.key_column" in caught.value.remedy


def test_a_key_tells_rows_of_one_uri_apart(tmp_path: Path) -> None:
    rows = [{"uri": "a.jpg", "sku": index, "title": f"{index}"} for index in range(3)]
    refs = references(write_manifest(tmp_path, "jsonl", rows), key_column="sku")
    assert refs["key"].to_pylist() == ["0", "1", "2"]
    assert len(set(refs["image_id"].to_pylist())) == 3
    assert [row["sku"] for row in refs["source"].to_pylist()] == [0, 1, 2], "the caller's column keeps its type"


def test_a_manifest_is_listed_and_read_where_an_event_loop_runs_already(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"data")
    path = write_manifest(tmp_path, "jsonl", [{"uri": "a.jpg"}])

    async def notebook() -> bytes | None:
        return open_source(SourceConfig(uri=str(path))).reader(ImageLimits()).read(references(path))[0].data

    assert asyncio.run(notebook()) == b"data"


def test_versions_of_the_manifest_are_those_of_urls_and_of_nothing_that_tells_its_own(tmp_path: Path) -> None:
    (tmp_path / "here.jpg").write_bytes(b"data")
    rows = [{"uri": uri, "etag": '"abc"'} for uri in ("https://h/a.jpg", "gone.jpg", "here.jpg")]
    refs = references(write_manifest(tmp_path, "jsonl", rows))
    url, gone, here = refs["object_version"].to_pylist()
    assert (url, gone) == ("abc", None)
    assert here.endswith("-4")


def test_a_row_without_a_uri_is_named(tmp_path: Path) -> None:
    path = write_manifest(tmp_path, "jsonl", [{"uri": "a.jpg"}, {"uri": " "}, {"title": "x"}])
    with pytest.raises(SourceError, match="row 2 has no uri"):
        references(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.csv", "", "list.csv is empty"),
        ("list.csv", "uri,title\na.jpg\n", "line 2: 1 fields, where the header has 2"),
        ("list.csv", "uri,uri\na.jpg,b.jpg\n", "has two columns uri"),
        ("list.jsonl", '{"uri": "a.jpg"}\n{"uri": \n', "line 2 is not JSON"),
        ("list.jsonl", '["a.jpg"]\n', "line 1 holds a list"),
        (
            "list.jsonl",
            '{"uri": "a", "x": 1}\n{"uri": "b", "x": "one"}\n',
            "line 2, column x: values do not fit",
        ),
        (
            "list.jsonl",
            f'{{"uri": "a"}}\n{{"uri": "b", "x": {1 << 80}}}\n',
            "2, column x: an integer has more than 64",
        ),
        ("list.jsonl", '{"uri": "a\\ud800.jpg"}\n', "line 1, column uri: a text holds half a character"),
        ("list.jsonl", f'{{"uri": "a", "x": {"[" * 5000}{"]" * 5000}}}\n', "line 1 is nested too deep"),
        ("list.jsonl", f'{{"uri": "a", "x": {"1" * 5000}}}\n', "line 1 holds a number of too many digits"),
        ("list.jsonl", '{"uri": ["a.jpg"]}\n', r"column uri \(list<.*>\) holds no texts"),
        ("list.jsonl", '{"uri": "a.jpg", "etag": ["x"]}\n', r"column etag \(list<.*>\) holds no texts"),
        ("list.parquet", "PAR1 but no more", "is not a Parquet file"),
    ],
)
def test_a_damaged_manifest_is_an_error_that_says_where(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(SourceError, match=message) as caught:
        references(path, kind="manifest")
    assert caught.value.remedy


@pytest.mark.parametrize("setting", ["key_column", "text_column"])
def test_a_key_or_a_text_that_is_none_is_named(tmp_path: Path, setting: str) -> None:
    path = write_manifest(tmp_path, "jsonl", [{"uri": "a.jpg", "x": {"y": 1}}])
    with pytest.raises(SourceError, match=r"column x \(struct<.*>\) holds no texts"):
        references(path, **{setting: "x"})


def test_numbers_that_no_type_holds_together_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmflow.sources.tables.BATCH_ROWS", 1)
    path = tmp_path / "list.jsonl"
    path.write_text(f'{{"uri": "a.jpg", "x": {2**53 + 1}}}\n{{"uri": "b.jpg", "x": 1.5}}\n', encoding="utf-8")
    with pytest.raises(SourceError, match="line 1, column x: values do not fit together"):
        references(path)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([b"\xff\xfe"]), r"column uri \(binary\) holds no texts in UTF-8"),
        (pa.array([b"\xff\xfe"]).view(pa.string()), r"column uri \(string\) does not become string: .*UTF8"),
        (pa.array([2**64 - 1], pa.uint64()), r"column uri \(uint64\) does not become int64"),
    ],
)
def test_values_of_a_parquet_manifest_that_cannot_be_kept_are_named(
    tmp_path: Path, column: pa.Array, message: str
) -> None:
    pq.write_table(pa.table({"uri": column}), tmp_path / "list.parquet")
    with pytest.raises(SourceError, match=message):
        references(tmp_path / "list.parquet")


def test_a_manifest_that_is_not_utf_8_is_an_error(tmp_path: Path) -> None:
    for name in ("list.csv", "list.jsonl"):
        (tmp_path / name).write_bytes(b'{"uri": "\xff\xfe"}\n{"uri": "\xff"}\n')
        with pytest.raises(SourceError):
            references(tmp_path / name, uri_column='{"uri": "\xff\xfe"}')


@pytest.mark.parametrize("extension", ["parquet", "csv", "jsonl"])
def test_a_manifest_of_no_rows_is_an_error_unless_allowed(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"list.{extension}"
    if extension == "parquet":
        pq.write_table(pa.table({"uri": pa.array([], pa.string())}), path)
    else:
        path.write_text("uri,title\n" if extension == "csv" else "")
    if extension == "jsonl":
        with pytest.raises(SourceError, match="has no column uri; it has none"):
            references(path)
        return
    with pytest.raises(EmptySourceError, match="holds no images"):
        references(path)
    assert references(path, allow_empty=True).num_rows == 0


def test_a_manifest_that_is_not_there_is_named(tmp_path: Path) -> None:
    for name in ("gone.csv", "gone.jsonl", "gone.parquet"):
        with pytest.raises(SourceError, match=f"{name} does not exist"):
            references(tmp_path / name)


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ('a.jpg,"5 inches\nb.jpg,x\nc.jpg,y\n', 2),
        ('a.jpg,"two\nlines"\nb.jpg,"5 inches\nc.jpg,"y"\nd.jpg,z\n', 4),
    ],
)
def test_a_quote_that_is_not_closed_takes_no_row_for_a_text(tmp_path: Path, rows: str, line: int) -> None:
    (tmp_path / "list.csv").write_text(f"uri,title\n{rows}", newline="")
    with pytest.raises(SourceError, match=rf"list\.csv, line {line}: a quote is not closed"):
        references(tmp_path / "list.csv")


def test_csv_fields_with_commas_quotes_and_lines_stay_whole(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_bytes('\ufeffuri,title,code\na.jpg,"one, ""two""\nthree",007\nb.jpg,,\n'.encode())
    assert references(path)["source"].to_pylist() == [
        {"title": 'one, "two"\nthree', "code": "007"},
        {"title": None, "code": None},
    ]


def test_types_that_a_catalog_does_not_know_become_those_it_does(tmp_path: Path) -> None:
    columns = {
        "uri": pa.array(["a.jpg"], pa.large_string()),
        "category": pa.array(["x"]).dictionary_encode(),
        "count": pa.array([7], pa.uint32()),
        "seen": pa.array([1_700_000_000_123_456_789], pa.timestamp("ns", "UTC")),
        "tags": pa.array([["t"]], pa.large_list(pa.large_string())),
        "half": pa.array([0.5], pa.float16()),
        "nothing": pa.nulls(1),
    }
    path = tmp_path / "list.parquet"
    pq.write_table(pa.table(columns), path)
    types = {field.name: field.type for field in open_source(SourceConfig(uri=str(path))).columns}
    assert types == {
        "category": pa.string(),
        "count": pa.int64(),
        "seen": pa.timestamp("us", "UTC"),
        "tags": pa.list_(pa.string()),
        "half": pa.float32(),
        "nothing": pa.null(),
    }
    (row,) = references(path)["source"]
    assert row["category"].as_py() == "x"
    assert row["seen"].value == 1_700_000_000_123_456, "what is below a microsecond is dropped"


def test_a_jsonl_column_is_wide_enough_for_all_its_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmflow.sources.tables.BATCH_ROWS", 2)
    rows = [{"uri": "a"}, {"uri": "b", "x": None}, {"uri": "c", "x": 1}, {"uri": "d"}, {"uri": "e", "x": 1.5, "y": "z"}]
    refs = references(write_manifest(tmp_path, "jsonl", rows))
    assert refs["source"].to_pylist() == [
        {"x": None, "y": None},
        {"x": None, "y": None},
        {"x": 1.0, "y": None},
        {"x": None, "y": None},
        {"x": 1.5, "y": "z"},
    ]


def test_a_long_manifest_streams(tmp_path: Path) -> None:
    num_rows = 100_000
    path = tmp_path / "list.parquet"
    uris = pa.array([f"https://host/{index % 99_990:07}.jpg" for index in range(num_rows)])
    pq.write_table(pa.table({"uri": uris, "title": pa.array(["a title of some length"] * num_rows)}), path)
    source = open_source(SourceConfig(uri=str(path)))
    gc.collect()
    before_arrow = pa.total_allocated_bytes()
    tracemalloc.start()
    listed, arrow_peak = 0, 0
    for batch in source.list():
        listed += batch.num_rows
        assert batch.num_rows <= 1_000
        arrow_peak = max(arrow_peak, pa.total_allocated_bytes() - before_arrow)
    python_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert listed == 99_990
    assert python_peak < 20_000_000, "rows as Python objects would take some 50 MB"
    assert arrow_peak < 40_000_000


@pytest.mark.parametrize("extension", ["parquet", "jsonl"])
def test_questions_are_lists_or_texts_with_one_a_line(tmp_path: Path, extension: str) -> None:
    lists = [["who?", " what? "], None, ["", "  "]]
    rows = [{"uri": f"{index}.jpg", "ask": asked} for index, asked in enumerate(lists)]
    refs = references(write_manifest(tmp_path, extension, rows), questions_column="ask")
    assert refs["questions"].to_pylist() == [["who?", "what?"], None, None]
    texts = [{"uri": "a.jpg", "ask": "who?\n\n what?"}, {"uri": "b.jpg", "ask": None}, {"uri": "c.jpg", "ask": " "}]
    refs = references(write_manifest(tmp_path, extension, texts), questions_column="ask")
    assert refs["questions"].to_pylist() == [["who?", "what?"], None, None]
    assert references(write_manifest(tmp_path, extension, rows))["questions"].null_count == 3


def test_a_column_of_questions_that_holds_numbers_is_refused(tmp_path: Path) -> None:
    path = write_manifest(tmp_path, "parquet", [{"uri": "a.jpg", "ask": 5}])
    with pytest.raises(SourceError, match="column ask is int64"):
        references(path, questions_column="ask")


@pytest.mark.parametrize("setting", ["key_column", "text_column", "questions_column", "found_text_column"])
def test_a_folder_has_no_columns_to_take_questions_or_text_from(tmp_path: Path, setting: str) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    source = open_source(SourceConfig.model_validate({"uri": str(tmp_path), setting: "ask"}))
    with pytest.raises(SourceError, match=rf"source\.{setting}: a folder of images has no columns"):
        source.columns  # noqa: B018
