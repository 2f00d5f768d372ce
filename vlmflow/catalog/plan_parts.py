"""The parts of planning that are apart from each other, and where they run. All of them can be pickled."""

from __future__ import annotations

import datetime as dt
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from vlmflow import schema
from vlmflow.catalog.columns import conform, conform_column, flat, taken
from vlmflow.catalog.detections import Detection, holds_all
from vlmflow.catalog.due import LACKS_DETECTIONS, LEDGER, READ_LONG_AGO, Due, PlanRequest, decide
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.history import CLOCKS_DIFFER
from vlmflow.catalog.keys import duplicates, index_of, num_repeated, to_binary, to_words
from vlmflow.catalog.log import DataFile
from vlmflow.catalog.masks import Mask, alike, as_mask, equal, is_valid
from vlmflow.catalog.outdated import find_misstated, find_outdated
from vlmflow.catalog.read import read_rows
from vlmflow.catalog.rows import DOUBTED
from vlmflow.catalog.spill import Spill
from vlmflow.catalog.tombstones import Erased
from vlmflow.errors import SourceError
from vlmflow.threads import Threads

NUM_BUCKETS = 64  # at 50 million images one holds 800,000 of them
NO_FILE = -1

# Columns that travel with the references and the ledger while they are joined.
POSITION = pa.field("_position", pa.int64())  # in the listing
_FILE = pa.field("_file", pa.int32())  # number of the live file
_MISSTATED = pa.field("_misstated", pa.bool_())  # its alternative text is not what it should be
LEDGER_COLUMNS = pa.schema(
    [
        *(schema.IMAGES.field(name) for name in LEDGER),
        (LACKS_DETECTIONS, pa.bool_()),
        (READ_LONG_AGO, pa.bool_()),
        _MISSTATED,
        _FILE,
    ]
).remove_metadata()
_ONLY_RECHECKED = pa.field("_only_rechecked", pa.bool_())  # see vlmflow.catalog.due.Due
JOINED = pa.schema([POSITION, _FILE, _ONLY_RECHECKED])
_WANTED = pa.field("_wanted", pa.bool_())  # it goes into the pipeline, unless a limit leaves it out


def ledger_columns(source: pa.Field | None) -> pa.Schema:
    """What is read of the table, with the caller's columns of the listing."""
    return LEDGER_COLUMNS if source is None else LEDGER_COLUMNS.append(source)


def outdated_columns(source: pa.Field) -> pa.Schema:
    """What joining gives of rows whose columns of the caller's are those of an earlier listing."""
    named = [("image_id", pa.string()), source, source.with_name("previous")]
    return pa.schema([*named, POSITION, _FILE, _WANTED, _MISSTATED])


_OF_READ = tuple(field.name for field in schema.READ)
_FILES_AHEAD = 8  # a store answers late, but many at once
_COMPARED = 1 << 14  # rows at a time


def buckets_of(rows: pa.Table) -> npt.NDArray[np.int64]:
    """The bucket of each row, by the first bits of its key."""
    high, _ = to_words(to_binary(rows["image_id"]))
    return (high >> np.uint64(64 - (NUM_BUCKETS - 1).bit_length())).astype(np.int64)


