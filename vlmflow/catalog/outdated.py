"""Rows that hold the caller's columns of an earlier listing: planning finds them, and a run brings them up to date.

Stored values are compared with those of the listing, column by column: so sources with different columns leave each
other's alone, and a row that is up to date is never written. Beside the caller's columns, nothing of a row changes but
``updated_at``, by which readers of the table know that it did, and an alternative text that quotes one of them. Rows
whose alternative text alone is not what it should be are found and brought up to date in the same way.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vlmflow import schema
from vlmflow.catalog.added import AddedKeys
from vlmflow.catalog.columns import conform, conform_column, flat, grown, member, source_columns, storable, taken
from vlmflow.catalog.commit import Change, CommitRequest, commit
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.keys import digest_of, index_of, to_binary, to_words
from vlmflow.catalog.log import DataFile, Snapshot, TableLog
from vlmflow.catalog.masks import Mask, alike, is_valid
from vlmflow.catalog.merge import overlaid
from vlmflow.catalog.read import read_rows
from vlmflow.catalog.rows import DOUBTED, TEXTS, doubtful, restated
from vlmflow.catalog.writer import write_file
from vlmflow.threads import Threads

# That are compared: a bucket has many more, and texts of any length.
_ROWS_AT_ONCE, _BYTES_AT_ONCE = 1 << 16, 64 * 1024 * 1024
_FILES_AT_ONCE = 3  # that are rewritten: a store answers late
_MADE_OF = tuple(name for name in TEXTS if name not in DOUBTED)  # beside what was found in the image


def held_as(table: pa.Schema, listed: pa.Schema) -> pa.Field:
    """The caller's columns of a listing, as the images table holds them or would; there may be none.

    Raises:
        CatalogError: a type cannot be stored.
    """
    columns = source_columns(listed)
    # Of a column that lists nulls alone the table's type is the only one; where it has none, there is nothing to hold.
    types = {field.name: field.type for field in storable(columns)}
    for field in source_columns(table):
        types[field.name] = grown(field.type, types.get(field.name, field.type))
    fields = [pa.field(name, types[name]) for name in columns.names if name in types]
    return pa.field("source", pa.struct(fields))


def find_outdated(
    images: pa.Table, held: pa.Table, at: npt.NDArray[np.int64], asked: Mask, source: pa.Field, misstated: Mask
) -> Iterator[tuple[npt.NDArray[np.int64], pa.Table]]:
    """The images whose live row holds other values of the caller's columns than the listing, or is misstated.

    Args:
        images: as listed.
        held: live rows, their ``source`` as ``source`` says; ``at[i]`` is that of image i.
        asked: the images that are looked at.
        misstated: those whose live row has another alternative text than it should.

    Yields:
        Their numbers among the images, and ``source`` and ``previous`` of each.

    Raises:
        CatalogError: a value does not become the type that the table holds.
    """
    if not source.type.num_fields:
        asked = asked & misstated
    if not asked.any():
        return
    ours, theirs = pa.table({"source": conform_column(images, source)}), held.select(["source"])
    step = min(_rows_at_once(ours), _rows_at_once(theirs))
    rows = np.flatnonzero(asked)
    for some in np.split(rows, range(step, len(rows), step)):
        pairs = {"source": taken(ours, some)["source"], "previous": taken(theirs, at[some])["source"]}
        first = 0
        for both in pa.table(pairs).to_batches():
            numbers = some[first : first + both.num_rows]
            other = ~_all_alike(both["previous"], both["source"]) | misstated[numbers]
            yield numbers[other], pa.Table.from_batches([both]).filter(pa.array(other))
            first += both.num_rows


def find_misstated(
    folder: Folder, file: DataFile, rows: pa.Table, source: pa.Field | None, found_text_column: str | None
) -> Mask:
    """The rows of a file whose alternative text is not what it should be, as :func:`restated` tells.

    It reads no more than it must: uris and captions only where a row that has a caption is in doubt, and nothing where
    no text is quoted and all such rows are of versions with alternative texts.

    Args:
        rows: all of the file's; of `caption_fingerprint` and `read_at`, and with a ``source`` of that and
            :data:`DOUBTED`, the columns that the file has.
        source: the caller's columns, of which alternative texts quote ``found_text_column``; None: they quote none.

    Raises:
        CatalogError: the file cannot be read.
    """
    marks = np.zeros(rows.num_rows, np.bool_)
    captioned = _known(rows, schema.fingerprint_column("caption"))
    if source is None and not (captioned & ~_known(rows, "read_at")).any():  # null in rows of older versions
        return marks
    held = rows if source is not None else read_rows(folder, "images", file, DOUBTED)
    columns = [schema.IMAGES.field(name) for name in DOUBTED]
    texts = conform(held, pa.schema(columns if source is None else [*columns, source]))
    doubted = np.flatnonzero(captioned & doubtful(texts, found_text_column))
    if len(doubted):
        made_of = read_rows(folder, "images", file, _MADE_OF)
        for name in _MADE_OF:
            texts = texts.append_column(name, made_of[name])
        marks[doubted[restated(taken(texts, doubted), found_text_column)[0]]] = True
    return marks


def _known(rows: pa.Table, column: str) -> Mask:
    return is_valid(conform_column(rows, schema.IMAGES.field(column)))


def _rows_at_once(rows: pa.Table) -> int:
    some: int = rows.num_rows * _BYTES_AT_ONCE // max(rows.nbytes, 1)
    return max(1, min(_ROWS_AT_ONCE, some))


def count_by_column(rows: pa.Table) -> Counter[str]:
    """By column of the caller's, the outdated rows in which it is another now."""
    counts: Counter[str] = Counter()
    for some in rows.select(["source", "previous"]).to_batches(max_chunksize=_ROWS_AT_ONCE):
        alike_in = _alike_by_column(some["previous"], some["source"])
        counts += Counter({name: int((~same).sum()) for name, same in alike_in.items()})
    return counts


