"""Reading the live rows, file by file: the list of files comes from the log, never from the folder."""

from __future__ import annotations

import datetime as dt
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from vlmflow import schema
from vlmflow.catalog.as_written import as_written
from vlmflow.catalog.columns import conform, flat
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.judged import decided
from vlmflow.catalog.keys import KeyIndex, concat, index_of, to_binary, to_words
from vlmflow.catalog.log import DataFile, Snapshot, TableLog, TableName
from vlmflow.errors import CatalogError
from vlmflow.threads import Threads

_SMALL_AHEAD, _SMALL_BYTES = 8, 32 * 1024 * 1024  # so many files are read ahead that have no more bytes together
_CLAIMED_BY = ("image_id", "embed_run_id", "view")  # what :meth:`References.claim` reads


def read_rows(folder: Folder, table: TableName, file: DataFile, columns: Sequence[str] | None = None) -> pa.Table:
    """Reads one file of a table, with the partition's date as its last column unless ``columns`` leaves it out.

    Columns that were added to the table after the file was written are not in the result, but for those of ours that
    are asked for by name: these are null. A decision that is none is `review`, whoever wrote it.

    Raises:
        CatalogError: the file is damaged, not there, has a column of another type, or lacks one without which a row is
            none; CatalogChangedError: another has replaced it since.
    """
    wanted = None if columns is None else [name for name in columns if name != "ingest_date"]
    path = f"{table}/{file.path}"
    rows = as_written(folder.read_parquet(path, wanted), folder, path)
    rows = _whole(rows, folder, table, file, wanted)
    if columns is not None and "ingest_date" not in columns:
        return rows
    rows = rows.drop_columns("ingest_date") if "ingest_date" in rows.column_names else rows  # of another program's
    return rows.append_column("ingest_date", pa.repeat(pa.scalar(file.ingest_date, pa.date32()), rows.num_rows))


def _whole(rows: pa.Table, folder: Folder, table: TableName, file: DataFile, wanted: Sequence[str] | None) -> pa.Table:
    """With what every row of ours has, though another program wrote the file."""
    held, fields = set(rows.column_names), schema.IMAGES if table == "images" else schema.EMBEDDINGS
    for field in fields:
        if field.name == "ingest_date" or (wanted is not None and field.name not in wanted):
            continue
        is_needed = not field.nullable and field.name != "decision"
        if is_needed and (field.name not in held or rows[field.name].null_count):
            raise CatalogError(
                f"{folder.config.uri}: {table}/{file.path} has rows without {field.name}",
                remedy="Another program wrote them: have it delete them, or restore the version before.",
            )
        if field.name not in held and (field.name == "decision" or wanted is not None):
            rows = rows.append_column(field, pa.nulls(rows.num_rows, field.type))
    if table == "images" and "decision" in rows.column_names:
        at = rows.schema.get_field_index("decision")
        rows = rows.set_column(at, "decision", decided(rows["decision"]))
    return rows


def read_each(
    folder: Folder, table: TableName, files: Iterable[DataFile], columns: Sequence[str] | None, *, ahead: int
) -> Iterator[tuple[DataFile, pa.Table]]:
    """Reads files one after the other, the next ``ahead`` of them meanwhile: a store answers late, but many at once.

    Of small files more: a catalog of years has thousands.
    """
    with Threads(max(ahead, _SMALL_AHEAD)) as pool:
        pending: deque[tuple[DataFile, Future[pa.Table]]] = deque()
        for file in files:
            pending.append((file, pool.submit(read_rows, folder, table, file, columns)))
            are_small = sum(waiting.size_bytes for waiting, _ in pending) <= _SMALL_BYTES
            if len(pending) > (max(ahead, _SMALL_AHEAD) if are_small else ahead):
                first, rows = pending.popleft()
                yield first, rows.result()
        for first, rows in pending:
            yield first, rows.result()


