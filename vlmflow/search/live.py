"""The live rows of a catalog as search needs them: numbered, and each with the run whose vector it refers to."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from vlmflow.catalog.columns import conform, flat
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.keys import KeyIndex, index_of, to_binary, to_words
from vlmflow.catalog.log import DataFile, Snapshot
from vlmflow.catalog.masks import Mask
from vlmflow.catalog.read import read_each, read_rows, readable
from vlmflow.catalog.where import check_where, mask_where, nodes_of
from vlmflow.schema import KEY, fingerprint_column

Positions: TypeAlias = NDArray[np.int64]  # numbers of live rows; -1: none

VIEW = "squash"  # the view that shows the whole image: the one that is searched
_FINGERPRINT = fingerprint_column("embed")
_COLUMNS = ["image_id", "embed_run_id", _FINGERPRINT]
_CACHED_BYTES = 256 * 1024 * 1024
_AHEAD = 4


class LiveRows:
    """One version of the images table. N: its rows, numbered in the order of its files.

    Of each row only key, run and model are kept (about 30 bytes); columns are read from the files when asked for.

    Args:
        before: an earlier version: a file never changes, so those that it has are not read again.
    """

    def __init__(self, folder: Folder, snapshot: Snapshot, before: LiveRows | None = None) -> None:
        self.version = snapshot.version
        self.columns = readable(snapshot.schema)
        self._folder = folder
        self.files: list[DataFile] = sorted(snapshot.files.values(), key=lambda file: (file.ingest_date, file.path))
        self._cache: OrderedDict[tuple[str, tuple[str, ...]], pa.Table] = OrderedDict()
        self._num_cached = 0  # bytes of these
        held = {} if before is None else before._spans()
        runs = _Codes({} if before is None else before._run_names)
        models = _Codes({} if before is None else before._model_names)
        new = {}  # by path
        unread = [file for file in self.files if file.path not in held]
        for file, rows in read_each(folder, "images", unread, _COLUMNS, ahead=_AHEAD):
            codes = runs.of(rows["embed_run_id"]), models.of(rows[_FINGERPRINT])
            new[file.path] = index_of(to_binary(rows["image_id"])), codes
        counts, coded = [], []
        for file in self.files:
            if file.path in new:
                codes = new[file.path][1]
            else:
                assert before is not None
                codes = before._runs[held[file.path]], before._models[held[file.path]]
            counts.append(len(codes[0]))
            coded.append(codes)
        self.starts: Positions = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        starts = dict(zip((file.path for file in self.files), self.starts.tolist(), strict=False))
        for path, (index, _) in new.items():
            index.values = index.values + starts[path]
        kept = index_of(pa.array([], KEY)) if before is None else before._index_at(starts)
        self._index = kept.merged([index for index, _ in new.values()])
        none = np.empty(0, np.int32)
        self._runs: NDArray[np.int32] = np.concatenate([none, *(codes[0] for codes in coded)])
        self._models: NDArray[np.int32] = np.concatenate([none, *(codes[1] for codes in coded)])
        self._run_names: dict[str, int] = runs.names
        self._model_names: dict[str, int] = models.names
        self._models[self._runs < 0] = -1  # without a vector

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _spans(self) -> dict[str, slice]:
        """The numbers of the rows of each file."""
        bounds = pairwise(self.starts.tolist())
        return {file.path: slice(*span) for file, span in zip(self.files, bounds, strict=True)}

    def _index_at(self, starts: dict[str, int]) -> KeyIndex:
        """The index of the rows of some files, which begin elsewhere now."""
        moved = np.full(len(self), -1, np.int64)
        for path, span in self._spans().items():
            if path in starts:
                moved[span] = starts[path] + np.arange(span.stop - span.start)
        index = self._index.kept(moved[self._index.values] >= 0)
        index.values = moved[index.values]
        return index

    @property
    def num_by_model(self) -> dict[str, int]:
        """Rows with vectors by the fingerprint of what made them, the most frequent first."""
        counts = np.bincount(self._models[self._models >= 0], minlength=len(self._model_names))
        pairs = zip(self._model_names, counts.tolist(), strict=True)
        return dict(sorted(((name, count) for name, count in pairs if count), key=lambda pair: -pair[1]))

    def of_models(self, fingerprints: Sequence[str]) -> Mask:
        """(N,) rows whose vector one of these made."""
        codes = [self._model_names[name] for name in fingerprints if name in self._model_names]
        return np.isin(self._models, codes)

    def model_of(self, position: int) -> str | None:
        """The fingerprint of what made a row's vector; None: it has none."""
        code = int(self._models[position])
        return None if code < 0 else next(name for name, number in self._model_names.items() if number == code)

    def find(self, keys: pa.Array | pa.ChunkedArray) -> Positions:
        """The live row of each key (``schema.KEY``)."""
        return self._index.find(*to_words(keys))

    def file_of(self, position: int) -> DataFile:
        """The file that holds a row."""
        return self.files[int(np.searchsorted(self.starts, position, side="right")) - 1]

    @property
    def by_id(self) -> Positions:
        """(N,) the rows in the order of their ids."""
        return self._index.values

    def locate(self, keys: pa.Array | pa.ChunkedArray, runs: pa.ChunkedArray) -> Positions:
        """The live row that refers to each vector, given the image and the run that wrote it; -1: none does."""
        at = self.find(keys)
        if not len(self):
            return at
        coded = pc.dictionary_encode(flat(runs))
        names = [self._run_names.get(name, -2) for name in coded.dictionary.to_pylist()]
        codes = np.array([*names, -2], np.int32)[coded.indices.to_numpy(zero_copy_only=False)]
        return np.where((at >= 0) & (self._runs[at] == codes), at, -1)

    def dates_of(self, wanted: Mask) -> set[object]:
        """The partitions in which marked rows lie."""
        spans = zip(self.starts[:-1], self.starts[1:], self.files, strict=True)
        return {file.ingest_date for start, stop, file in spans if wanted[start:stop].any()}

    def mask(self, where: str) -> Mask:
        """(N,) rows of which a condition in SQL is true; only the columns that it names are read.

        Raises:
            ConfigError: as :func:`vlmflow.catalog.where.check_where`.
        """
        check_where(where, self.columns)
        names = _columns_in(where, self.columns)
        mask = np.zeros(len(self), np.bool_)
        for start, rows in self.read(names):
            mask[start : start + rows.num_rows] = mask_where(rows, where)
        return mask

    def read(self, names: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
        """Columns of all rows, file by file, each with the number of its first row."""
        wanted = pa.schema([self.columns.field(name) for name in names])
        tables = read_each(self._folder, "images", self.files, list(names), ahead=_AHEAD)
        for start, (_, rows) in zip(self.starts.tolist(), tables, strict=False):
            yield start, conform(rows, wanted)

    def take(self, positions: Positions, names: Sequence[str]) -> pa.Table:
        """Columns of some rows, in the order asked for. Files that were read stay in memory while there is room."""
        wanted = pa.schema([self.columns.field(name) for name in names])
        files = np.searchsorted(self.starts, positions, side="right") - 1
        parts, order = [wanted.empty_table()], []
        numbers = np.unique(files).tolist()
        unread = {number for number in numbers if (self.files[number].path, tuple(names)) not in self._cache}
        coming = (self.files[number] for number in numbers if number in unread)
        fresh = read_each(self._folder, "images", coming, names, ahead=_AHEAD)
        for number in numbers:
            here = np.flatnonzero(files == number)
            rows = next(fresh)[1] if number in unread else None
            parts.append(self._columns_of(number, wanted, rows).take(pa.array(positions[here] - self.starts[number])))
            order.append(here)
        inverse = np.argsort(np.concatenate(order)) if order else np.empty(0, np.int64)
        return pa.concat_tables(parts).take(pa.array(inverse))

    def _columns_of(self, number: int, wanted: pa.Schema, rows: pa.Table | None) -> pa.Table:
        """Columns of a file: of what was read of it just now, else of what is kept, which may be gone by now."""
        key = (self.files[number].path, tuple(wanted.names))
        if rows is None and key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        read = read_rows(self._folder, "images", self.files[number], wanted.names) if rows is None else rows
        rows = conform(read, wanted)
        if (held := self._cache.pop(key, None)) is not None:
            self._num_cached -= held.nbytes
        self._cache[key] = rows
        self._num_cached += rows.nbytes
        while self._num_cached > _CACHED_BYTES and len(self._cache) > 1:
            self._num_cached -= self._cache.popitem(last=False)[1].nbytes
        return rows


class _Codes:
    """Texts as numbers, in the order of their first mention; -1 for null."""

    def __init__(self, names: dict[str, int]) -> None:
        self.names = dict(names)

    def of(self, column: pa.ChunkedArray) -> NDArray[np.int32]:
        coded = pc.dictionary_encode(flat(column))
        numbers = [self.names.setdefault(name, len(self.names)) for name in coded.dictionary.to_pylist()]
        indices = pc.fill_null(coded.indices, len(numbers)).to_numpy(zero_copy_only=False)
        found: NDArray[np.int32] = np.array([*numbers, -1], np.int32)[indices]
        return found


def _columns_in(where: str, columns: pa.Schema) -> list[str]:
    """The columns that a condition names, at least one; all, if that cannot be told."""
    words = {node.lower() for node in nodes_of(where) if isinstance(node, str)}
    if any("star" in word for word in words):
        return list(columns.names)
    # An alias or a text may be spelled like a column, which costs no more than reading it.
    return [name for name in columns.names if name.lower() in words or name == "image_id"]