def _all_alike(left: pa.StructArray, right: pa.StructArray) -> Mask:
    same: Mask = np.ones(len(right), np.bool_)
    for alike_in in _alike_by_column(left, right).values():
        same &= alike_in
    return same


def _alike_by_column(left: pa.StructArray, right: pa.StructArray) -> dict[str, Mask]:
    """By field of ``right``. No struct at all, as of a source without columns, says the same as one of nulls."""
    names = [field.name for field in right.type]
    return {name: alike(member(left, name), member(right, name)) for name in names}


def update_columns(
    log: TableLog, added: AddedKeys, run_id: str, groups: Iterable[pa.Table], found_text_column: str | None = None
) -> Iterator[tuple[int, int]]:
    """Brings the caller's columns of outdated rows up to date: one commit for each group of them.

    Args:
        added: keys that the table has got since planning; it is of no use to others afterwards.
        groups: outdated rows, all those of a live file in one: ``image_id``, the caller's columns as listed in
            ``source`` and as the row held them at planning in ``previous``, and ``live_file``, where it was then.
        found_text_column: that alternative texts quote.

    Yields:
        After each commit the rows of its group, and how many of these it has changed. The others are gone, or another
        writer has changed their columns since planning: its word is the newer one.

    Raises:
        CommitError, RunRevokedError: as :func:`vlmflow.catalog.commit.commit`.
        CatalogError: a file of the table cannot be read.
    """
    for number, rows in enumerate(groups):
        changes = _Changes(log.folder, added, run_id, rows, found_text_column)
        commit_id = digest_of(run_id, "columns", str(number))
        done = commit(log, CommitRequest(commit_id, run_id, "columns", log.refresh().version), changes.propose)
        if not done.repeated:
            log.delete_leftovers(changes.leftovers())
        yield rows.num_rows, changes.num_changed


