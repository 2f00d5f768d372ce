"""A source of another kind than was said: the error says what is there, and what to do."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlmflow.config import SourceConfig
from vlmflow.errors import EmptySourceError, SourceError
from vlmflow.sources import open_source


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("manifest", r"photos holds no \.parquet, \.csv, \.jsonl, \.ndjson, \.json files"),
        ("webdataset", r"photos holds no \.tar files"),
        ("parquet", r"photos holds no \.parquet files"),
    ],
)
def test_a_folder_of_images(kind: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").write_bytes(b"x")
    config = SourceConfig.model_validate({"uri": str(tmp_path / "photos"), "kind": kind})
    with pytest.raises(SourceError, match=told) as caught:
        list(open_source(config).list())
    assert "leave source.kind out" in caught.value.remedy
    assert isinstance(caught.value, EmptySourceError)


@pytest.mark.parametrize("divider", [";", "\t", "|"])
def test_a_csv_file_that_other_signs_divide(divider: str, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(f"uri{divider}title\na.jpg{divider}x\n")
    with pytest.raises(SourceError, match="has no column uri; it has uri") as caught:
        list(open_source(SourceConfig(uri=str(tmp_path / "list.csv"))).list())
    assert "with commas" in caught.value.remedy
    (tmp_path / "list.csv").write_text("picture\na.jpg\n")
    with pytest.raises(SourceError, match="it has picture") as caught:
        list(open_source(SourceConfig(uri=str(tmp_path / "list.csv"))).list())
    assert "source.uri_column" in caught.value.remedy


def test_a_parquet_file_with_neither_column_is_told_of_both(tmp_path: Path) -> None:
    """Of images in a column that is not the one named, a remedy for addresses alone would mislead."""
    path = tmp_path / "images.parquet"
    pq.write_table(pa.table({"picture": [b"x"]}), path)
    config = SourceConfig(uri=str(path), bytes_column="pictrue")
    with pytest.raises(SourceError, match="no column uri, and none pictrue of image bytes; it has picture") as caught:
        list(open_source(config).list())
    assert "source.bytes_column" in caught.value.remedy
