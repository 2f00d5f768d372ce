"""Writes rows as Parquet files, in workers. Readers of the tables do not see them before the driver's commit."""

from __future__ import annotations

import datetime as dt
import re
import uuid
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from vlmflow import schema
from vlmflow.catalog.columns import conform, flat
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.keys import to_binary
from vlmflow.catalog.log import STATS_COLUMNS, DataFile, TableName, file_stats
from vlmflow.catalog.masks import holds
from vlmflow.catalog.rows import RunConstants, error_classes, stage_rows
from vlmflow.catalog.tombstones import keyed_addresses
from vlmflow.errors import CatalogError
from vlmflow.imaging.frames import split_views

STAGING = "staging"  # STAGING/<run>/: rows that replace live ones, until the commit has merged them
_OUR_FILE = re.compile(
    r"(?:images|embeddings)/ingest_date=\d{4}-\d\d-\d\d/(?P<run>.+)-[0-9a-f]{32}\.parquet"
    rf"|{STAGING}/(?P<staging>[^/]+)/[0-9a-f]{{32}}\.parquet"
)

# Floats do not repeat, so dictionaries cost time and give nothing: 200,000 x 768 take 7.0 s and 600 MB with them, 4.5 s
# and 570 MB plain. BYTE_STREAM_SPLIT would make it 521 MB, but the vectorized reader of Spark 3.5 does not know it (of
# 4.3 it does). The other columns repeat much.
_EMBEDDING_OPTIONS: dict[str, Any] = {
    "use_dictionary": ["image_id", "object_version", "view", "embed_fingerprint", "embed_run_id"],
    "column_encoding": {"vector.list.element": "PLAIN"},
    "write_statistics": ["image_id"],
    "row_group_size": 4_096,
}
# Single rows are read too (see known.py): of a file their row groups alone.
_IMAGE_OPTIONS: dict[str, Any] = {"row_group_size": 16_384}


class CatalogWriter:
    """Writes what the pipeline found out. Picklable; opens its store on first use, in the worker.

    Args:
        columns: the schema of the images table.
        versions: version of each table when the run was planned.
    """

    def __init__(
        self, folder: Folder, columns: pa.Schema, constants: RunConstants, versions: dict[TableName, int]
    ) -> None:
        self._folder = folder
        self._columns = columns
        self._constants = constants
        self._versions = versions

    def write(self, rows: pa.Table) -> pa.Table:
        """Writes one batch of finished images.

        Args:
            rows: one per image: REFERENCE, PLANNED, FACTS, OUTCOME, and what the tasks wrote
                (:data:`schema.WRITER_OPTIONAL`). Other columns are left alone.

        Returns:
            One row of :data:`schema.DESCRIPTOR` per file written; none for a batch without rows.

        Raises:
            CatalogError: a column is missing.
        """
        if rows.num_rows == 0:
            return schema.DESCRIPTOR.empty_table()  # such a block may come without its columns
        _check_columns(rows)
        staged = stage_rows(rows, self._constants, self._columns)
        replaces = pc.fill_null(rows["replaces"], False)
        written = []
        for date, mask in _by_date(rows["ingest_date"]):
            new = staged.filter(pc.and_(mask, pc.invert(replaces)))
            if new.num_rows:
                written.append(self._write_new(new, date))
            embeddings = _embeddings(rows.filter(mask), self._constants)
            if embeddings.num_rows:
                written.append(self._write_embeddings(embeddings, date))
        again = staged.filter(replaces)
        if again.num_rows:
            written.append(self._write_staged(again))
        return pa.concat_tables(written)

    def _write_new(self, staged: pa.Table, date: dt.date) -> pa.Table:
        rows = staged.select(self._columns.names)
        file = write_file(self._folder, "images", rows, date, self._constants.run_id)
        return self._describe("images", "add", file, staged, date)

    def _write_embeddings(self, rows: pa.Table, date: dt.date) -> pa.Table:
        file = write_file(self._folder, "embeddings", rows, date, self._constants.run_id)
        return self._describe("embeddings", "add", file, rows, date)

    def _write_staged(self, staged: pa.Table) -> pa.Table:
        path = f"{STAGING}/{self._constants.run_id}/{uuid.uuid4().hex}.parquet"
        size = self._folder.write_parquet(path, staged)
        file = DataFile(path, size, staged.num_rows, dt.date.min)
        return self._describe("images", "replace", file, staged, None)

    def _describe(self, table: TableName, kind: str, file: DataFile, rows: pa.Table, date: dt.date | None) -> pa.Table:
        images = table == "images"
        values: dict[str, object] = {
            "table": table,
            "kind": kind,
            "path": file.path if kind == "replace" else f"{table}/{file.path}",
            "num_rows": file.num_rows,
            "size_bytes": file.size_bytes,
            "ingest_date": date,
            "stats": file.stats or None,
            "plan_version": self._versions[table],
            "statuses": _counts(rows["status"]) if images else [],
            "errors": _counts(error_classes(rows["errors"])[1]) if images else [],
        }
        keyed = images and rows["key"].null_count < rows.num_rows
        lists = {
            "keys": to_binary(rows["image_id"]),
            "addresses": keyed_addresses(rows) if keyed else pa.array([], schema.KEY),
        }
        columns = [
            pa.ListArray.from_arrays(pa.array([0, len(held)], pa.int32()), held, type=field.type)
            if (held := lists.get(field.name)) is not None
            else pa.array([values[field.name]], field.type)
            for field in schema.DESCRIPTOR
        ]
        return pa.table(columns, schema=schema.DESCRIPTOR)


