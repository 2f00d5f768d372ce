"""What has changed in a catalog since a version of it, row by row: for readers that follow it.

``updated_at`` does not serve for that: it is when a row was computed, and a row that is computed before a reader looks
may be committed after it. Versions of the images table order what was committed. Rows are compared by their values,
file by file: those of the files that the newest version has and the earlier one had not, with those of the files that
it had and the newest one has not. What a vacuum or an erasure has taken away of these is not known any more: then a
row counts as changed, and what was erased is told by the tombstones. So a reader may be told of a row that is as he
has it, or of one that he never had; never too little.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vlmflow.catalog.columns import conform, flat, member, source_columns, taken
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.keys import KeyIndex, concat, duplicates, index_of, to_binary, to_words
from vlmflow.catalog.log import DataFile, Snapshot
from vlmflow.catalog.masks import Mask, alike
from vlmflow.catalog.read import files_by_date, read_each, read_rows, readable
from vlmflow.errors import CatalogChangedError, ConfigError
from vlmflow.threads import Threads

ADDED, CHANGED, REMOVED = "added", "changed", "removed"
# What every run moves, or that only the next run looks at: nobody is told of a row for it unless he asks.
BOOKKEEPING = frozenset(
    {"run_id", "read_at", "updated_at", "attempts", "attempt_digest", "seen_version", "http_validator"}
)
_VECTORS = "embed_run_id"  # moves with the vectors
_FIRST = ("image_id", "uri")
_READ_AT_ONCE = 8
_PIECE_BYTES = 128 * 1024 * 1024  # of rows that are compared at a time
_CACHED_BYTES = 256 * 1024 * 1024  # of files of the earlier version

Positions = npt.NDArray[np.int64]


@dataclass
class ChangeCounts:
    """What was found.

    Attributes:
        num_changed: those of which it is not known any more how they were, and whether they were, included.
        num_unknown: these.
        columns: rows by the column that differs; one of the caller's as ``source.NAME``.
        decisions: rows by the decision before and now, where it differs.
    """

    num_added: int = 0
    num_changed: int = 0
    num_removed: int = 0
    num_unknown: int = 0
    columns: Counter[str] = field(default_factory=Counter)
    decisions: Counter[tuple[str, str]] = field(default_factory=Counter)


class Changes:
    """The rows that differ between an earlier version of the images table and a newer one.

    Args:
        before: the files of the earlier version, by path.
        columns: top-level columns to compare and to give out; None: all, and all but bookkeeping compared.
        erased: the images that were erased or let come back since the earlier version, as ``schema.KEY``.

    Attributes:
        counts: of the rows that :meth:`tables` has given out.
        schema: of these.
        new_vectors: the images that it has given out and whose vectors are others than before, as ``schema.KEY``.
        is_read: it has given out all.

    Raises:
        ConfigError: the table has no such column.
    """

    def __init__(
        self,
        folder: Folder,
        before: dict[str, DataFile],
        now: Snapshot,
        columns: Sequence[str] | None,
        erased: Callable[[], pa.Array],
    ) -> None:
        self._folder = folder
        self._erased = erased
        self._old = _by_date(now, {path: file for path, file in before.items() if path not in now.files})
        self._new = _by_date(now, {path: file for path, file in now.files.items() if path not in before})
        self._both = [file for path, file in now.files.items() if path in before]
        held = readable(now.schema)
        if columns is None:
            self._compared = [name for name in held.names if name not in BOOKKEEPING and name not in _FIRST]
            named = held.names
        else:
            _check_columns(held, columns)
            self._compared = list(dict.fromkeys(name for name in columns if name not in _FIRST))
            named = [*_FIRST, *self._compared]
        self._given = [name for name in held.names if name in named]
        self._read = pa.schema([held.field(name) for name in held.names if name in {*named, _VECTORS}])
        self._with_decision = "decision" in self._compared
        fields = [held.field(name).with_nullable(name != "image_id") for name in self._given]
        self.schema = pa.schema(
            [
                fields[0],
                pa.field("change", pa.string(), nullable=False),  # added, changed, removed
                pa.field("changed_columns", pa.list_(pa.string())),  # null: added, removed, or not known any more
                *([pa.field("decision_before", pa.string())] if self._with_decision else []),
                *fields[1:],
            ]
        )
        self.counts = ChangeCounts()
        self.is_read = False
        self._new_vectors: list[pa.Array] = []

    @property
    def new_vectors(self) -> pa.Array:
        """See the class."""
        return concat(self._new_vectors)

    def tables(self) -> Iterator[pa.Table]:
        """The rows that were added or changed as they are now, then of the removed ones their ids; first none.

        Raises:
            CatalogChangedError: an erasure came in between.
        """
        yield self.schema.empty_table()
        removed = self._removed()
        returned = index_of(removed)
        is_back = np.zeros(len(removed), dtype=np.bool_)
        for date, files in self._new.items():
            before = _Before(self._folder, self._old.get(date, []), self._read)
            for _, whole in read_each(self._folder, "images", files, self._read.names, ahead=2):
                for rows in _pieces(conform(whole, self._read)):
                    keys = to_binary(rows["image_id"])
                    back = returned.find(*to_words(keys))
                    is_back[back[back >= 0]] = True
                    yield self._changed(rows, keys, before, back >= 0)
        removed = removed.filter(pa.array(~is_back))
        self.counts.num_removed = len(removed)
        if len(removed):
            ids = pa.array([key.hex() for key in removed.to_pylist()], pa.string())
            columns = {"image_id": ids, "change": pa.repeat(pa.scalar(REMOVED), len(ids))}
            yield pa.table(
                [columns.get(field.name, pa.nulls(len(ids), field.type)) for field in self.schema], schema=self.schema
            )
        self.is_read = True

    def _changed(self, rows: pa.Table, keys: pa.Array, before: _Before, back: Mask) -> pa.Table:
        """Of the rows of one file those that were added or changed."""
        at = before.find(keys)
        held, old = before.rows(at)
        is_known = np.zeros(len(at), dtype=np.bool_)
        is_known[held] = True
        names, differs = self._compare(taken(rows, held), old)
        marks = np.zeros((len(names), len(at)), dtype=np.bool_)
        marks[:, held] = differs
        is_added = (at < 0) & before.is_whole & ~back
        is_unknown = ~is_known & ~is_added
        told = np.flatnonzero(marks.any(axis=0) | ~is_known)
        moved = ~is_known
        moved[held] = ~alike(flat(rows[_VECTORS].take(pa.array(held))), flat(old[_VECTORS]))
        self._new_vectors.append(keys.filter(pa.array(moved)))
        decisions = np.full(len(at), None, dtype=object)
        if self._with_decision:
            decisions[held] = old["decision"].to_numpy(zero_copy_only=False)
        self._count(rows, names, marks, is_added, is_unknown, told, decisions)
        found = taken(rows, told)
        columns = {
            "change": pa.array(np.where(is_added[told], ADDED, CHANGED), pa.string()),
            "changed_columns": _name_lists(names, marks[:, told], ~is_known[told]),
            "decision_before": pa.array(decisions[told], pa.string()),
        }
        arrays = [columns[name] if name in columns else found[name] for name in self.schema.names]
        return pa.table(arrays, schema=self.schema)

    def _compare(self, new: pa.Table, old: pa.Table) -> tuple[list[str], npt.NDArray[np.bool_]]:
        """(C, N) which columns of which rows differ, with the C names: the caller's columns one by one."""
        names: list[str] = []
        differs: list[Mask] = []
        for name in self._compared:
            pairs = {name: (flat(new[name]), flat(old[name]))}
            if name == "source":
                inner = source_columns(self._read).names
                pairs = {f"source.{one}": tuple(member(side, one) for side in pairs[name]) for one in inner}
            for column, (left, right) in pairs.items():
                names.append(column)
                differs.append(~alike(left, right))
        return names, np.array(differs, dtype=np.bool_).reshape(len(names), new.num_rows)

    def _count(
        self,
        rows: pa.Table,
        names: Sequence[str],
        marks: npt.NDArray[np.bool_],
        is_added: Mask,
        is_unknown: Mask,
        told: Positions,
        before: npt.NDArray[np.object_],
    ) -> None:
        self.counts.num_added += int(is_added.sum())
        self.counts.num_unknown += int(is_unknown.sum())
        self.counts.num_changed += len(told) - int(is_added.sum())
        self.counts.columns.update(
            {name: count for name, count in zip(names, marks.sum(axis=1).tolist(), strict=True) if count}
        )
        if self._with_decision:
            moved = np.flatnonzero(marks[names.index("decision")])
            now = rows["decision"].take(pa.array(moved)).to_pylist()
            self.counts.decisions.update(zip(before[moved].tolist(), now, strict=True))

    def _removed(self) -> pa.Array:
        """The images that files of the earlier version held and none of the same date does now; of files that are gone
        those that were erased since, or have come back."""
        removed, is_whole = [], True
        for date, files in self._old.items():
            before = _Before(self._folder, files, self._read)
            is_whole &= before.is_whole
            removed.append(self._unmet(before.keys, self._new.get(date, [])))
        if not is_whole:
            # Whoever is in a file of both versions was erased before them.
            removed.append(self._unmet(self._erased(), self._both))
        keys = concat(removed)
        return keys.filter(pa.array(~duplicates(keys)))

    def _unmet(self, keys: pa.Array, files: Sequence[DataFile]) -> pa.Array:
        """Those of some images that have no row in some files."""
        if not len(keys):
            return keys
        index, is_met = index_of(keys), np.zeros(len(keys), dtype=np.bool_)
        for _, rows in read_each(self._folder, "images", files, ["image_id"], ahead=_READ_AT_ONCE):
            at = index.find(*to_words(to_binary(rows["image_id"])))
            is_met[at[at >= 0]] = True
        return keys.filter(pa.array(~is_met))


