"""Parquet files of a store by the pieces that are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import obstore
import pyarrow as pa
import pyarrow.parquet as pq

from vlmflow.catalog.columns import plain
from vlmflow.retry import retried
from vlmflow.storage import STORE_ERRORS
from vlmflow.threads import interruptible

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_FOOTER_BYTES = 64 * 1024  # read with the first request; few are longer


class ParquetPieces:
    """A Parquet file of the store, read piece by piece: columns that nobody asked for stay where they are.

    A small file comes whole with the first request: a catalog of years has thousands of them.

    The pieces are copied into memory of Arrow's own. Memory of Python's would be freed by whichever of Arrow's threads
    had it last, and only under the interpreter's lock: a program that ends meanwhile is aborted.
    """

    def __init__(self, store: ObjectStore, path: str, *, whole: bool = False) -> None:
        self._store, self._path = store, path
        self._size, end = self._whole() if whole else self._end()
        memory = pa.allocate_buffer(self._size)  # of its pages, those that nothing is put into cost nothing
        self._bytes = np.frombuffer(memory, np.uint8)
        self._held_from = self._size - len(end)  # all from here on is there
        self._bytes[self._held_from :] = np.frombuffer(memoryview(end), np.uint8)
        self._fetch_footer()
        self._file = pq.ParquetFile(pa.BufferReader(memory))
        meta = self._file.metadata
        self.row_groups: list[int] = [meta.row_group(number).num_rows for number in range(meta.num_row_groups)]

    def read(self, groups: Sequence[int], columns: Sequence[str] | None) -> pa.Table:
        """Reads top-level columns of row groups, as vlmflow has them; None: all."""
        self._fetch([piece for group in groups for piece in self._pieces(group, columns)])
        return plain(self._file.read_row_groups(groups, columns=None if columns is None else list(columns)))

    def _pieces(self, group: int, columns: Sequence[str] | None) -> Iterator[tuple[int, int]]:
        meta = self._file.metadata.row_group(group)
        for column in (meta.column(number) for number in range(meta.num_columns)):
            if columns is None or any(f"{column.path_in_schema}.".startswith(f"{name}.") for name in columns):
                start = column.dictionary_page_offset or column.data_page_offset
                yield start, start + column.total_compressed_size

    def _whole(self) -> tuple[int, obstore.Bytes]:
        data = retried(lambda: obstore.get(self._store, self._path).bytes())
        return len(data), data

    def _end(self) -> tuple[int, obstore.Bytes]:
        """The size of the file, and its last bytes."""

        def ask() -> tuple[int, obstore.Bytes]:
            found = obstore.get(self._store, self._path, options={"range": {"suffix": _FOOTER_BYTES}})
            return found.meta["size"], found.bytes()

        try:
            return interruptible(ask)
        except FileNotFoundError:
            raise
        except STORE_ERRORS:  # Azure knows no such request, some servers do not answer it for an empty file
            size: int = retried(lambda: obstore.head(self._store, self._path))["size"]
            start = max(0, size - _FOOTER_BYTES)
            if start == size:
                return 0, obstore.Bytes(b"")
            return size, retried(lambda: obstore.get_range(self._store, self._path, start=start, end=size))

    def _fetch_footer(self) -> None:
        # Its size stands before the last four bytes.
        footer = self._size - 8 - int.from_bytes(self._bytes[-8:-4].tobytes(), "little")
        if 0 <= footer < self._held_from:
            self._fetch([(footer, self._held_from)])
            self._held_from = footer

    def _fetch(self, pieces: Sequence[tuple[int, int]]) -> None:
        pieces = [(start, end) for start, end in pieces if start < end]
        if any(start < 0 or end > self._size for start, end in pieces):
            raise pa.ArrowInvalid(f"{self._path} is said to have columns outside it")
        pieces = [(start, min(end, self._held_from)) for start, end in pieces if start < self._held_from]
        if not pieces:
            return
        starts, ends = zip(*pieces, strict=True)
        found = retried(lambda: obstore.get_ranges(self._store, self._path, starts=starts, ends=ends))
        for start, end, data in zip(starts, ends, found, strict=True):
            self._bytes[start:end] = np.frombuffer(memoryview(data), np.uint8)
