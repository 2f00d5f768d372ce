"""Callers' texts of any length: a column of them is longer than one array of Arrow's may be, and than memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.catalog_samples import enrich, image_id, open_catalog, references, request, rows_by_name
from vlmflow.catalog import columns as columns_module
from vlmflow.catalog import plan as plan_module
from vlmflow.catalog.columns import taken
from vlmflow.catalog.outdated import count_by_column, find_outdated, update_columns
from vlmflow.catalog.plan import plan_without_catalog
from vlmflow.catalog.spill import Spill

BODY = pa.field("body", pa.string())
SOURCE = pa.field("source", pa.struct([BODY]))


def long_texts() -> pa.ChunkedArray:
    """2,176 values of 1 MiB: more than one array holds. All chunks share their memory."""
    texts = pa.array(["x" * (1 << 20)] * 64)
    return pa.chunked_array([pa.StructArray.from_arrays([texts], fields=[BODY])] * 34)


def test_rows_are_taken_of_columns_longer_than_an_array_may_be() -> None:
    rows = pa.table({"number": np.arange(34 * 64), "source": long_texts()})
    at = np.array([2175, 3, 2000, 4])
    found = taken(rows, at)
    assert found["number"].to_pylist() == at.tolist()
    assert {len(value["body"]) for value in found["source"].to_pylist()} == {1 << 20}


@pytest.mark.parametrize("most", [1, 1 << 30])
def test_rows_come_in_the_order_asked_for_in_however_many_pieces(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns_module, "_JOINED_BYTES", 0)
    monkeypatch.setattr(columns_module, "_PIECE_BYTES", 700)
    monkeypatch.setattr(columns_module, "_MOST_BYTES", most)
    whole = pa.table({"number": np.arange(100), "text": [str(number) * (number % 7) for number in range(100)]})
    rows = pa.concat_tables([whole.slice(start, 9) for start in range(0, 100, 9)])
    at = np.random.default_rng(0).permutation(100)[:60]
    assert taken(rows, at).equals(whole.take(pa.array(at)))
    assert taken(rows, at[:0]).num_rows == 0
    assert taken(whole.slice(0, 0), at[:0]).equals(whole.slice(0, 0))


def test_what_is_put_aside_goes_to_the_disk_by_its_size_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmflow.catalog.spill._BUFFERED_BYTES", 4096)
    monkeypatch.setattr("vlmflow.catalog.spill._BATCH_BYTES", 1024)
    rows = pa.table({"text": [str(number) * 500 for number in range(8)]})
    spill = Spill(tmp_path / "spill", rows.schema, 2)
    for number in range(8):
        spill.append(rows.slice(number, 1), np.array([number % 2]))
        assert spill._bytes_pending < 4096
    spill.close()
    assert spill.num_bytes == rows.nbytes
    assert [spill.read(part)["text"].to_pylist() for part in (0, 1)] == [
        rows["text"].to_pylist()[part::2] for part in (0, 1)
    ]


def test_long_texts_are_ordered_in_more_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "_BYTES_PER_GROUP", 2000)
    names = [f"image {number}" for number in range(20)]
    listed = references(names, source=[{"body": name * 50} for name in names], source_type=SOURCE.type)
    with plan_without_catalog([listed], request()) as plan:
        rows = pa.concat_tables(plan.batches())
        assert plan._groups[0].num_parts > 3
    assert rows["source"].to_pylist() == listed["source"].to_pylist()


def test_outdated_rows_are_found_among_long_texts() -> None:
    images = pa.table({"source": long_texts()})
    asked = np.isin(np.arange(images.num_rows), [5, 1000, 2175])
    held = pa.table({"source": pa.array([{"body": "old"}, {"body": "x" * (1 << 20)}], SOURCE.type)})
    at = np.where(np.arange(images.num_rows) == 1000, 1, 0)
    found = list(find_outdated(images, held, at, asked, SOURCE, np.zeros_like(asked)))
    assert np.concatenate([numbers for numbers, _ in found]).tolist() == [5, 2175]
    values = pa.concat_tables([values for _, values in found])
    assert [value["body"] for value in values["previous"].to_pylist()] == ["old", "old"]
    assert count_by_column(values) == {"body": 2}


def test_a_group_of_outdated_rows_may_hold_more_text_than_an_array(tmp_path: Path) -> None:
    catalog = open_catalog(tmp_path / "catalog", pa.schema([BODY]))
    enrich(catalog, "r1", [references(["a", "b"], source=[{"body": "old"}] * 2)])
    (path,) = catalog.live_files("images")
    texts = long_texts()
    names = ["a", *(f"gone {number}" for number in range(1, len(texts)))]
    group = pa.table(
        {
            "image_id": [image_id(name) for name in names],
            "source": texts,
            "previous": pa.array([{"body": "old"}] * len(texts), SOURCE.type),
            "live_file": [path, *["gone.parquet"] * (len(texts) - 1)],
        }
    )
    added = catalog._added_since(catalog.version)
    assert list(update_columns(catalog._images, added, "r2", [group])) == [(len(texts), 1)]
    rows = rows_by_name(catalog)
    assert (len(rows["a"]["source"]["body"]), rows["b"]["source"]["body"]) == (1 << 20, "old")