class _Before:
    """The rows of one date in files of the earlier version that are not live any more. N: their number.

    Args:
        columns: what is read of rows.

    Attributes:
        keys: (N,) of the rows, as ``schema.KEY``: 40 bytes of each are held, and no more of it than of some files.
        is_whole: no file has been taken away.
    """

    def __init__(self, folder: Folder, files: Sequence[DataFile], columns: pa.Schema) -> None:
        self._folder = folder
        self._columns = columns
        with Threads(_READ_AT_ONCE) as pool:
            found = list(pool.map(self._keys_of, files))
        self._files = [file for file, keys in zip(files, found, strict=True) if keys is not None]
        held = [keys for keys in found if keys is not None]
        self.is_whole = len(held) == len(files)
        self.keys = concat(held)
        self._starts = np.cumsum([0, *map(len, held)])
        self._index: KeyIndex = index_of(self.keys)
        self._cache: OrderedDict[int, tuple[pa.Table | None, int]] = OrderedDict()  # with its bytes
        self._num_cached = 0  # bytes of all

    def find(self, keys: pa.Array) -> Positions:
        """The number of each image's row; -1: it has none, or its file is gone."""
        return self._index.find(*to_words(keys))

    def rows(self, at: Positions) -> tuple[Positions, pa.Table]:
        """Rows by their numbers, those of files that were taken away meanwhile left out; which of ``at`` they are."""
        numbers = np.searchsorted(self._starts, at, side="right") - 1
        places: list[Positions] = [np.empty(0, np.int64)]
        parts = [self._columns.empty_table()]
        for number, rows in self._read(np.unique(numbers[at >= 0]).tolist()):
            if rows is None:
                continue
            mine = np.flatnonzero((at >= 0) & (numbers == number))
            places.append(mine)
            parts.append(taken(rows, at[mine] - self._starts[number]))
        return np.concatenate(places), pa.concat_tables(parts)

    def _keys_of(self, file: DataFile) -> pa.Array | None:
        try:
            return to_binary(read_rows(self._folder, "images", file, ["image_id"])["image_id"])
        except CatalogChangedError:
            return None

    def _read(self, numbers: Sequence[int]) -> list[tuple[int, pa.Table | None]]:
        """The rows of files by their numbers: a compaction has put many into one."""
        unread = [number for number in numbers if number not in self._cache]
        with Threads(_READ_AT_ONCE) as pool:
            for number, rows in zip(unread, pool.map(self._rows_of, unread), strict=True):
                self._cache[number] = rows, 0 if rows is None else rows.nbytes
                self._num_cached += self._cache[number][1]
        found = []
        for number in numbers:
            self._cache.move_to_end(number)
            found.append((number, self._cache[number][0]))
        while len(self._cache) > 1 and self._num_cached > _CACHED_BYTES:
            self._num_cached -= self._cache.popitem(last=False)[1][1]
        return found

    def _rows_of(self, number: int) -> pa.Table | None:
        try:
            rows = read_rows(self._folder, "images", self._files[number], self._columns.names)
        except CatalogChangedError:
            return None
        return conform(rows, self._columns)


