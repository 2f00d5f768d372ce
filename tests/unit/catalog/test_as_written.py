"""Columns and lists in a table's file that vlmflow would not have written: other programs did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from vlmflow import schema
from vlmflow.catalog.as_written import as_written
from vlmflow.catalog.folder import Folder
from vlmflow.config import CatalogConfig
from vlmflow.errors import CatalogError

ANSWERS = schema.IMAGES.field("answers").type
LABELS = schema.IMAGES.field("labels").type


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(CatalogConfig(uri=str(tmp_path)))


def column(name: str, values: list[Any], kind: pa.DataType) -> pa.Table:
    return pa.table({name: pa.array(values, kind)})


def test_items_of_lists_that_say_nothing_are_left_out_and_all_else_stays(folder: Folder) -> None:
    whole = {"question": "a dog?", "answer": None, "score": None}
    nameless = {"question": None, "answer": "yes", "score": 1.0}
    lists = [[whole], None, [None], [nameless, whole, None, whole], [], [whole]]
    rows = column("answers", lists, ANSWERS)
    found = as_written(pa.concat_tables([rows.slice(1), rows]), folder, "images/a.parquet")["answers"]
    expected = [[whole], None, [], [whole, whole], [], [whole]]
    assert found.to_pylist() == [*expected[1:], *expected]
    assert found.type == ANSWERS


def test_a_label_needs_its_name_and_its_decision(folder: Folder) -> None:
    label = {field.name: None for field in LABELS.value_type} | {"category": "a", "label": "b", "decision": "allow"}
    lists = [[label], *([label | {name: None}] for name in ("category", "label", "decision"))]
    found = as_written(column("labels", lists, LABELS), folder, "images/a.parquet")["labels"]
    assert found.to_pylist() == [[label], [], [], []]


@pytest.mark.parametrize(
    ("table", "name", "kind"),
    [
        ("images", "decision", pa.int64()),
        ("images", "labels", pa.string()),
        ("images", "answers", pa.list_(pa.string())),
        ("images", "errors", pa.list_(pa.struct([("class", pa.int8())]))),
        ("images", "updated_at", pa.string()),
        ("embeddings", "vector", pa.string()),
        ("embeddings", "vector", pa.list_(pa.string())),
    ],
)
def test_a_column_of_another_type_is_named(folder: Folder, table: str, name: str, kind: pa.DataType) -> None:
    with pytest.raises(CatalogError, match=rf"{table}/a.parquet has {name} as .*, not ") as told:
        as_written(column(name, [None], kind), folder, f"{table}/a.parquet")
    assert "write the column again" in told.value.remedy


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("width", pa.int64()),
        ("caption_itm", pa.float64()),
        ("updated_at", pa.timestamp("ns")),
        ("caption", pa.null()),
        ("labels", pa.list_(pa.null())),
        ("answers", pa.list_(pa.struct([("question", pa.string())]))),
        ("of_others", pa.decimal128(5, 2)),
    ],
)
def test_what_means_the_same_or_is_not_ours_is_read(folder: Folder, name: str, kind: pa.DataType) -> None:
    rows = column(name, [None], kind)
    assert as_written(rows, folder, "images/a.parquet").equals(rows)
