"""What remoderation does with one file of a table, each as a Ray task: look through, score, moderate anew."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from vlmflow.catalog.columns import conform
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.log import DataFile
from vlmflow.catalog.masks import equal
from vlmflow.catalog.read import read_rows
from vlmflow.catalog.where import mask_where
from vlmflow.catalog.writer import write_file
from vlmflow.errors import CatalogChangedError
from vlmflow.moderation.relabel import (
    SCANNED,
    VECTOR_COLUMNS,
    Changes,
    ScoredVectors,
    Target,
    relabel,
    score_vectors,
    wanted_rows,
)


@dataclass(frozen=True)
class Scan:
    """What a file holds for a remoderation."""

    file: DataFile
    num_wanted: int
    num_computed: int  # of these, rows that need their vectors
    previous: tuple[str, ...] = ()  # policies that rows to be rolled back had before
    num_first: int = 0  # rows to be rolled back that had none


@dataclass(frozen=True)
class Done:
    """A file that was looked through; ``new`` is None if nothing was written."""

    old: DataFile
    new: DataFile | None
    changes: Changes


def scan_file(
    folder: Folder, file: DataFile, columns: pa.Schema, target: Target | None, where: str | None, rollback: str | None
) -> Scan:
    """Counts what a file holds for a remoderation."""
    names = list(SCANNED) if where is None else columns.names
    rows = _read(folder, file, columns, names)
    within = None if where is None else mask_where(rows, where)
    if target is None:  # of a rollback: which policies do its rows go back to?
        move = equal(rows["policy_digest"], rollback or "")
        move = move if within is None else move & within
        previous = rows["previous_policy"].filter(pa.array(move))
        digests = tuple(digest for digest in pc.unique(previous).to_pylist() if digest is not None)
        return Scan(file, int(move.sum()), 0, digests, previous.null_count)
    wanted = wanted_rows(rows, target, within)
    count = int(wanted.moved.sum() + wanted.other_model.sum() + wanted.undetected.sum())
    return Scan(file, count, int(wanted.computed.sum()))


def score_file(folder: Folder, file: DataFile, target: Target) -> ScoredVectors:
    """Scores a file of vectors."""
    return score_vectors(read_rows(folder, "embeddings", file, VECTOR_COLUMNS), target)


def relabel_file(
    folder: Folder,
    file: DataFile,
    columns: pa.Schema,
    target: Target,
    where: str | None,
    dry_run: bool,
    *scored: ScoredVectors,
) -> Done:
    """Moderates the rows of a file anew and writes them to another.

    Raises:
        CatalogChangedError: of a dry run, which looks once: the file is gone, and its rows are in another.
    """
    try:
        rows = _read(folder, file, columns, columns.names)
    except CatalogChangedError:
        if dry_run:
            raise
        return Done(file, None, Changes())  # the next round meets them there
    within = None if where is None else mask_where(rows, where)
    relabelled, changes = relabel(rows, wanted_rows(rows, target, within), target, scored)
    if dry_run or not changes.num_moved:
        return Done(file, None, changes)
    return Done(file, write_file(folder, "images", relabelled, file.ingest_date, target.run_id), changes)


def _read(folder: Folder, file: DataFile, columns: pa.Schema, names: list[str]) -> pa.Table:
    held = read_rows(folder, "images", file, None if len(names) == len(columns) else names)
    return conform(held, pa.schema([columns.field(name) for name in names]))
