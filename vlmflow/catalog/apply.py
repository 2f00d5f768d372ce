"""Puts the files that a run's workers wrote into the images table: new rows, and rows merged into live ones."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from vlmflow.catalog.added import AddedKeys
from vlmflow.catalog.columns import conform
from vlmflow.catalog.commit import Change
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.keys import concat, digest_of, duplicates, index_of, to_binary, to_words
from vlmflow.catalog.log import DataFile, Snapshot
from vlmflow.catalog.merge import merge
from vlmflow.catalog.read import read_rows
from vlmflow.catalog.rows import add_counts, error_classes
from vlmflow.catalog.tombstones import ErasedOf
from vlmflow.catalog.writer import write_file
from vlmflow.errors import CatalogError


@dataclass(frozen=True)
class CommitResult:
    """What one commit of a run's files did to the tables."""

    images_version: int
    embeddings_version: int
    num_added: int  # new rows
    num_replaced: int  # rows merged into live ones
    num_dropped: int  # new rows left out: another run has added the image since planning
    num_superseded: int  # replacements left out: another run has met a newer object version
    statuses: dict[str, int] = field(default_factory=dict)  # of the rows as committed
    errors: dict[str, int] = field(default_factory=dict)  # of the run's rows that went in, by class
    others_decisions: dict[str, int] = field(default_factory=dict)  # of new rows that were left out
    num_erased: int = 0  # left out: the image has been erased since planning
    num_conflicts: int = 0  # attempts that other writers won
    repeated: bool = False  # this very commit had been made before: nothing was done


@dataclass
class Outcome:
    """What became of the rows, on one snapshot."""

    num_added: int = 0
    num_replaced: int = 0
    num_dropped: int = 0  # left out: the image has come into the table since planning, or stands here twice
    num_superseded: int = 0  # replacements left out: another run has met a newer object version
    num_erased: int = 0  # left out: the image has been erased since planning
    statuses: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    others_decisions: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Written:
    """A file for the table, with what it does to the outcome."""

    file: DataFile
    keys: pa.Array
    statuses: Counter[str]  # of the rows that are ours
    errors: Counter[str]  # the same, as the run met them
    num_superseded: int = 0