def image_batches(folder: Folder, images: Snapshot, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """The live rows of the images table; first an empty table, so that there is always one.

    Args:
        columns: names of top-level columns; None: all.
    """
    wanted = _select(readable(images.schema), columns)
    yield wanted.empty_table()
    for _, rows in read_each(folder, "images", images.files.values(), wanted.names, ahead=2):
        yield conform(rows, wanted)


def images_named(folder: Folder, images: Snapshot, names: pa.Array, columns: Sequence[str]) -> pa.Table:
    """The live rows whose image id or uri is among some names; of files without one no other column is read."""
    wanted = _select(readable(images.schema), columns)
    found = [wanted.empty_table()]
    for file, keys in read_each(folder, "images", images.files.values(), ["image_id", "uri"], ahead=8):
        hits = pc.or_(pc.is_in(keys["image_id"], value_set=names), pc.is_in(keys["uri"], value_set=names))
        if pc.any(hits).as_py():
            found.append(conform(read_rows(folder, "images", file, wanted.names), wanted).filter(hits))
    return pa.concat_tables(found)


def embedding_batches(
    folder: Folder,
    images: Snapshot,
    embeddings: Snapshot,
    columns: Sequence[str] | None = None,
    of: KeyIndex | None = None,
) -> Iterator[pa.Table]:
    """The embeddings that live image rows refer to, one per image and view; first an empty table.

    A run that was killed may have left vectors that nothing refers to, or the same ones twice: they are passed over.

    Args:
        columns: names of top-level columns; None: all. Others are read as far as they tell which rows count.
        of: images; those of others are left out, and of files only the row groups read that hold one. None: of all.
    """
    wanted = _select(embeddings.schema, columns)
    yield wanted.empty_table()
    if of is not None:
        yield from _embeddings_of(folder, images, embeddings, wanted, of)
        return
    read = list(dict.fromkeys([*wanted.names, *_CLAIMED_BY]))
    ahead = 1 if "vector" in read else 8  # vectors are large
    for date, files in files_by_date(embeddings).items():
        references = References(folder, images, date)
        for _, rows in read_each(folder, "embeddings", files, read, ahead=ahead):
            yield conform(rows.filter(pa.array(references.claim(rows))), wanted)


def _embeddings_of(
    folder: Folder, images: Snapshot, embeddings: Snapshot, wanted: pa.Schema, of: KeyIndex
) -> Iterator[pa.Table]:
    columns = ["image_id", *(name for name in wanted.names if name not in ("image_id", "ingest_date"))]
    for date, files in files_by_date(embeddings).items():
        references: References | None = None
        for file, keys in read_each(folder, "embeddings", files, _CLAIMED_BY, ahead=8):
            asked = of.find(*to_words(to_binary(keys["image_id"]))) >= 0
            if not asked.any():
                continue
            if references is None:
                references = References(folder, images, date)
            places = np.flatnonzero(asked)[references.claim(keys.filter(pa.array(asked)))]
            if len(places):
                path = f"embeddings/{file.path}"
                rows = as_written(folder.read_parquet_at(path, columns, places, OrderedDict(), 0), folder, path)
                dates = pa.repeat(pa.scalar(date, pa.date32()), rows.num_rows)
                yield conform(rows.append_column("ingest_date", dates), wanted)


def of_one_time(images: TableLog, embeddings: TableLog) -> tuple[Snapshot, Snapshot]:
    """Versions of both tables that were the newest at one time.

    Vectors that rows of the one refer to are in the other. Read one after the other they may not: in between a run may
    have put rows with vectors of its own in the place of these, and a compaction have dropped those that they had.
    """
    rows = images.refresh()
    while True:
        vectors = embeddings.refresh()
        newest = images.refresh()
        if newest.version == rows.version:
            return rows, vectors
        rows = newest


def files_by_date(snapshot: Snapshot) -> dict[dt.date, list[DataFile]]:
    """The live files of each partition, in the order of dates and paths."""
    dates: dict[dt.date, list[DataFile]] = {}
    for file in sorted(snapshot.files.values(), key=lambda file: (file.ingest_date, file.path)):
        dates.setdefault(file.ingest_date, []).append(file)
    return dates


class References:
    """Which embeddings the image rows of one date refer to: those of the run that ``embed_run_id`` names.

    A first night puts all of a catalog under one date: some 50 bytes of each image are held.
    """

    def __init__(self, folder: Folder, images: Snapshot, date: dt.date) -> None:
        self._run_numbers: dict[str, int] = {}
        keys, runs = [], []
        files = [file for file in images.files.values() if file.ingest_date == date]
        for _, rows in read_each(folder, "images", files, ["image_id", "embed_run_id"], ahead=8):
            rows = rows.filter(pc.is_valid(rows["embed_run_id"]))
            keys.append(to_binary(rows["image_id"]))
            runs.append(self._numbered(rows["embed_run_id"], are_new=True))
        self._keys = concat(keys)
        del keys
        self._index = index_of(self._keys)
        self._runs = np.concatenate([np.empty(0, np.int32), *runs])
        self._view_numbers: dict[str, int] = {}
        self._claimed: list[npt.NDArray[np.uint64]] = []  # of each image a bit for each of 64 views, then of the next

    def __len__(self) -> int:
        return len(self._keys)

    def ids(self, images: npt.NDArray[np.int64]) -> Iterator[str]:
        """The image ids behind numbers that :meth:`find` gave."""
        return (key.hex() for key in self._keys.take(pa.array(images)).to_pylist())

    def find(self, rows: pa.Table) -> npt.NDArray[np.int64]:
        """The image that refers to each embedding, as a number; -1: none does."""
        at = self._index.find(*to_words(to_binary(rows["image_id"])))
        same = at >= 0
        same[same] = self._runs[at[same]] == self._numbered(rows["embed_run_id"], are_new=False)[same]
        return np.where(same, at, -1)

    def claim(self, rows: pa.Table) -> npt.NDArray[np.bool_]:
        """Marks the embeddings of one file that count: referred to, and not met before in another file or this one.

        An image's views may lie apart, in other files even: vlmflow writes them together, but other programs put a
        table's rows in an order of their own, and what they leave out of one file is in another.
        """
        at = self.find(rows)
        views = self._numbered_views(rows["view"])
        marks = np.zeros(len(at), dtype=np.bool_)
        for block in np.unique(views[at >= 0] // 64).tolist():
            while len(self._claimed) <= block:
                self._claimed.append(np.zeros(len(self), np.uint64))
            claimed, mine = self._claimed[block], np.flatnonzero((at >= 0) & (views // 64 == block))
            mine = mine[np.unique(at[mine] * 64 + views[mine] % 64, return_index=True)[1]]
            bits = np.left_shift(np.uint64(1), (views[mine] % 64).astype(np.uint64))
            is_new = claimed[at[mine]] & bits == 0
            np.bitwise_or.at(claimed, at[mine[is_new]], bits[is_new])
            marks[mine[is_new]] = True
        return marks

    def _numbered_views(self, views: pa.ChunkedArray) -> npt.NDArray[np.int64]:
        coded = pc.dictionary_encode(flat(views))
        known = self._view_numbers
        numbers = [known.setdefault(name, len(known)) for name in coded.dictionary.to_pylist()]
        found: npt.NDArray[np.int64] = np.array(numbers, np.int64)[coded.indices.to_numpy(zero_copy_only=False)]
        return found

    def _numbered(self, runs: pa.ChunkedArray, *, are_new: bool) -> npt.NDArray[np.int32]:
        """Runs as numbers; -1: none, or one that no image row has told of.

        Args:
            are_new: those without a number get one.
        """
        coded = pc.dictionary_encode(flat(runs))
        names = coded.dictionary.to_pylist()
        if are_new:
            for name in names:
                self._run_numbers.setdefault(name, len(self._run_numbers))
        numbers = np.array([*(self._run_numbers.get(name, -1) for name in names), -1], np.int32)
        found: npt.NDArray[np.int32] = numbers[pc.fill_null(coded.indices, -1).to_numpy(zero_copy_only=False)]
        return found


def readable(images: pa.Schema) -> pa.Schema:
    """The columns of an images table as readers see them: with ours that one of an older version lacks, as null."""
    lacking = [field.with_nullable(True) for field in schema.IMAGES if field.name not in images.names]
    return pa.schema([*images, *lacking])


def _select(columns: pa.Schema, names: Sequence[str] | None) -> pa.Schema:
    return columns if names is None else pa.schema([columns.field(name) for name in names])
