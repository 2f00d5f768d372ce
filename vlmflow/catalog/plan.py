"""Planning: what the source lists, joined with what the images table holds.

Both sides are spread over buckets by the first bits of their keys and put aside on the local disk, so that one
bucket is in memory at a time; what is due is then put into the order of the pipeline in the same way. No row becomes
a Python object.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from vlmflow import schema
from vlmflow.catalog.columns import conform
from vlmflow.catalog.due import LEDGER, Due, PlanRequest, decide
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.keys import duplicates, index_of, to_binary, to_words
from vlmflow.catalog.log import DataFile, Snapshot
from vlmflow.catalog.masks import Mask
from vlmflow.catalog.read import read_each, read_rows
from vlmflow.catalog.spill import Spill
from vlmflow.errors import SourceError

NUM_BUCKETS = 64  # at 50 million images one holds 800,000 of them
_ROWS_PER_GROUP = 100_000  # of planned rows that are ordered at a time
_NO_FILE = -1

# Columns that travel with the references and the ledger while they are joined.
_POSITION = pa.field("_position", pa.int64())  # in the listing
_FILE = pa.field("_file", pa.int32())  # number of the live file
_LEDGER_COLUMNS = pa.schema([*(schema.IMAGES.field(name) for name in LEDGER), _FILE]).remove_metadata()
_JOINED = pa.schema([_POSITION, _FILE])


@dataclass
class Plan:
    """What is due. Holds a folder on the local disk until it is closed."""

    version: int  # of the images table; -1: there is no catalog yet
    schema: pa.Schema  # REFERENCE (with the caller's columns) and PLANNED
    num_listed: int = 0  # images of the source, each counted once
    num_duplicates: int = 0  # further listings of the same image
    num_erased: int = 0  # listed, but erased: left out
    num_due: int = 0
    num_new: int = 0  # of those due
    num_planned: int = 0  # due, and within the limit
    num_unchanged: int = 0
    num_exhausted: int = 0  # failed too often to be tried again
    num_policy_differs: int = 0  # keep labels of another policy
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)  # (task, reason) -> images due
    _folder: Path | None = None
    _groups: list[Spill] = field(default_factory=list)

    def batches(self, max_rows: int = 1024) -> Iterator[pa.Table]:
        """The planned rows: new images in listing order, then those that replace, by live file."""
        for spill in self._groups:
            for rows in spill.tables():
                for start in range(0, rows.num_rows, max_rows):
                    yield rows.slice(start, max_rows)

    def sizes(self) -> pa.Array | None:
        """The sizes of the planned images in bytes, each once; None: the source does not tell all of them."""
        found = [np.empty(0, np.int64)]
        for rows in self.batches(_ROWS_PER_GROUP):
            if rows["size_bytes"].null_count:
                return None
            found.append(np.unique(rows["size_bytes"].to_numpy()))
        return pa.array(np.unique(np.concatenate(found)))

    def close(self) -> None:
        """Removes the folder."""
        if self._folder is not None:
            shutil.rmtree(self._folder)
            self._folder = None
            self._groups = []

    def __enter__(self) -> Plan:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def plan(
    references: Iterable[pa.RecordBatch],
    request: PlanRequest,
    folder: Folder | None,
    snapshot: Snapshot | None,
    erased: pa.Array | None = None,
) -> Plan:
    """Finds out which images and tasks are due.

    Args:
        references: batches of REFERENCE, with the caller's columns where there are any.
        folder, snapshot: the catalog and the version of its images table; None: there is no catalog yet.
        erased: keys of images that must not come back: they are left out as if they were not listed.

    Raises:
        SourceError: an image is listed twice with different columns.
        CatalogError: a file of the table cannot be read.
    """
    workspace = Path(tempfile.mkdtemp(prefix="vlmflow-plan-"))
    try:
        return _Planner(workspace, request, folder, snapshot, erased).run(references)
    except BaseException:
        shutil.rmtree(workspace)
        raise


def plan_without_catalog(references: Iterable[pa.RecordBatch], request: PlanRequest) -> Plan:
    """Plans against a catalog that does not exist yet: everything is new."""
    return plan(references, request, None, None)


class _Planner:
    def __init__(
        self,
        workspace: Path,
        request: PlanRequest,
        folder: Folder | None,
        snapshot: Snapshot | None,
        erased: pa.Array | None,
    ) -> None:
        self._erased = index_of(pa.array([], schema.KEY) if erased is None else erased)
        self._workspace = workspace
        self._request = request
        self._folder = folder
        self._files: list[DataFile] = list(snapshot.files.values()) if snapshot else []
        self._version = snapshot.version if snapshot else -1

    def run(self, references: Iterable[pa.RecordBatch]) -> Plan:
        listed = self._spread_references(references)
        ledger = self._spread_ledger()
        columns = pa.schema([*listed.columns.remove(len(listed.columns) - 1), *schema.PLANNED])
        plan = Plan(self._version, columns, _folder=self._workspace)
        joined = Spill(self._workspace / "joined", pa.schema([*columns, *_JOINED]), NUM_BUCKETS)
        for bucket in range(NUM_BUCKETS):
            rows = listed.read(bucket)
            if rows.num_rows:
                self._join(rows, ledger.read(bucket), plan, joined)
        joined.close()
        shutil.rmtree(self._workspace / "listed")
        shutil.rmtree(self._workspace / "ledger")
        self._order(plan, joined)
        shutil.rmtree(self._workspace / "joined")
        return plan

    def _spread_references(self, references: Iterable[pa.RecordBatch]) -> Spill:
        spill: Spill | None = None
        position = 0
        for batch in references:
            rows = pa.Table.from_batches([batch])
            if spill is None:
                spill = Spill(self._workspace / "listed", rows.schema.append(_POSITION), NUM_BUCKETS)
            positions = np.arange(position, position + rows.num_rows)
            position += rows.num_rows
            spill.append(rows.append_column(_POSITION, pa.array(positions)), _buckets(rows))
        if spill is None:
            spill = Spill(self._workspace / "listed", schema.REFERENCE.append(_POSITION), NUM_BUCKETS)
        spill.close()
        return spill

    def _spread_ledger(self) -> Spill:
        spill = Spill(self._workspace / "ledger", _LEDGER_COLUMNS, NUM_BUCKETS)
        each = read_each(self._folder, "images", self._files, LEDGER, ahead=8) if self._folder else []
        for number, (_, rows) in enumerate(each):
            rows = rows.append_column(_FILE, pa.repeat(pa.scalar(number, pa.int32()), rows.num_rows))
            spill.append(conform(rows, _LEDGER_COLUMNS), _buckets(rows))
        spill.close()
        return spill

    def _join(self, listed: pa.Table, ledger: pa.Table, plan: Plan, joined: Spill) -> None:
        """Decides for the images of one bucket."""
        listed = self._without_erased(self._once(listed, plan), plan)
        at = index_of(to_binary(ledger["image_id"])).find(*to_words(to_binary(listed["image_id"])))
        live = ledger.take(pa.array(at, mask=at < 0))
        due = decide(listed, live, at >= 0, self._request)
        plan.num_listed += listed.num_rows
        plan.num_due += int(due.wanted.sum())
        plan.num_new += int((due.new & due.wanted).sum())
        plan.num_unchanged += due.num_unchanged
        plan.num_exhausted += due.num_exhausted
        plan.num_policy_differs += due.num_policy_differs
        plan.counts += due.counts
        rows = self._planned(listed, live, due)
        joined.append(conform(rows, joined.columns), _buckets(rows))

    def _without_erased(self, listed: pa.Table, plan: Plan) -> pa.Table:
        gone = self._erased.find(*to_words(to_binary(listed["image_id"]))) >= 0
        if not gone.any():
            return listed
        plan.num_erased += int(gone.sum())
        return listed.filter(pa.array(~gone))

    def _once(self, listed: pa.Table, plan: Plan) -> pa.Table:
        """The first listing of each image."""
        again = duplicates(to_binary(listed["image_id"]))
        if not again.any():
            return listed
        plan.num_duplicates += int(again.sum())
        first, repeated = listed.filter(pa.array(~again)), listed.filter(pa.array(again))
        at = index_of(to_binary(first["image_id"])).find(*to_words(to_binary(repeated["image_id"])))
        _check_equal(first.take(pa.array(at)), repeated)
        return first

    def _planned(self, listed: pa.Table, live: pa.Table, due: Due) -> pa.Table:
        """The rows of the images that are due, with PLANNED but for what only the files themselves tell."""
        number = pc.fill_null(live["_file"], _NO_FILE)
        dates = [self._request.date, *(file.ingest_date for file in self._files)]
        paths = [None, *(file.path for file in self._files)]
        lookup = pc.add(number, 1)
        count = listed.num_rows
        tasks = pa.array([list(self._request.tasks)], pa.list_(pa.string()))
        planned = {
            "due": tasks.take(pa.array(np.zeros(count, np.int64))),
            "due_if_same": _task_lists(due.if_same, count),
            "replaces": pa.array(~due.new),
            "attempts": pa.array(due.attempts),
            "ingest_date": pa.array(dates, pa.date32()).take(lookup),
            "live_file": pa.array(paths, pa.string()).take(lookup),
            "previous_version": live["seen_version"],
            "_file": number,
        }
        rows = listed
        for name, values in planned.items():
            rows = rows.append_column(name, values)
        return rows.filter(pa.array(due.wanted))

    def _order(self, plan: Plan, joined: Spill) -> None:
        """Puts the planned rows into the order of the pipeline, within the limit."""
        last = self._last_position(joined)
        total = plan.num_listed + plan.num_duplicates
        new = Spill(self._workspace / "new-unordered", joined.columns, _num_groups(total))
        again = Spill(self._workspace / "again-unordered", joined.columns, _num_groups(self._num_live_rows()))
        groups = self._groups_of_files(again.num_parts)
        for rows in joined.tables():
            rows = rows.filter(pc.less_equal(rows["_position"], last))
            is_new = pc.equal(rows["_file"], _NO_FILE)
            fresh, live = rows.filter(is_new), rows.filter(pc.invert(is_new))
            positions = fresh["_position"].to_numpy()
            new.append(fresh, positions * new.num_parts // max(total, 1))
            again.append(live, groups[live["_file"].to_numpy()])
        plan._groups = [
            self._sorted(new, plan, "new", ["_position"]),
            self._sorted(again, plan, "again", ["_file", "_position"]),
        ]

    def _sorted(self, unordered: Spill, plan: Plan, name: str, by: list[str]) -> Spill:
        unordered.close()
        ordered = Spill(self._workspace / name, plan.schema, unordered.num_parts)
        for part in range(unordered.num_parts):
            rows = unordered.read(part).sort_by([(column, "ascending") for column in by])
            if name == "again":
                rows = self._with_previous(rows)
            ordered.append(rows.select(plan.schema.names), np.full(rows.num_rows, part))
            plan.num_planned += rows.num_rows
        ordered.close()
        shutil.rmtree(self._workspace / f"{name}-unordered")
        return ordered

    def _with_previous(self, rows: pa.Table) -> pa.Table:
        """Fills in what the pipeline needs of the live rows; ``rows`` are in the order of their files."""
        assert self._folder is not None or not rows.num_rows
        parts = []
        numbers = rows["_file"].to_numpy()
        bounds = np.flatnonzero(np.diff(numbers, prepend=_NO_FILE, append=_NO_FILE))
        for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            assert self._folder is not None
            part = rows.slice(start, end - start)
            file = self._files[int(numbers[start])]
            live = read_rows(self._folder, "images", file, ["image_id", "content_hash", "caption"])
            at = pa.array(index_of(to_binary(live["image_id"])).find(*to_words(to_binary(part["image_id"]))))
            for column, name in (("previous_hash", "content_hash"), ("previous_caption", "caption")):
                part = part.set_column(part.schema.get_field_index(column), column, live[name].take(at))
            parts.append(conform(part, rows.schema))
        return pa.concat_tables(parts) if parts else rows

    def _last_position(self, joined: Spill) -> int:
        """The position of the last image within the limit."""
        limit = self._request.limit
        positions = [rows["_position"].to_numpy() for rows in joined.tables()]
        every = np.concatenate([np.empty(0, np.int64), *positions])
        if limit is None or limit >= len(every):
            return np.iinfo(np.int64).max
        return int(np.partition(every, limit - 1)[limit - 1])

    def _num_live_rows(self) -> int:
        return sum(file.num_rows for file in self._files)

    def _groups_of_files(self, num_groups: int) -> npt.NDArray[np.int64]:
        """The group of each live file: files in their order, about the same number of rows in each group."""
        before = np.cumsum([0, *(file.num_rows for file in self._files)])
        return before[:-1] * num_groups // max(int(before[-1]), 1)


def _buckets(rows: pa.Table) -> npt.NDArray[np.int64]:
    high, _ = to_words(to_binary(rows["image_id"]))
    return (high >> np.uint64(64 - (NUM_BUCKETS - 1).bit_length())).astype(np.int64)


def _num_groups(num_rows: int) -> int:
    return min(256, num_rows // _ROWS_PER_GROUP + 1)


def _task_lists(masks: dict[str, Mask], count: int) -> pa.Array:
    """A list of the tasks whose mask is set, per row."""
    tasks = list(masks)
    marks = np.stack([masks[task] for task in tasks], axis=1)
    offsets = np.concatenate([[0], np.cumsum(marks.sum(axis=1))]).astype(np.int32)
    assert len(offsets) == count + 1
    names = pa.array(tasks, pa.string()).take(pa.array(np.nonzero(marks)[1]))
    return pa.ListArray.from_arrays(pa.array(offsets), names)


def _check_equal(first: pa.Table, repeated: pa.Table) -> None:
    """Refuses images that are listed twice with different columns of the caller."""
    names = [name for name in ("text", "source") if name in first.column_names]
    examples = []
    for one, other in zip(
        first.select(["uri", *names]).to_batches(1024), repeated.select(["uri", *names]).to_batches(1024), strict=True
    ):
        for left, right in zip(one.to_pylist(), other.to_pylist(), strict=True):
            if any(left[name] != right[name] for name in names):
                examples.append(left["uri"])
    if examples:
        raise SourceError(
            f"{len(examples)} images are listed twice with different columns, such as {', '.join(examples[:3])}",
            remedy="Name a key column (source.key_column) that tells them apart, or remove the repetitions.",
        )
