"""Parquet files of a store by the pieces that are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import obstore
import pyarrow as pa
import pyarrow.parquet as pq

from vlmflow.retry import retried

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_FOOTER_BYTES = 64 * 1024  # read with the first request; few are longer


class ParquetPieces:
    """A Parquet file of the store, read piece by piece: columns that nobody asked for stay where they are.

    The pieces are copied into memory of Arrow's own. Memory of Python's would be freed by whichever of Arrow's threads
    had it last, and only under the interpreter's lock: a program that ends meanwhile is aborted.
    """

    def __init__(self, store: ObjectStore, path: str, *, whole: bool = False) -> None:
        self._store, self._path, self._whole = store, path, whole
        data = retried(lambda: obstore.get(store, path).bytes()) if whole else None
        self._size: int = retried(lambda: obstore.head(store, path))["size"] if data is None else len(data)
        memory = pa.allocate_buffer(self._size)  # of its pages, those that nothing is put into cost nothing
        self._bytes = np.frombuffer(memory, np.uint8)
        if data is None:
            self._fetch_footer()
        else:
            self._bytes[:] = np.frombuffer(memoryview(data), np.uint8)
        self._file = pq.ParquetFile(pa.BufferReader(memory))
        meta = self._file.metadata
        self.row_groups: list[int] = [meta.row_group(number).num_rows for number in range(meta.num_row_groups)]

    def read(self, groups: Sequence[int], columns: Sequence[str] | None) -> pa.Table:
        """Reads top-level columns of row groups; None: all."""
        if not self._whole:
            self._fetch([piece for group in groups for piece in self._pieces(group, columns)])
        return self._file.read_row_groups(groups, columns=None if columns is None else list(columns))

    def _pieces(self, group: int, columns: Sequence[str] | None) -> Iterator[tuple[int, int]]:
        meta = self._file.metadata.row_group(group)
        for column in (meta.column(number) for number in range(meta.num_columns)):
            if columns is None or any(f"{column.path_in_schema}.".startswith(f"{name}.") for name in columns):
                start = column.dictionary_page_offset or column.data_page_offset
                yield start, start + column.total_compressed_size

    def _fetch_footer(self) -> None:
        end = max(0, self._size - _FOOTER_BYTES)
        self._fetch([(end, self._size)])
        # Its size stands before the last four bytes.
        footer = self._size - 8 - int.from_bytes(self._bytes[-8:-4].tobytes(), "little")
        if 0 <= footer < end:
            self._fetch([(footer, end)])

    def _fetch(self, pieces: Sequence[tuple[int, int]]) -> None:
        pieces = [(start, end) for start, end in pieces if start < end]
        if not pieces:
            return
        starts, ends = zip(*pieces, strict=True)
        if min(starts) < 0 or max(ends) > self._size:
            raise pa.ArrowInvalid(f"{self._path} is said to have columns outside it")
        found = retried(lambda: obstore.get_ranges(self._store, self._path, starts=starts, ends=ends))
        for start, end, data in zip(starts, ends, found, strict=True):
            self._bytes[start:end] = np.frombuffer(memoryview(data), np.uint8)