@dataclass(frozen=True)
class ReadLedger:
    """Reads what the ledger says in one file of the images table.

    Attributes:
        detections: that a row must hold; none: nothing of them is read.
        source: the caller's columns that are read; None: none are.
        read_before: the time that says which images were last read long ago; None: nobody asks.
        found_text_column: of the caller's, that alternative texts quote; None: the job names none.
    """

    folder: Folder | None
    files: tuple[DataFile, ...]
    detections: tuple[Detection, ...] = ()
    source: pa.Field | None = None
    read_before: dt.datetime | None = None
    found_text_column: str | None = None

    def __call__(self, number: int) -> pa.Table:
        """The rows of a file, given by its number, as :func:`ledger_columns`.

        Raises:
            CatalogError: the file cannot be read.
        """
        assert self.folder is not None
        columns = (*LEDGER, "read_at", "detections") if self.detections else (*LEDGER, "read_at")
        is_quoting = self.source is not None and self.source.type.get_field_index(self.found_text_column or "") >= 0
        columns += DOUBTED if is_quoting else ()
        if self.source is not None:
            columns += tuple(f"source.{field.name}" for field in self.source.type)
        file = self.files[number]
        rows = read_rows(self.folder, "images", file, columns)
        if self.detections:
            held = conform_column(rows, schema.IMAGES.field("detections"))  # null in files older than the column
            rows = rows.append_column(LACKS_DETECTIONS, pa.array(~holds_all(held, self.detections)))
        if self.read_before:
            read_at = conform_column(rows, schema.IMAGES.field("read_at"))  # likewise: then it was long ago
            before = pc.less(read_at, pa.scalar(self.read_before, schema.TIMESTAMP))
            # Read by a clock that was ahead: nobody knows when, and by their own word it would be for long.
            to_come = pc.greater(read_at, pa.scalar(dt.datetime.now(dt.UTC) + CLOCKS_DIFFER, schema.TIMESTAMP))
            rows = rows.append_column(READ_LONG_AGO, pc.fill_null(pc.or_(before, to_come), True))
        quoted = self.source if is_quoting else None
        misstated = find_misstated(self.folder, file, rows, quoted, self.found_text_column)
        rows = rows.append_column(_MISSTATED, pa.array(misstated))
        rows = rows.append_column(_FILE, pa.repeat(pa.scalar(number, pa.int32()), rows.num_rows))
        return conform(rows, ledger_columns(self.source))


@dataclass(frozen=True)
class Joined:
    """What is due of one bucket; the numbers are those of :class:`vlmflow.catalog.plan.Plan`."""

    rows: pa.Table
    num_listed: int
    num_duplicates: int
    num_erased: int
    num_due: int
    num_new: int
    num_unchanged: int
    num_exhausted: int
    num_policy_differs: int
    num_unwatched: int
    num_doubled: int
    counts: Counter[tuple[str, str]]
    outdated: pa.Table | None  # as `outdated_columns`; None: the table holds no files