def write_file(folder: Folder, table: TableName, rows: pa.Table, date: dt.date, run_id: str) -> DataFile:
    """Writes one Parquet file of a table, not yet visible to readers.

    Args:
        rows: columns of the table; the partition's own column stays out of the file, its name is in the path.
        run_id: of the run that writes; it stands in the name, so that a vacuum knows whose file it is.
    """
    return write_joined(folder, table, iter([rows]), date, run_id)


def write_joined(folder: Folder, table: TableName, parts: Iterator[pa.Table], date: dt.date, run_id: str) -> DataFile:
    """As :func:`write_file`, of rows that come piece by piece, at least one: no more are held than a row group has."""
    path = f"ingest_date={date.isoformat()}/{run_id}-{uuid.uuid4().hex}.parquet"
    options = _EMBEDDING_OPTIONS if table == "embeddings" else _IMAGE_OPTIONS
    told: list[pa.Table] = []

    def groups() -> Iterator[pa.Table]:
        for rows in _whole_groups(parts, options["row_group_size"]):
            told.append(rows.select(STATS_COLUMNS[table]))
            yield rows.drop_columns("ingest_date") if "ingest_date" in rows.column_names else rows

    size = folder.write_parquet(f"{table}/{path}", groups(), **options)
    rows = pa.concat_tables(told)
    return DataFile(path, size, rows.num_rows, date, file_stats(table, rows))


def _whole_groups(parts: Iterator[pa.Table], num_rows: int) -> Iterator[pa.Table]:
    """Tables put together so that the rows of each but the last fill row groups."""
    waiting = [next(parts)]
    for part in parts:
        if sum(rows.num_rows for rows in waiting) >= num_rows:
            rows = pa.concat_tables(waiting)
            end = rows.num_rows - rows.num_rows % num_rows
            yield rows.slice(0, end)
            waiting = [rows.slice(end)]
        waiting.append(part)
    yield pa.concat_tables(waiting)


def writer_of(path: str) -> str | None:
    """The run that wrote a file of a table or staged rows, by its path in the catalog; None: it is none of ours."""
    match = _OUR_FILE.fullmatch(path)
    return match and (match["run"] or match["staging"])


def _embeddings(rows: pa.Table, constants: RunConstants) -> pa.Table:
    """One row per image and view, of the images that were embedded."""
    if "vectors" not in rows.column_names:
        return schema.EMBEDDINGS.empty_table()
    rows = rows.filter(pa.array(holds(rows["tasks_run"], "embed")))
    if not rows.num_rows:
        return schema.EMBEDDINGS.empty_table()
    vectors, views = flat(rows["vectors"]), flat(rows["vector_views"])
    if not pc.all(pc.equal(pc.list_value_length(vectors), pc.list_value_length(views))).as_py():
        raise CatalogError("vectors and vector_views differ in length")
    parents = pc.list_parent_indices(vectors)
    count = len(parents)
    names, times = split_views(pc.list_flatten(views))
    table = pa.table(
        {
            "image_id": rows["image_id"].take(parents),
            "object_version": rows["object_version"].take(parents),
            "view": names,
            "time_s": times,
            "vector": pc.list_flatten(vectors),
            "embed_fingerprint": pa.repeat(pa.scalar(constants.fingerprints["embed"]), count),
            "embed_run_id": pa.repeat(pa.scalar(constants.run_id), count),
            "ingest_date": rows["ingest_date"].take(parents),
        }
    )
    return conform(table, schema.EMBEDDINGS)


def _by_date(dates: pa.ChunkedArray) -> list[tuple[dt.date, pa.Array]]:
    if dates.null_count:
        raise CatalogError("ingest_date is null in a planned row")
    return [(date.as_py(), pc.equal(dates, date)) for date in pc.unique(dates)]


def _counts(values: pa.ChunkedArray) -> list[dict[str, object]]:
    counted = pc.value_counts(values)
    return [{"name": item["values"].as_py(), "count": item["counts"].as_py()} for item in counted]


def _check_columns(rows: pa.Table) -> None:
    stored = [name for name in schema.REFERENCE.names if name not in ("locator", "offset", "length", "row")]
    needed = [*stored, *schema.PLANNED.names, *schema.FACTS.names, *schema.OUTCOME.names]
    missing = [name for name in needed if name not in rows.column_names]
    if missing:
        raise CatalogError(f"rows to write lack the columns {', '.join(missing)}")
