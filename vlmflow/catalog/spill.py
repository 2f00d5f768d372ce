"""Rows put aside on the local disk, so that planning holds a part of them at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vlmflow.catalog.columns import taken
from vlmflow.workspace import in_our_words

_BUFFERED_ROWS, _BUFFERED_BYTES = 1 << 18, 1 << 28
_BATCH_BYTES = 1 << 30  # in one batch; of texts Arrow holds no more than twice that


class Spill:
    """Spreads rows over numbered Arrow IPC files.

    Args:
        folder: an empty folder of its own.
        columns: the schema of all rows.

    Raises:
        WorkspaceError: the disk is full, or the folder cannot be made; so does whatever writes to it.
    """

    def __init__(self, folder: Path, columns: pa.Schema, num_parts: int) -> None:
        with in_our_words():
            folder.mkdir()
        self._folder = folder
        self.columns = columns
        self.num_parts = num_parts
        self._pending: list[list[pa.Table]] = [[] for _ in range(num_parts)]
        self._num_pending = self._bytes_pending = 0
        self.num_bytes = 0
        self._writers: dict[int, pa.ipc.RecordBatchFileWriter] = {}

    def append(self, rows: pa.Table, parts: npt.NDArray[np.int64]) -> None:
        """Adds rows; ``parts[i]`` is the file of row i."""
        assert not len(parts) or (parts.min() >= 0 and parts.max() < self.num_parts), "rows of no part would be lost"
        order = np.argsort(parts, kind="stable")
        sorted_rows = taken(rows, order)
        bounds = np.searchsorted(parts[order], np.arange(self.num_parts + 1))
        for part in np.flatnonzero(np.diff(bounds)).tolist():
            start, end = int(bounds[part]), int(bounds[part + 1])
            self._pending[part].append(sorted_rows.slice(start, end - start))
        self._num_pending += rows.num_rows
        self._bytes_pending += rows.nbytes
        self.num_bytes += rows.nbytes
        if self._num_pending >= _BUFFERED_ROWS or self._bytes_pending >= _BUFFERED_BYTES:
            self._flush()

    def close(self) -> None:
        """Ends writing; the files can be read from here on."""
        self._flush()
        with in_our_words():
            for writer in self._writers.values():
                writer.close()

    def holds(self, part: int) -> bool:
        """Whether the file has rows."""
        return part in self._writers

    def read(self, part: int) -> pa.Table:
        """All rows of one file, in the order in which they came."""
        if part not in self._writers:
            return self.columns.empty_table()
        with in_our_words(), pa.memory_map(self._path(part)) as source:
            return pa.ipc.open_file(source).read_all()

    def tables(self) -> Iterator[pa.Table]:
        """The files that hold rows, in the order of their numbers."""
        for part in sorted(self._writers):
            yield self.read(part)

    def _flush(self) -> None:
        for part, tables in enumerate(self._pending):
            if not tables:
                continue
            with in_our_words():
                if part not in self._writers:
                    self._writers[part] = pa.ipc.new_file(self._path(part), self.columns)
                rows = pa.concat_tables(tables)
                # One batch a flush: many small ones would cost more to read than their rows.
                self._writers[part].write_table(rows.combine_chunks() if rows.nbytes <= _BATCH_BYTES else rows)
            tables.clear()
        self._num_pending = self._bytes_pending = 0

    def _path(self, part: int) -> str:
        return str(self._folder / f"{part:05d}.arrow")