@dataclass(frozen=True)
class Join:
    """Decides for the images of one bucket.

    Attributes:
        columns: of the rows to give.
        files: of the images table, by number.
        erased: images that are left out as if they were not listed.
        source: the caller's columns that the listing has, as the table holds them; None: there are none.
    """

    request: PlanRequest
    columns: pa.Schema
    files: tuple[DataFile, ...]
    erased: Erased
    source: pa.Field | None = None

    def __call__(self, listed: pa.Table, *ledger: pa.Table) -> Joined:
        """Joins what is listed in a bucket with what the ledger has there, in any number of pieces.

        Raises:
            SourceError: an image is listed twice with different columns.
        """
        once = _once(listed)
        images = self._without_erased(once)
        held = pa.concat_tables([ledger_columns(self.source).empty_table(), *ledger])
        at = index_of(to_binary(held["image_id"])).find(*to_words(to_binary(images["image_id"])))
        live = held.select(LEDGER_COLUMNS.names).take(pa.array(at, mask=at < 0))
        due = decide(images, live, at >= 0, self.request)
        return Joined(
            rows=conform(self._planned(images, live, due), self.columns),
            num_listed=images.num_rows,
            num_duplicates=listed.num_rows - once.num_rows,
            num_erased=once.num_rows - images.num_rows,
            num_due=int(due.wanted.sum()),
            num_new=int((due.new & due.wanted).sum()),
            num_unchanged=due.num_unchanged,
            num_exhausted=due.num_exhausted,
            num_policy_differs=due.num_policy_differs,
            num_unwatched=due.num_unwatched,
            num_doubled=num_repeated(to_binary(images["image_id"]), to_binary(held["image_id"])),
            counts=due.counts,
            outdated=None if self.source is None else self._outdated(images, held, at, due.wanted, self.source),
        )

    def _outdated(
        self, images: pa.Table, held: pa.Table, at: npt.NDArray[np.int64], wanted: Mask, source: pa.Field
    ) -> pa.Table:
        """The images whose live row holds other columns of the caller's: a run brings those of the others along."""
        asked = at >= 0 if self.request.limit is not None else (at >= 0) & ~wanted
        misstated = as_mask(pc.fill_null(held[_MISSTATED.name].take(pa.array(at, mask=at < 0)), False))
        found = list(find_outdated(images, held, at, asked, source, misstated))
        columns = outdated_columns(source)
        if not found:
            return columns.empty_table()
        rows = np.concatenate([numbers for numbers, _ in found])
        values = pa.concat_tables([values for _, values in found])
        told = {
            "image_id": images["image_id"].take(pa.array(rows)),
            "source": values["source"],
            "previous": values["previous"],
            POSITION.name: images[POSITION.name].take(pa.array(rows)),
            _FILE.name: held[_FILE.name].take(pa.array(at[rows])),
            _WANTED.name: pa.array(wanted[rows]),
            _MISSTATED.name: pa.array(misstated[rows]),
        }
        return pa.table(told, schema=columns)

    def _without_erased(self, listed: pa.Table) -> pa.Table:
        gone = self.erased.mask_listed(listed)
        return listed.filter(pa.array(~gone)) if gone.any() else listed

    def _planned(self, listed: pa.Table, live: pa.Table, due: Due) -> pa.Table:
        """The rows of the images that are due, with PLANNED but for what only the files themselves tell."""
        number = pc.fill_null(live["_file"], NO_FILE)
        dates = [self.request.date, *(file.ingest_date for file in self.files)]
        paths = [None, *(file.path for file in self.files)]
        lookup = pc.add(number, 1)
        count = listed.num_rows
        tasks = pa.array([list(self.request.tasks)], pa.list_(pa.string()))
        planned = {
            "due": tasks.take(pa.array(np.zeros(count, np.int64))),
            "due_if_same": _task_lists(due.if_same, count),
            "replaces": pa.array(~due.new),
            "attempts": pa.array(due.attempts),
            "failed_before": pa.array(due.failed_before),
            "ingest_date": pa.array(dates, pa.date32()).take(lookup),
            "live_file": pa.array(paths, pa.string()).take(lookup),
            "previous_version": live["seen_version"],
            _FILE.name: number,
            _ONLY_RECHECKED.name: pa.array(due.only_rechecked),
        }
        rows = listed
        for name, values in planned.items():
            rows = rows.append_column(name, values)
        return rows.filter(pa.array(due.wanted))


@dataclass(frozen=True)
class FillPrevious:
    """Fills in what the pipeline needs of the live rows, which only their files tell."""

    folder: Folder | None
    files: tuple[DataFile, ...]

    def __call__(self, rows: pa.Table) -> pa.Table:
        """The rows, which are in the order of their files, with ``previous_hash``, ``_caption`` and ``_read``.

        Raises:
            CatalogError: a file cannot be read.
        """
        assert self.folder is not None or not rows.num_rows
        parts = []
        numbers = rows["_file"].to_numpy()
        bounds = np.flatnonzero(np.diff(numbers, prepend=NO_FILE, append=NO_FILE))
        for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            assert self.folder is not None
            part = rows.slice(start, end - start)
            file = self.files[int(numbers[start])]
            asked = part[_ONLY_RECHECKED.name]
            names = _OF_READ if pc.any(asked).as_py() else ("content_hash",)
            live = read_rows(self.folder, "images", file, ["image_id", "caption", *names])
            at = index_of(to_binary(live["image_id"])).find(*to_words(to_binary(part["image_id"])))
            live = taken(live, at)
            for column, name in (("previous_hash", "content_hash"), ("previous_caption", "caption")):
                part = part.set_column(part.schema.get_field_index(column), column, live[name])
            if names == _OF_READ:
                read = _previous_read(live, asked)
                part = part.set_column(part.schema.get_field_index("previous_read"), "previous_read", read)
            parts.append(conform(part, rows.schema))
        return pa.concat_tables(parts) if parts else rows


