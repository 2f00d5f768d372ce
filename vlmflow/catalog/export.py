"""Writes the current rows as plain Parquet, for readers that know files alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vlmflow.catalog.folder import Folder
from vlmflow.catalog.log import Snapshot
from vlmflow.catalog.read import embedding_batches, image_batches
from vlmflow.errors import CatalogError
from vlmflow.storage import check_on_disk


@dataclass(frozen=True)
class ExportResult:
    """What was written."""

    num_images: int
    num_embeddings: int
    num_files: int


def export(folder: Folder, images: Snapshot, embeddings: Snapshot | None, target: Path) -> ExportResult:
    """Writes ``target/images/*.parquet`` and, if wanted, ``target/embeddings/*.parquet``.

    ``ingest_date`` is a column like any other. Of the embeddings only those that an image row refers to are written.

    Args:
        embeddings: the embeddings table; None: images alone.

    Raises:
        CatalogError: ``target`` holds something, or cannot be written.
        ConfigError: ``target`` is in a store.
    """
    check_on_disk(target)
    try:
        target.mkdir(parents=True, exist_ok=True)
        if any(target.iterdir()):
            raise CatalogError(f"{target} is not empty", remedy="Name a folder that is empty or does not exist.")
        num_images, num_files = _write(target / "images", image_batches(folder, images))
        num_embeddings = 0
        if embeddings is not None:
            batches = embedding_batches(folder, images, embeddings)
            num_embeddings, num_further = _write(target / "embeddings", batches)
            num_files += num_further
    except OSError as error:
        raise CatalogError(f"{target} cannot be written: {error.strerror}", remedy="Name another folder.") from error
    return ExportResult(num_images, num_embeddings, num_files)


def _write(target: Path, tables: Iterator[pa.Table]) -> tuple[int, int]:
    """Writes each table that holds rows as a file; an empty one if none does, so that a reader finds the columns."""
    target.mkdir()
    num_rows = num_files = 0
    empty = next(tables)
    for rows in tables:
        if rows.num_rows:
            pq.write_table(rows, target / f"part-{num_files:05d}.parquet", compression="zstd")
            num_rows += rows.num_rows
            num_files += 1
    if not num_files:
        pq.write_table(empty, target / "part-00000.parquet")
        num_files = 1
    return num_rows, num_files
