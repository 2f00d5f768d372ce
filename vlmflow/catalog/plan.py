"""Planning: what the source lists, joined with what the images table holds.

Both sides are spread over buckets by the first bits of their keys and put aside, so that one bucket is in memory at a
time; what is due is then put into the order of the pipeline in the same way. No row becomes a Python object, but for
those whose alternative text may not be what it should be. Reading the table, joining the buckets and filling in live
rows are parts of their own, which run in this process or on the workers of a cluster; the listing comes through this
process either way. Of the other rows, those are put aside that hold the caller's columns of an earlier listing, or
whose alternative text is not what it should be.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from vlmflow import schema
from vlmflow.catalog.columns import flat, taken
from vlmflow.catalog.due import PlanRequest
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.log import DataFile, Snapshot
from vlmflow.catalog.outdated import count_by_column, held_as
from vlmflow.catalog.plan_parts import (
    JOINED,
    NO_FILE,
    NUM_BUCKETS,
    POSITION,
    FillPrevious,
    InProcess,
    Join,
    Joined,
    Ledger,
    ReadLedger,
    Workers,
    buckets_of,
    ledger_columns,
    outdated_columns,
)
from vlmflow.catalog.spill import Spill
from vlmflow.catalog.tombstones import Erased
from vlmflow.workspace import Workspace

# Of planned rows that are ordered at a time: texts may be long.
_ROWS_PER_GROUP, _BYTES_PER_GROUP = 100_000, 128 * 1024 * 1024
_COUNTED = (
    "listed",
    "duplicates",
    "erased",
    "due",
    "new",
    "unchanged",
    "exhausted",
    "policy_differs",
    "unwatched",
    "doubled",
)


@dataclass(frozen=True)
class _Outdated:
    """Rows that hold other values of the caller's columns than the listing, by groups of the files that hold them."""

    spill: Spill
    paths: pa.Array  # of the files, by number
    last: int  # position of the last image within the limit

    def tables(self) -> Iterator[pa.Table]:
        """Those that do not go into the pipeline, which brings the others' columns along."""
        for rows in self.spill.tables():
            left = rows.filter(pc.or_(pc.invert(rows["_wanted"]), pc.greater(rows["_position"], self.last)))
            if left.num_rows:
                yield left.append_column("live_file", self.paths.take(flat(left["_file"])))


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
    num_fresh: int = 0  # of those planned, without those that failed the last time too
    num_unchanged: int = 0
    num_exhausted: int = 0  # failed too often to be tried again
    num_policy_differs: int = 0  # keep labels of another policy
    num_unwatched: int = 0  # at http(s) urls whose changes no run sees
    num_doubled: int = 0  # with more than one row, of another program: only one of them is kept up to date
    num_outdated: int = 0  # not planned, and hold other values of the caller's columns or another alternative text
    outdated_columns: Counter[str] = field(default_factory=Counter)  # of these, by column; the latter by `alt_text`
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)  # (task, reason) -> images due
    found_text_column: str | None = None  # of the caller's columns, for alternative texts
    _workspace: Workspace | None = None
    _groups: list[Spill] = field(default_factory=list)
    _outdated: _Outdated | None = None

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

    def usual_size(self) -> float | None:
        """The median of the first planned images in bytes, as far as the source tells; None: it tells of none."""
        first = next(self.batches(_ROWS_PER_GROUP), None)
        median: float | None = None if first is None else pc.quantile(first["size_bytes"], 0.5)[0].as_py()
        return median

    def outdated(self) -> Iterator[pa.Table]:
        """The outdated rows in groups; see :func:`vlmflow.catalog.outdated.update_columns`."""
        if self._outdated is not None:
            yield from self._outdated.tables()

    def add(self, bucket: Joined) -> None:
        """Counts what was decided in one bucket."""
        for name in _COUNTED:
            setattr(self, f"num_{name}", getattr(self, f"num_{name}") + getattr(bucket, f"num_{name}"))
        self.counts += bucket.counts

    def close(self) -> None:
        """Removes the folder."""
        if self._workspace is not None:
            self._workspace.close()
            self._workspace = None
            self._groups, self._outdated = [], None

    def __enter__(self) -> Plan:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def plan(
    references: Iterable[pa.RecordBatch],
    request: PlanRequest,
    folder: Folder | None,
    snapshot: Snapshot | None,
    erased: Erased | None = None,
    workers: Workers | None = None,
) -> Plan:
    """Finds out which images and tasks are due.

    Args:
        references: batches of REFERENCE, with the caller's columns where there are any.
        folder, snapshot: the catalog and the version of its images table; None: there is no catalog yet.
        erased: images that must not come back: they are left out as if they were not listed.
        workers: where the parts run; None: in this process.

    Raises:
        SourceError: an image is listed twice with different columns.
        CatalogError: a file of the table cannot be read.
        WorkspaceError: the temporary folder is full, or cannot be used.
    """
    workspace = Workspace()
    try:
        return _Planner(workspace, request, folder, snapshot, erased, workers or InProcess()).run(references)
    except BaseException:
        workspace.close()
        raise