def _previous_read(live: pa.Table, asked: pa.ChunkedArray) -> pa.StructArray:
    """What the live rows say of their bytes; null where it is not asked for, or no server could be asked with it.

    Nor where the version read is another than the validator's: an older program has written the row since, and left
    the validator as it was.
    """
    columns = [flat(conform_column(live, field)) for field in schema.READ]  # null in files older than a column
    version, validator, content_hash = (
        columns[_OF_READ.index(name)] for name in ("object_version", "http_validator", "content_hash")
    )
    wanted = as_mask(asked) & is_valid(content_hash) & equal(pc.utf8_trim(validator, '"'), version)
    return pa.StructArray.from_arrays(columns, fields=list(schema.READ), mask=pa.array(~wanted))


class Ledger(Protocol):
    """The rows of the ledger, spread over the buckets."""

    def part(self, bucket: int) -> Sequence[Any]:
        """What :meth:`Workers.map` passes on as the tables of one bucket."""
        ...

    def close(self) -> None:
        """Gives back what holds the rows."""
        ...


class Workers(Protocol):
    """Where the parts of planning run."""

    def spread(
        self, read: Callable[[int], pa.Table], numbers: Sequence[int], folder: Path, columns: pa.Schema
    ) -> Ledger:
        """Reads every number's rows and spreads them over the buckets.

        Args:
            folder: one that may be made on the local disk.
        """
        ...

    def map(self, function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """The function's results, in the order of the arguments, which are asked for as they are needed."""
        ...


class InProcess:
    """Runs everything in this process, one part after the other; the ledger waits on the local disk."""

    def spread(
        self, read: Callable[[int], pa.Table], numbers: Sequence[int], folder: Path, columns: pa.Schema
    ) -> Ledger:
        """See :class:`Workers`; the next files are read meanwhile."""
        spill = Spill(folder, columns, NUM_BUCKETS)
        with Threads(_FILES_AHEAD) as pool:
            pending: deque[Future[pa.Table]] = deque()
            for number in numbers:
                pending.append(pool.submit(read, number))
                if len(pending) > _FILES_AHEAD:
                    _put(spill, pending.popleft())
            while pending:
                _put(spill, pending.popleft())
        spill.close()
        return _OnDisk(spill, folder)

    def map(self, function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """See :class:`Workers`."""
        return (function(*some) for some in arguments)


def _put(spill: Spill, read: Future[pa.Table]) -> None:
    rows = read.result()
    spill.append(rows, buckets_of(rows))


@dataclass(frozen=True)
class _OnDisk:
    spill: Spill
    folder: Path

    def part(self, bucket: int) -> Sequence[pa.Table]:
        return (self.spill.read(bucket),)

    def close(self) -> None:
        shutil.rmtree(self.folder)


def _once(listed: pa.Table) -> pa.Table:
    """The first listing of each image."""
    again = duplicates(to_binary(listed["image_id"]))
    if not again.any():
        return listed
    first, repeated = listed.filter(pa.array(~again)), listed.filter(pa.array(again))
    at = index_of(to_binary(first["image_id"])).find(*to_words(to_binary(repeated["image_id"])))
    _check_equal(taken(first, at), repeated)
    return first


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
    for start in range(0, first.num_rows, _COMPARED):
        one, other = (rows.slice(start, _COMPARED) for rows in (first, repeated))
        same = np.logical_and.reduce([alike(flat(one[name]), flat(other[name])) for name in names])
        examples += one["uri"].filter(pa.array(~same)).to_pylist()
    if examples:
        raise SourceError(
            f"{len(examples)} images are listed twice with different columns, such as {', '.join(examples[:3])}",
            remedy="Name a key column (source.key_column) that tells them apart, or remove the repetitions.",
        )