def _by_date(table: Snapshot, files: dict[str, DataFile]) -> dict[dt.date, list[DataFile]]:
    return files_by_date(Snapshot(table.version, table.number, files, table.schema))


def _pieces(rows: pa.Table) -> Iterator[pa.Table]:
    """The rows, so many at a time as can be in one piece: callers' texts may be of any length."""
    step = max(1, rows.num_rows * _PIECE_BYTES // max(1, rows.nbytes))
    yield from (rows.slice(start, step) for start in range(0, rows.num_rows, step))


def _name_lists(names: Sequence[str], marks: npt.NDArray[np.bool_], is_null: Mask) -> pa.Array:
    """For each row the names of the columns that (C, N) marks name."""
    _, at = np.nonzero(marks.T)
    ends = np.cumsum([0, *marks.sum(axis=0).tolist()])
    values = pa.array(names, pa.string()).take(pa.array(at))
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), values, mask=pa.array(is_null))


def _check_columns(held: pa.Schema, columns: Sequence[str]) -> None:
    unknown = [name for name in columns if name not in held.names]
    if unknown:
        remedy = f"It has {', '.join(held.names)}."
        if any(name.startswith("source.") for name in unknown):  # as what changed in them is told
            remedy = "Name `source`: all of the caller's columns are in it."
        raise ConfigError(f"the catalog has no column {', '.join(map(repr, unknown))}", remedy=remedy)
