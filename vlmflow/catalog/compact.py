"""Joins small files into larger ones, and leaves out embeddings that nothing refers to any more."""

from __future__ import annotations

import datetime as dt
import itertools
import logging
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vlmflow.catalog.columns import conform
from vlmflow.catalog.commit import Change, CommitRequest, commit
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.log import DataFile, Snapshot, TableLog
from vlmflow.catalog.read import References, files_by_date, read_each, read_rows
from vlmflow.catalog.writer import write_joined, writer_of
from vlmflow.errors import CatalogChangedError

logger = logging.getLogger(__name__)

_WORTH_REWRITING = 0.25  # share of a large file's rows that nothing refers to
_LOOK_EVERY_DAYS = 30  # at the files of a date that the run has written nothing to


@dataclass(frozen=True)
class CompactResult:
    """What compaction did."""

    num_files_before: int = 0  # of those that were joined
    num_files_after: int = 0
    num_embeddings_dropped: int = 0

    def __add__(self, other: CompactResult) -> CompactResult:
        return CompactResult(
            self.num_files_before + other.num_files_before,
            self.num_files_after + other.num_files_after,
            self.num_embeddings_dropped + other.num_embeddings_dropped,
        )


class Unreferenced:
    """Tells which embeddings may go: no image row refers to them, and the run that wrote them commits no more.

    Args:
        images: read after it was established that these runs are over.
        over: ids of runs that are finished or buried.
    """

    def __init__(self, folder: Folder, images: Snapshot, over: set[str]) -> None:
        self._folder = folder
        self._images = images
        self._over = pa.array(sorted(over), pa.string())
        self._references: tuple[dt.date, References] | None = None  # of the date looked at last
        self._shares: dict[str, float] = {}

    def mask(self, date: dt.date, rows: pa.Table) -> npt.NDArray[np.bool_]:
        """Marks the rows (columns image_id and embed_run_id) of one partition that may go."""
        if self._references is None or self._references[0] != date:
            self._references = (date, References(self._folder, self._images, date))
        over = pa.compute.is_in(rows["embed_run_id"], value_set=self._over).to_numpy()
        marks: npt.NDArray[np.bool_] = over & (self._references[1].find(rows) < 0)
        return marks

    def share(self, file: DataFile) -> float:
        """The share of a file's rows that may go."""
        if file.path not in self._shares:
            rows = read_rows(self._folder, "embeddings", file, ["image_id", "embed_run_id"])
            marks = self.mask(file.ingest_date, rows)
            self._shares[file.path] = float(marks.mean()) if len(marks) else 1.0
        return self._shares[file.path]


def compact_table(log: TableLog, run_id: str, target_bytes: int, unreferenced: Unreferenced | None) -> CompactResult:
    """Compacts a table, one commit for each file that comes out of it.

    Args:
        target_bytes: files of less than half of it are joined up to about this size.
        unreferenced: of the embeddings table, what may go; None: every row stays.
    """
    result = CompactResult()
    before = log.refresh()
    try:
        for date, files in files_by_date(before).items():
            step = _Step(log, run_id, date, target_bytes, unreferenced)
            while step.choose(files):
                commit(log, CommitRequest(uuid.uuid4().hex, run_id, "compact", before.version), step.propose)
                if step.result == CompactResult():  # others have done it meanwhile
                    break
                result += step.result
                files = step.left
    except CatalogChangedError as error:  # an erasure came in between: nothing is lost by leaving the rest
        logger.info("%s: the next compaction goes on: %s", log.name, error)
    return result


class _Step:
    """One commit of a compaction: some files of a date become one."""

    def __init__(
        self, log: TableLog, run_id: str, date: dt.date, target_bytes: int, unreferenced: Unreferenced | None
    ) -> None:
        self._folder = log.folder
        self._run_id = run_id
        self._table = log.name
        self._date = date
        self._target_bytes = target_bytes
        self._unreferenced = unreferenced
        self._written: dict[tuple[str, ...], tuple[DataFile | None, int]] = {}
        self.result = CompactResult()
        self.left: list[DataFile] = []  # what the date holds after the commit

    def propose(self, snapshot: Snapshot) -> Change:
        self.result = CompactResult()
        there = files_by_date(snapshot).get(self._date, [])
        files = self.choose(there)
        if not files:
            return Change()
        name = tuple(file.path for file in files)
        if name not in self._written:
            self._written[name] = self._join(files, snapshot.schema)
        written, num_dropped = self._written[name]
        self.result = CompactResult(len(files), 0 if written is None else 1, num_dropped)
        add = () if written is None else (written,)
        self.left = sorted({*there, *add} - {*files}, key=lambda file: file.path)
        return Change(add, tuple(files), data_change=num_dropped > 0)

    def choose(self, files: Sequence[DataFile]) -> list[DataFile]:
        """Small files up to the target size together; failing that, one with much that may go."""
        small = [file for file in files if file.size_bytes < self._target_bytes / 2]
        chosen: list[DataFile] = []
        for file in small:
            if chosen and sum(one.size_bytes for one in chosen) + file.size_bytes > self._target_bytes:
                break
            chosen.append(file)
        if len(chosen) > 1:
            return chosen
        if self._unreferenced is None or not self._may_hold_superseded(files):
            return []
        return next(([file] for file in files if self._unreferenced.share(file) >= _WORTH_REWRITING), [])

    def _may_hold_superseded(self, files: Sequence[DataFile]) -> bool:
        """Whether it is worth reading the date's files: not for every date, night after night."""
        # New vectors of a replaced image come in files of the run: without one, it has superseded nothing here.
        if any(writer_of(f"{self._table}/{file.path}") == self._run_id for file in files):
            return True
        # What a killed run has left here may go once that run is buried, and no file tells: now and then, then.
        return (dt.datetime.now(dt.UTC).date() - self._date).days % _LOOK_EVERY_DAYS == 0

    def _join(self, files: Sequence[DataFile], columns: pa.Schema) -> tuple[DataFile | None, int]:
        num_dropped = 0

        def kept() -> Iterator[pa.Table]:
            nonlocal num_dropped
            for _, rows in read_each(self._folder, self._table, files, None, ahead=1):
                if self._unreferenced is not None:
                    marks = self._unreferenced.mask(self._date, rows)
                    num_dropped += int(marks.sum())
                    rows = rows.filter(pa.array(~marks))
                if rows.num_rows:
                    yield conform(rows, columns)

        parts = kept()
        first = next(parts, None)
        if first is None:
            return None, num_dropped
        parts = itertools.chain([first], parts)
        return write_joined(self._folder, self._table, parts, self._date, self._run_id), num_dropped
