"""What the writer puts into files, and says about them."""

from __future__ import annotations

import datetime as dt
import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.catalog_samples import DATE, constants, enrich, finish, image_id, open_catalog, references, request
from vlmflow import schema
from vlmflow.catalog import Catalog
from vlmflow.errors import CatalogError

NAMES = [f"image {number}" for number in range(5)]


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return open_catalog(tmp_path / "catalog")


def finished(catalog: Catalog, names: list[str], asked_date: dt.date = DATE, **given: Any) -> pa.Table:
    version = given.pop("version", "v1")
    with catalog.plan([references(names, version=version)], request(date=asked_date)) as plan:
        return pa.concat_tables([finish(rows, **given) for rows in plan.batches()])


def described(files: pa.Table) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["table"], row["kind"]): row for row in files.to_pylist()}


def _columns(catalog: Catalog, file: dict[str, Any]) -> dict[str, pq.ColumnChunkMetaData]:
    group = pq.ParquetFile(Path(catalog.uri, file["path"])).metadata.row_group(0)
    return {group.column(number).path_in_schema: group.column(number) for number in range(group.num_columns)}


def test_new_rows_and_their_vectors_become_a_file_of_each_table(catalog: Catalog) -> None:
    files = catalog.writer(constants("r1", request()), catalog.version).write(finished(catalog, NAMES))
    assert files.schema == schema.DESCRIPTOR
    images, embeddings = (described(files)[table, "add"] for table in ("images", "embeddings"))
    assert images["path"].startswith("images/ingest_date=2026-03-01/")
    assert images["keys"] == [bytes.fromhex(image_id(name)) for name in NAMES]
    assert (images["num_rows"], embeddings["num_rows"], len(embeddings["keys"])) == (5, 10, 10)
    assert images["statuses"] == [{"name": "ok", "count": 5}]
    assert images["errors"] == []
    for row in (images, embeddings):
        assert Path(catalog.uri, row["path"]).stat().st_size == row["size_bytes"]
    stats = json.loads(images["stats"])
    assert stats["numRecords"] == 5
    assert set(stats["minValues"]) <= {"image_id", "size_bytes", "width", "height", "attempts"}
    assert catalog.images().num_rows == 0  # not before the commit


def test_vectors_are_stored_plain_and_without_dictionaries(catalog: Catalog) -> None:
    files = catalog.writer(constants("r1", request()), catalog.version).write(finished(catalog, NAMES))
    columns = _columns(catalog, described(files)["embeddings", "add"])
    assert not columns["vector.list.element"].has_dictionary_page
    assert "ingest_date" not in columns


def test_files_have_encodings_that_spark_3_reads(catalog: Catalog) -> None:
    files = catalog.writer(constants("r1", request()), catalog.version).write(finished(catalog, NAMES))
    for table in ("images", "embeddings"):
        columns = _columns(catalog, described(files)[table, "add"]).values()
        assert {column.compression for column in columns} == {"ZSTD"}
        assert {name for column in columns for name in column.encodings} <= {"PLAIN", "RLE", "RLE_DICTIONARY"}


def test_replacements_are_staged_outside_the_table_until_they_are_merged(catalog: Catalog) -> None:
    enrich(catalog, "r1", [references(NAMES[:3])])
    rows = finished(catalog, NAMES, version="v2", content="new")
    files = catalog.writer(constants("r2", request()), catalog.version).write(rows)
    staged = described(files)["images", "replace"]
    assert staged["path"].startswith("staging/r2/")
    assert (staged["num_rows"], described(files)["images", "add"]["num_rows"]) == (3, 2)
    assert catalog.commit("r2", files).num_replaced == 3
    assert not list(Path(catalog.uri, "staging").rglob("*.parquet"))


def test_rows_of_several_dates_go_to_their_partitions(catalog: Catalog) -> None:
    next_day = DATE + dt.timedelta(days=1)
    rows = pa.concat_tables([finished(catalog, NAMES[:2]), finished(catalog, NAMES[2:], next_day)])
    files = catalog.writer(constants("r1", request()), catalog.version).write(rows)
    assert Counter(files["ingest_date"].to_pylist()) == {DATE: 2, next_day: 2}
    catalog.commit("r1", files)
    dates = Counter(catalog.images(["ingest_date"])["ingest_date"].to_pylist())
    assert dates == {DATE: 2, next_day: 3}


def test_a_batch_without_rows_writes_nothing(catalog: Catalog) -> None:
    writer = catalog.writer(constants("r1", request()), catalog.version)
    assert writer.write(pa.table({})).equals(schema.DESCRIPTOR.empty_table())
    rows = finished(catalog, NAMES)
    assert writer.write(rows.slice(0, 0)).num_rows == 0
    assert not catalog.commit("r1", schema.DESCRIPTOR.empty_table()).statuses


def test_rows_that_lack_columns_are_refused_by_name(catalog: Catalog) -> None:
    rows = finished(catalog, NAMES).drop_columns(["tasks_run", "content_hash"])
    with pytest.raises(CatalogError, match="lack the columns content_hash, tasks_run"):
        catalog.writer(constants("r1", request()), catalog.version).write(rows)


def test_images_without_vectors_have_no_embeddings_file(catalog: Catalog) -> None:
    writer = catalog.writer(constants("r1", request()), catalog.version)
    rows = finished(catalog, NAMES, problem=("decode", "truncated"))
    files = writer.write(rows.drop_columns(["vectors", "vector_views"]))
    (row,) = files.to_pylist()
    assert row["statuses"] == [{"name": "unreadable", "count": 5}]
    assert row["errors"] == [{"name": "truncated", "count": 5}]


def test_a_writer_works_after_pickling(catalog: Catalog) -> None:
    writer = catalog.writer(constants("r1", request()), catalog.version)
    writer.write(finished(catalog, NAMES[:1]))  # its store is open now
    files = pickle.loads(pickle.dumps(writer)).write(finished(catalog, NAMES))
    assert catalog.commit("r1", files).num_added == 5


def test_chunked_and_sliced_batches_are_written_like_whole_ones(catalog: Catalog) -> None:
    writer = catalog.writer(constants("r1", request()), catalog.version)
    rows = finished(catalog, NAMES)
    pieces = pa.concat_tables([rows.slice(0, 2), rows.slice(2, 3)]).slice(1, 3)
    catalog.commit("r1", writer.write(pieces))
    assert catalog.images().sort_by("uri")["uri"].to_pylist() == [f"mem://{name}" for name in NAMES[1:4]]
    assert catalog.embeddings().num_rows == 6