def plan_without_catalog(
    references: Iterable[pa.RecordBatch], request: PlanRequest, workers: Workers | None = None
) -> Plan:
    """Plans against a catalog that does not exist yet: everything is new."""
    return plan(references, request, None, None, workers=workers)


class _Planner:
    def __init__(
        self,
        workspace: Workspace,
        request: PlanRequest,
        folder: Folder | None,
        snapshot: Snapshot | None,
        erased: Erased | None,
        workers: Workers,
    ) -> None:
        self._owned, self._workspace = workspace, workspace.path
        self._request = request
        self._folder = folder
        self._files: list[DataFile] = list(snapshot.files.values()) if snapshot else []
        self._version = snapshot.version if snapshot else -1
        self._table = snapshot.schema if snapshot else schema.IMAGES
        self._workers = workers
        self._erased = erased or Erased.of(pa.array([], schema.KEY))

    def run(self, references: Iterable[pa.RecordBatch]) -> Plan:
        listed = self._spread_references(references)
        source = held_as(self._table, listed.columns) if self._files else None
        ledger = self._spread_ledger(source)
        columns = pa.schema([*listed.columns.remove(len(listed.columns) - 1), *schema.PLANNED])
        plan = Plan(self._version, columns, found_text_column=self._request.found_text_column, _workspace=self._owned)
        joined = Spill(self._workspace / "joined", pa.schema([*columns, *JOINED]), NUM_BUCKETS)
        outdated = None if source is None else self._outdated_spill(source, listed)
        join = Join(self._request, joined.columns, tuple(self._files), self._erased, source)
        for bucket in self._join(join, listed, ledger):
            plan.add(bucket)
            joined.append(bucket.rows, buckets_of(bucket.rows))
            if outdated is not None and bucket.outdated is not None:
                self._put_aside(bucket.outdated, outdated)
        joined.close()
        ledger.close()
        shutil.rmtree(self._workspace / "listed")
        last = self._last_position(joined)
        self._order(plan, joined, last)
        shutil.rmtree(self._workspace / "joined")
        if outdated is not None:
            outdated.close()
            plan._outdated = _Outdated(outdated, pa.array([file.path for file in self._files]), last)
            for rows in plan.outdated():
                plan.num_outdated += rows.num_rows
                misstated = Counter({"alt_text": pc.sum(rows["_misstated"]).as_py()})
                plan.outdated_columns += count_by_column(rows) + misstated
        return plan

    def _join(self, join: Join, listed: Spill, ledger: Ledger) -> Iterator[Joined]:
        filled = (bucket for bucket in range(NUM_BUCKETS) if listed.holds(bucket))
        yield from self._workers.map(join, ((listed.read(bucket), *ledger.part(bucket)) for bucket in filled))

    def _spread_references(self, references: Iterable[pa.RecordBatch]) -> Spill:
        spill: Spill | None = None
        position = 0
        for batch in references:
            rows = pa.Table.from_batches([batch])
            if spill is None:
                spill = Spill(self._workspace / "listed", rows.schema.append(POSITION), NUM_BUCKETS)
            positions = np.arange(position, position + rows.num_rows)
            position += rows.num_rows
            spill.append(rows.append_column(POSITION, pa.array(positions)), buckets_of(rows))
        if spill is None:
            spill = Spill(self._workspace / "listed", schema.REFERENCE.append(POSITION), NUM_BUCKETS)
        spill.close()
        return spill

    def _spread_ledger(self, source: pa.Field | None) -> Ledger:
        numbers = list(range(len(self._files)))
        asked = self._request
        files, column = tuple(self._files), asked.found_text_column
        read = ReadLedger(self._folder, files, asked.detections, source, asked.read_before, column)
        return self._workers.spread(read, numbers, self._workspace / "ledger", ledger_columns(source))

    def _outdated_spill(self, source: pa.Field, listed: Spill) -> Spill:
        # At most as much as is listed is held otherwise, and about as much is held instead.
        num_groups = _num_groups(self._num_live_rows(), 2 * listed.num_bytes)
        return Spill(self._workspace / "outdated", outdated_columns(source), num_groups)

    def _put_aside(self, rows: pa.Table, outdated: Spill) -> None:
        """Spreads outdated rows over groups of files, some at a time: texts may be long."""
        groups = self._groups_of_files(outdated.num_parts)
        for start in range(0, rows.num_rows, _ROWS_PER_GROUP):
            some = rows.slice(start, _ROWS_PER_GROUP)
            outdated.append(some, groups[some["_file"].to_numpy()])

    def _order(self, plan: Plan, joined: Spill, last: int) -> None:
        """Puts the planned rows into the order of the pipeline, within the limit.

        Args:
            last: the position of the last image within it.
        """
        total = plan.num_listed + plan.num_duplicates + plan.num_erased  # as many as there are positions
        new = Spill(self._workspace / "new-unordered", joined.columns, _num_groups(total, joined.num_bytes))
        num_groups = _num_groups(self._num_live_rows(), joined.num_bytes)
        again = Spill(self._workspace / "again-unordered", joined.columns, num_groups)
        groups = self._groups_of_files(again.num_parts)
        for rows in joined.tables():
            rows = rows.filter(pc.less_equal(rows["_position"], last))
            is_new = pc.equal(rows["_file"], NO_FILE)
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
        fill = FillPrevious(self._folder, tuple(self._files)) if name == "again" else None
        parts = range(unordered.num_parts)
        tables = (_sorted_by(unordered.read(part), by) for part in parts)
        filled = self._workers.map(fill, ((rows,) for rows in tables)) if fill else tables
        for part, rows in zip(parts, filled, strict=True):
            ordered.append(rows.select(plan.schema.names), np.full(rows.num_rows, part))
            plan.num_planned += rows.num_rows
            plan.num_fresh += rows.num_rows - (pc.sum(rows["failed_before"]).as_py() or 0)
        ordered.close()
        shutil.rmtree(self._workspace / f"{name}-unordered")
        return ordered

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
        # One without a count, of another program, would come after the last.
        groups: npt.NDArray[np.int64] = before[:-1] * num_groups // max(int(before[-1]), 1)
        return groups.clip(max=num_groups - 1)


def _num_groups(num_rows: int, num_bytes: int) -> int:
    return min(256, max(num_rows // _ROWS_PER_GROUP, num_bytes // _BYTES_PER_GROUP) + 1)


def _sorted_by(rows: pa.Table, columns: list[str]) -> pa.Table:
    order = pc.sort_indices(rows.select(columns), sort_keys=[(column, "ascending") for column in columns])
    return taken(rows, order.to_numpy().astype(np.int64))
