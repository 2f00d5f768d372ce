"""`source.columns`: which of the caller's columns rows keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from tests.unit.sources.test_manifest import references, write_manifest
from tests.unit.sources.test_parquet_and_webdataset import SHARD, write_tar
from vlmflow.config import SourceConfig
from vlmflow.errors import SourceError
from vlmflow.sources import open_source

ROWS = [
    {"uri": "a.jpg", "id": "1", "title": "first", "exported": "monday"},
    {"uri": "b.jpg", "id": "2", "title": "second", "exported": "tuesday"},
]


@pytest.mark.parametrize("extension", ["parquet", "csv", "jsonl"])
def test_rows_keep_the_columns_named_and_use_what_else_is_named(tmp_path: Path, extension: str) -> None:
    path = write_manifest(tmp_path, extension, ROWS)
    refs = references(path, columns=("title",), key_column="id", text_column="exported")
    assert refs["source"].to_pylist() == [{"title": "first"}, {"title": "second"}]
    assert refs["key"].to_pylist() == ["1", "2"]
    assert refs["text"].to_pylist() == ["monday", "tuesday"]
    assert "source" not in references(path, columns=()).column_names


def test_rows_of_one_image_may_differ_in_what_is_not_kept(tmp_path: Path) -> None:
    path = write_manifest(tmp_path, "csv", [ROWS[0], ROWS[0] | {"exported": "tuesday"}])
    assert references(path, columns=("title",)).num_rows == 1
    with pytest.raises(SourceError, match="differ in other columns"):
        references(path)


def test_a_column_that_no_catalog_could_keep_is_no_hindrance_once_it_is_left_out(tmp_path: Path) -> None:
    exotic = pa.table({"uri": ["a.jpg"], "title": ["first"], "length": pa.array([5], pa.duration("s"))})
    pq.write_table(exotic, path := tmp_path / "list.parquet")
    with pytest.raises(SourceError, match="column length has the type duration"):
        references(path)
    assert references(path, columns=("title",))["source"].to_pylist() == [{"title": "first"}]
    with pytest.raises(SourceError, match="column length has the type duration"):
        references(path, columns=("title", "length"))


def test_values_that_no_catalog_could_keep_are_no_hindrance_once_they_are_left_out(tmp_path: Path) -> None:
    broken = pa.array([b"\xff\xfe"]).view(pa.string())
    table = pa.table({"uri": ["http://h/a.jpg"], "title": ["first"], "etag": ["v1"], "note": broken})
    pq.write_table(table, path := tmp_path / "list.parquet")
    with pytest.raises(SourceError, match="column note"):
        references(path)
    (row,) = references(path, columns=("title",), text_column="title").to_pylist()
    assert (row["source"], row["text"], row["object_version"]) == ({"title": "first"}, "first", "v1")
    assert "source" not in references(path, columns=()).column_names
    with pytest.raises(SourceError, match="column note"):
        references(path, columns=("title",), text_column="note")
    with pytest.raises(SourceError, match="it has uri, title, etag, note"):
        references(path, columns=("titel",))


def test_files_of_image_bytes_keep_the_columns_named(tmp_path: Path) -> None:
    lengths = pa.array([5, 6], pa.duration("s"))
    table = pa.table({"image": [b"x", b"y"], "id": [1, 2], "title": ["one", "two"], "length": lengths})
    pq.write_table(table, path := tmp_path / "a.parquet")
    options: dict[str, Any] = {"kind": "parquet", "key_column": "id"}
    refs = references(path, columns=("title",), **options)
    assert refs["source"].to_pylist() == [{"title": "one"}, {"title": "two"}]
    assert refs["key"].to_pylist() == ["1", "2"]
    assert "source" not in references(path, columns=(), **options).column_names
    with pytest.raises(SourceError, match=r"has no column titel; it has .*title"):
        references(path, columns=("titel",), **options)


def test_shards_keep_the_members_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", SHARD)
    refs = references(path, columns=("cls",))
    assert refs["source"].to_pylist()[:3] == [{"cls": None}, {"cls": "7"}, {"cls": "7"}]
    assert refs["text"][0].as_py() == "a caption"
    assert "source" not in references(path, columns=()).column_names


@pytest.mark.parametrize("extension", ["parquet", "csv"])
def test_a_column_that_is_not_there_is_named(tmp_path: Path, extension: str) -> None:
    path = write_manifest(tmp_path, extension, ROWS)
    with pytest.raises(SourceError, match=r"has no column titel; it has uri, id, title, exported") as caught:
        references(path, columns=("titel",))
    assert "source.columns" in str(caught.value.remedy)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    with pytest.raises(SourceError, match=r"source\.columns: a folder of images has no columns"):
        open_source(SourceConfig(uri=str(tmp_path), columns=("title",))).columns  # noqa: B018
    with pytest.raises(ValidationError, match="add it to columns"):
        SourceConfig(uri=str(tmp_path), columns=("title",), found_text_column="sign")