class _Changes:
    """Decides on a snapshot which files are rewritten. One object per commit."""

    def __init__(
        self, folder: Folder, added: AddedKeys, run_id: str, rows: pa.Table, found_text_column: str | None
    ) -> None:
        self._folder, self._added, self._run_id = folder, added, run_id
        self._found_text_column = found_text_column
        self._rows = rows
        self._keys = to_binary(rows["image_id"])
        self._planned = flat(rows["live_file"]).dictionary_encode()
        # By the path of the file in whose place it comes, which never changes; with the rows that are new in it.
        self._written: dict[str, tuple[DataFile, int] | None] = {}
        self._committed: set[str] = set()
        self.num_changed = 0

    def propose(self, snapshot: Snapshot) -> Change:
        """See :func:`vlmflow.catalog.commit.commit`."""
        self._added.refresh(snapshot)
        # A row whose file is not live, and that is in none that came since, was erased, or rolled back.
        rows = {path: numbers for path, numbers in self._by_file() if path in snapshot.files}
        unread = [path for path in rows if path not in self._written]
        with Threads(_FILES_AT_ONCE) as pool:
            new = pool.map(lambda path: self._rewrite(snapshot.files[path], rows[path], snapshot.schema), unread)
            self._written.update(zip(unread, new, strict=True))
        changed = {path: written for path in rows if (written := self._written[path]) is not None}
        self._committed = {file.path for file, _ in changed.values()}
        self.num_changed = sum(count for _, count in changed.values())
        return Change(tuple(file for file, _ in changed.values()), tuple(snapshot.files[path] for path in changed))

    def leftovers(self) -> list[str]:
        """What was written for versions on which the commit did not come about, relative to the catalog."""
        written = {held[0].path for held in self._written.values() if held is not None}
        return [f"images/{path}" for path in sorted(written - self._committed)]

    def _by_file(self) -> Iterator[tuple[str, npt.NDArray[np.int64]]]:
        """The files that hold the rows now, each with the numbers of its rows."""
        paths: list[str] = self._planned.dictionary.to_pylist()
        moved = self._added.locate(self._keys)
        files = np.where(moved >= 0, moved + len(paths), self._planned.indices.to_numpy())
        order = np.argsort(files, kind="stable")
        for numbers in np.split(order, np.flatnonzero(np.diff(files[order])) + 1):
            file = int(files[numbers[0]])
            yield paths[file] if file < len(paths) else self._added.path(file - len(paths)), numbers

    def _rewrite(
        self, file: DataFile, numbers: npt.NDArray[np.int64], columns: pa.Schema
    ) -> tuple[DataFile, int] | None:
        """Copies a live file with the new columns; None: nothing in it is to be changed."""
        live = conform(read_rows(self._folder, "images", file), columns)
        keys = to_binary(live["image_id"])
        at = index_of(keys).find(*to_words(self._keys.take(pa.array(numbers))))
        assert (at >= 0).all(), f"{file.path} holds them"
        news, names = np.zeros(len(at), np.bool_), [*TEXTS]
        if "source" in live.column_names:
            new, change, news = self._sources(live, at, taken(self._rows, numbers))
            at, names = at[change], [*TEXTS, "source"]
            live = _with_values(live, at, new)
        # A row that is here for its alternative text alone may have got that from another writer since planning.
        stale, texts = restated(taken(live.select(names), at), self._found_text_column)
        live = _with_values(live, at[stale], pa.table(texts))
        news[stale] = True
        if not news.any():
            return None
        now = pa.repeat(pa.scalar(dt.datetime.now(dt.UTC), schema.TIMESTAMP), int(news.sum()))
        live = _with_values(live, at[news], pa.table({"updated_at": now}))
        written = write_file(self._folder, "images", live, file.ingest_date, self._run_id)
        if file.path in self._planned.dictionary.to_pylist():  # whose rows are all in this group
            self._added.skip(written.path)
        else:
            self._added.tell(written.path, keys)
        return written, int(news.sum())

    def _sources(self, live: pa.Table, at: npt.NDArray[np.int64], asked: pa.Table) -> tuple[pa.Table, Mask, Mask]:
        """The new ``source`` of rows, which of the rows ``at`` these are, and in which of these it is another."""
        sources = pa.table(
            {
                "theirs": taken(live.select(["source"]), at)["source"],
                "previous": asked["previous"],
                "ours": conform_column(asked, live.schema.field("source")),
            }
        )
        own = [field.name for field in asked.schema.field("source").type]
        masks, new, news = [], [], []
        for some in sources.to_batches():
            # What another writer has put there since planning stays.
            change = _all_alike(some["theirs"], some["previous"])
            values = overlaid(some["theirs"], some["ours"], dict.fromkeys(own, change))
            new.append(values.filter(pa.array(change)))
            masks.append(change)
            news.append(~_all_alike(some["ours"], some["previous"])[change])
        return pa.table({"source": pa.chunked_array(new)}), np.concatenate(masks), np.concatenate(news)


def _with_values(rows: pa.Table, at: npt.NDArray[np.int64], values: pa.Table) -> pa.Table:
    """Rows with other values of some columns where ``at`` says."""
    old = rows.select(values.column_names)
    order = np.arange(rows.num_rows)
    order[at] = rows.num_rows + np.arange(len(at))
    new = taken(pa.concat_tables([old, values.cast(old.schema)]), order)
    for name in new.column_names:
        rows = rows.set_column(rows.schema.get_field_index(name), rows.schema.field(name), new[name])
    return rows
