"""How compaction reads and writes: some files at a time, and no more rows in memory than it needs."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.catalog_samples import enrich, open_catalog, references
from vlmflow.catalog import Catalog, writer
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.log import file_stats

NUM_FILES, NUM_ROWS = 8, 3


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    """One with small files of one date."""
    catalog = open_catalog(tmp_path / "catalog")
    for number in range(NUM_FILES):
        enrich(catalog, f"r{number}", [references(f"{number}-{row}" for row in range(NUM_ROWS))])
    return catalog


def test_small_files_are_read_some_at_a_time_and_stay_in_order(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [row["uri"] for row in catalog.images(["uri", "ingest_date"]).to_pylist()]
    together, read = threading.Barrier(NUM_FILES // 2, timeout=30), Folder.read_parquet

    def read_beside_others(self: Folder, path: str, columns: Sequence[str] | None = None) -> pa.Table:
        if columns is None:
            together.wait()
        return read(self, path, columns)

    monkeypatch.setattr(Folder, "read_parquet", read_beside_others)
    assert catalog.compact("r9").num_files_after == 2
    monkeypatch.undo()
    assert [row["uri"] for row in catalog.images(["uri"]).to_pylist()] == sorted(before)


def test_rows_of_several_files_fill_row_groups_and_are_let_go_of(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = catalog.images()
    monkeypatch.setattr(writer, "_IMAGE_OPTIONS", {"row_group_size": 5})
    catalog.compact("r9")
    (file,) = catalog.live_files("images").values()
    groups = pq.ParquetFile(Path(catalog.uri, "images", file.path)).metadata
    assert [groups.row_group(number).num_rows for number in range(groups.num_row_groups)] == [5, 5, 5, 5, 4]
    assert catalog.images().sort_by("uri").equals(rows.sort_by("uri"))
    parts = iter([rows.slice(start, 7) for start in range(0, rows.num_rows, 7)])
    written = writer.write_joined(catalog._folder, "images", parts, file.ingest_date, "r9")
    assert (written.num_rows, written.stats) == (rows.num_rows, file_stats("images", rows))
