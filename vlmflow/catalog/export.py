"""Writes the current rows as plain Parquet, for readers that know files alone."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vlmflow.catalog.folder import Folder
from vlmflow.catalog.log import Snapshot
from vlmflow.catalog.read import embedding_batches, image_batches
from vlmflow.errors import CatalogError, ConfigError
from vlmflow.files import locked
from vlmflow.storage import check_on_disk

# In the target, for what is not whole yet: as long as it is there, all else there is an unfinished export's too.
_UNFINISHED = ".unfinished"
_FILE_BYTES = 64 * 1024 * 1024  # in memory, about
_OTHER_FORMATS = {".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".xlsx"}
_TABLES = ("embeddings", "images")  # in the order in which they appear: where images are, all is


@dataclass(frozen=True)
class ExportResult:
    """What was written, of which version of the images table."""

    version: int
    num_images: int
    num_embeddings: int
    num_files: int


def export(folder: Folder, images: Snapshot, embeddings: Snapshot | None, target: Path) -> ExportResult:
    """Writes ``target/images/*.parquet`` and, if wanted, ``target/embeddings/*.parquet``.

    ``ingest_date`` is a column like any other. Of the embeddings only those that an image row refers to are written.
    The folders appear once they are whole. What a killed export has left in ``target`` is removed.

    Args:
        embeddings: the embeddings table; None: images alone.

    Raises:
        CatalogError: ``target`` holds something else, cannot be written, or another export is writing to it;
            CatalogChangedError: an erasure came in between.
        ConfigError: ``target`` is in a store, or named like a file of another format.
    """
    vectors = None if embeddings is None else embedding_batches(folder, images, embeddings)
    return write_tables(target, images.version, image_batches(folder, images), vectors)


def check_target(target: Path) -> None:
    """Before the work: whether the name is that of a folder of this machine.

    Raises:
        ConfigError: it is not.
    """
    check_on_disk(target)
    if target.suffix.lower() in _OTHER_FORMATS:
        remedy = "Name a folder; what reads Parquet, such as DuckDB or pandas, makes that of its images."
        raise ConfigError(f"{target} is the name of a file, and a folder of Parquet files is written", remedy=remedy)


def write_tables(
    target: Path, version: int, images: Iterator[pa.Table], embeddings: Iterator[pa.Table] | None
) -> ExportResult:
    """Writes ``target/images/*.parquet`` and ``target/embeddings/*.parquet``, which appear once they are whole.

    Args:
        version: of the images table.
        images: read to its end before the first of ``embeddings``.
        embeddings: None: images alone.

    Raises:
        CatalogError, ConfigError: as :func:`export`.
    """
    check_target(target)
    try:
        target.mkdir(parents=True, exist_ok=True)
        with _unfinished(target) as place:
            num_images, num_files = _write(place / "images", images)
            num_embeddings = 0
            if embeddings is not None:
                num_embeddings, num_further = _write(place / "embeddings", embeddings)
                num_files += num_further
            for name in _TABLES:
                if (place / name).exists():
                    (place / name).rename(target / name)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error  # Arrow says what it was about as well
        raise CatalogError(f"{target} cannot be written: {reason}", remedy="Name another folder.") from error
    return ExportResult(version, num_images, num_embeddings, num_files)


@contextlib.contextmanager
def _unfinished(target: Path) -> Iterator[Path]:
    """An empty folder in the target, there for as long as the export is not whole; an error leaves the target empty."""
    place = target / _UNFINISHED
    held = {path.name for path in target.iterdir()}
    full = CatalogError(f"{target} is not empty", remedy="Name a folder that is empty or does not exist.")
    if held and not {_UNFINISHED} <= held <= {_UNFINISHED, *_TABLES}:
        raise full
    try:
        place.mkdir()
        is_new = True
    except FileExistsError:
        is_new = False
    remedy = "Wait until it is done, or name another folder."
    with locked(place, CatalogError(f"another export is writing to {target}", remedy=remedy)):
        if not place.exists():  # it was that, and has just ended
            raise full
        if is_new and any((target / name).exists() for name in _TABLES):  # those of one that ended while this looked
            place.rmdir()
            raise full
        try:
            _remove_all(target, place)
            yield place
        except BaseException:
            _remove_all(target, place)
            raise
        finally:
            place.rmdir()


def _remove_all(target: Path, place: Path) -> None:
    for path in (parent / name for parent in (target, place) for name in _TABLES):
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(path)


def _write(target: Path, tables: Iterator[pa.Table]) -> tuple[int, int]:
    """Writes the rows of all tables, small ones together; at least one file, so that readers find the columns.

    A catalog has a file or more for each night, most of them small.
    """
    target.mkdir()
    num_rows = num_files = num_bytes = 0
    waiting = [next(tables)]
    names = waiting[0].column_names
    in_dictionary = [name for name in names if name != "vector"] if "vector" in names else True  # see writer.py
    for rows in itertools.chain(tables, [None]):
        if rows is not None and rows.num_rows:
            waiting.append(rows)
            num_rows += rows.num_rows
            num_bytes += rows.nbytes
        if num_bytes >= _FILE_BYTES or (rows is None and waiting):
            path = target / f"part-{num_files:05d}.parquet"
            pq.write_table(pa.concat_tables(waiting), path, compression="zstd", use_dictionary=in_dictionary)
            num_files, num_bytes, waiting = num_files + 1, 0, []
    return num_rows, num_files