class ImageChanges:
    """Decides on a snapshot how a run's files change the images table. One object per commit.

    Args:
        files: rows of :data:`schema.DESCRIPTOR`, of the images table.
        added: the keys that the table has got since planning.
        erased: of the run's images, since planning too; their rows are left out.
    """

    def __init__(self, folder: Folder, run_id: str, files: pa.Table, added: AddedKeys, erased: ErasedOf) -> None:
        self._erased_now = erased.index
        self._folder = folder
        self._run_id = run_id
        self._added = added
        self._new = _new_files(files.filter(pc.equal(files["kind"], "add")))
        self.staged_paths: list[str] = files.filter(pc.equal(files["kind"], "replace"))["path"].to_pylist()
        # Files never change, so what one attempt wrote serves the next, where it decides the same.
        self._written: dict[str, _Written | None] = {}
        self._left_out: dict[str, Counter[str]] = {}  # their decisions
        self._erased = index_of(pa.array([], pa.binary(16)))
        self._committed: set[str] = set()
        self.outcome = Outcome()

    def propose(self, snapshot: Snapshot) -> Change:
        """The change that brings all rows in; see :func:`vlmflow.catalog.commit.commit`."""
        self._added.refresh(snapshot)
        self._erased = self._erased_now()
        self.outcome = Outcome()
        groups, vanished = self._groups(snapshot)
        add = self._add_new(vanished, snapshot)
        remove = []
        for path, rows in groups.items():
            written = self._rewrite(snapshot.files[path], self._staged.take(rows), snapshot)
            self.outcome.num_superseded += written.num_superseded
            self.outcome.num_replaced += len(rows) - written.num_superseded
            self.outcome.statuses += written.statuses
            self.outcome.errors += written.errors
            add.append(written)
            remove.append(snapshot.files[path])
        for written in add:
            self._added.tell(written.file.path, written.keys)
        self._committed = {written.file.path for written in add}
        return Change(tuple(written.file for written in add), tuple(remove))

    def leftovers(self) -> list[str]:
        """What was written for this commit and did not go in with it, relative to the catalog; it may be deleted.

        Staged rows, which are merged now; files whose rows others had added, or that were erased; and files that were
        rewritten for versions on which the commit did not come about.
        """
        written = {new.file.path for new in self._new}
        written |= {held.file.path for held in self._written.values() if held is not None}
        return [*self.staged_paths, *(f"images/{path}" for path in sorted(written - self._committed))]

    def _add_new(self, vanished: list[int], snapshot: Snapshot) -> list[_Written]:
        """The files of new rows, without the rows whose image has come into the table since planning."""
        files = [*self._new]
        if vanished:
            # The live row is gone (rolled back, say). An image has a row, always: ours stands for it.
            files += self._write_vanished(vanished, snapshot)
        keys = concat([new.keys for new in files])
        erased = self._erased.find(*to_words(keys)) >= 0
        drop = (self._added.locate(keys) >= 0) | duplicates(keys) | erased
        self.outcome.num_erased += int(erased.sum())
        add = []
        start = 0
        for new in files:
            mask, gone = (marks[start : start + len(new.keys)] for marks in (drop, erased))
            start += len(new.keys)
            kept = self._without(new, mask) if mask.any() else new
            self.outcome.num_dropped += int((mask & ~gone).sum())
            if kept is not None:
                self.outcome.num_added += kept.file.num_rows
                self.outcome.statuses += kept.statuses
                self.outcome.errors += kept.errors
                add.append(kept)
        return add

    def _without(self, new: _Written, drop: npt.NDArray[np.bool_]) -> _Written | None:
        """The file without some of its rows; None if none is left."""
        name = digest_of(new.file.path, drop.tobytes().hex())
        if name not in self._written:
            rows = self._read(new.file)
            self._left_out[name] = _counts(rows["decision"].filter(pa.array(drop)))
            self._written[name] = None if drop.all() else self._filtered(new.file, rows.filter(pa.array(~drop)))
        self.outcome.others_decisions += self._left_out[name]
        return self._written[name]

    def _filtered(self, file: DataFile, rows: pa.Table) -> _Written:
        written = write_file(self._folder, "images", rows, file.ingest_date, self._run_id)
        return _Written(written, to_binary(rows["image_id"]), _counts(rows["status"]), _errors(rows))

    def _groups(self, snapshot: Snapshot) -> tuple[dict[str, list[int]], list[int]]:
        """Staged rows by the file that holds their live row now, and those whose live row is nowhere."""
        groups: dict[str, list[int]] = {}
        vanished: list[int] = []
        moved = self._added.locate(to_binary(self._staged["image_id"]))
        planned = self._staged["live_file"].to_pylist()
        erased = self._erased.find(*to_words(to_binary(self._staged["image_id"]))) >= 0
        self.outcome.num_erased += int(erased.sum())
        for row, number in enumerate(moved.tolist()):
            if erased[row]:
                continue
            path = planned[row] if number < 0 else self._added.path(number)
            if path in snapshot.files:
                groups.setdefault(path, []).append(row)
            else:
                vanished.append(row)
        return groups, vanished

    def _rewrite(self, file: DataFile, staged: pa.Table, snapshot: Snapshot) -> _Written:
        """Copies a live file with our rows merged into theirs."""
        name = digest_of(file.path, *staged["image_id"].to_pylist())
        written = self._written.get(name)
        if written is None:
            written = self._written[name] = self._merged(file, staged, snapshot.schema)
        return written

    def _merged(self, file: DataFile, staged: pa.Table, columns: pa.Schema) -> _Written:
        rows = conform(self._read(file), columns)
        keys = to_binary(rows["image_id"])
        at = index_of(keys).find(*to_words(to_binary(staged["image_id"])))
        if (at < 0).any():
            lost = staged["image_id"][int(np.argmax(at < 0))]
            raise CatalogError(f"images: {file.path} does not hold the row of image {lost}")
        merged, superseded = merge(rows.take(pa.array(at)), staged)
        order = np.arange(rows.num_rows)
        order[at] = rows.num_rows + np.arange(len(at))
        out = pa.concat_tables([rows, merged]).take(pa.array(order))
        written = write_file(self._folder, "images", out, file.ingest_date, self._run_id)
        ours = pa.array(~superseded)
        statuses, errors = _counts(merged["status"].filter(ours)), _errors(staged.filter(ours))
        return _Written(written, keys, statuses, errors, int(superseded.sum()))

    def _write_vanished(self, vanished: list[int], snapshot: Snapshot) -> list[_Written]:
        rows = conform(self._staged.take(vanished), snapshot.schema)
        files = []
        for date in pc.unique(rows["ingest_date"]).to_pylist():
            part = rows.filter(pc.equal(rows["ingest_date"], pa.scalar(date, pa.date32())))
            name = digest_of(str(date), *part["image_id"].to_pylist())
            held = self._written.get(name)
            if held is None:
                file = write_file(self._folder, "images", part, date, self._run_id)
                held = self._written[name] = _Written(
                    file, to_binary(part["image_id"]), _counts(part["status"]), _errors(part)
                )
            files.append(held)
        return files

    def _read(self, file: DataFile) -> pa.Table:
        return read_rows(self._folder, "images", file)

    @cached_property
    def _staged(self) -> pa.Table:
        """All staged rows of this commit; of an image that stands there twice, the first row."""
        if not self.staged_paths:
            return pa.schema([("image_id", pa.string()), ("live_file", pa.string())]).empty_table()
        tables = [self._folder.read_parquet(path) for path in self.staged_paths]
        rows = pa.concat_tables(tables, promote_options="permissive")
        return rows.filter(pa.array(~duplicates(to_binary(rows["image_id"]))))


def _new_files(files: pa.Table) -> list[_Written]:
    """The descriptors of files that go in as they are."""
    rows: list[dict[str, Any]] = files.drop_columns(["keys", "addresses"]).to_pylist()
    return [
        _Written(data_file(row), files["keys"][number].values, _told(row["statuses"]), _told(row["errors"]))
        for number, row in enumerate(rows)
    ]


def data_file(row: dict[str, Any]) -> DataFile:
    """The file that a descriptor stands for."""
    date: dt.date = row["ingest_date"]
    path = str(row["path"]).removeprefix(f"{row['table']}/")
    return DataFile(path, row["size_bytes"], row["num_rows"], date, row["stats"])


def _told(counts: list[dict[str, Any]]) -> Counter[str]:
    return Counter({entry["name"]: entry["count"] for entry in counts})


def _counts(values: pa.ChunkedArray | pa.Array) -> Counter[str]:
    counter: Counter[str] = Counter()
    add_counts(counter, values)
    return counter


def _errors(rows: pa.Table) -> Counter[str]:
    return _counts(error_classes(rows["errors"])[1])
