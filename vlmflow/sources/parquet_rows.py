"""Cells of a Parquet column of image bytes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlmflow.errors import SourceError

_ROWS_AT_A_TIME = 64
_MAX_CELLS_MIB = 256  # of the row groups that are read for single images


def bytes_field(schema: pa.Schema, column: str) -> str | None:
    """Names what to read of a column of image bytes: itself, or ``bytes`` of a struct as Hugging Face writes it.

    Returns:
        None if there is no such column, or if it holds something else.
    """
    index = schema.get_field_index(column)
    if index < 0:
        return None
    kind = schema.field(index).type
    if pa.types.is_struct(kind):
        inner = kind.get_field_index("bytes")
        return f"{column}.bytes" if inner >= 0 and _holds_bytes(kind.field(inner).type) else None
    return column if _holds_bytes(kind) else None


def _holds_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def is_damage(error: Exception) -> bool:
    """Whether an error met in reading a Parquet file is of its bytes, and not of what they lie on."""
    # What Arrow cannot decompress or parse it raises as a plain OSError; those of disks have a number.
    return isinstance(error, pa.ArrowException) or (type(error) is OSError and error.errno is None)


def read_cells(file: BinaryIO, column: str, rows: Sequence[int], *, is_known: bool = True) -> dict[int, bytes | None]:
    """Reads cells of a column of image bytes, in one pass over the row groups that hold them.

    Of a row group the column is read whole, and decoded a few rows at a time.

    Args:
        is_known: the column is the job's. If not, single images are wanted of a file that may call it otherwise: the
            only column of image bytes will do, and row groups in which it is large are refused.

    Returns:
        For each row its bytes; None where the cell is null, or the file has no such row.

    Raises:
        SourceError: the file is not Parquet, lacks the column, or a row group is too large.
    """
    found: dict[int, bytes | None] = dict.fromkeys(rows)
    try:
        parquet = pq.ParquetFile(file)
        field = bytes_field(parquet.schema_arrow, column)
        if field is None and not is_known:
            field = _only_field(parquet.schema_arrow)
        if field is None:
            raise SourceError(f"there is no column {column} of image bytes", remedy="Set source.bytes_column.")
        counts = [parquet.metadata.row_group(index).num_rows for index in range(parquet.num_row_groups)]
        starts = [0, *accumulate(counts)]
        groups = {bisect_right(starts, row) - 1 for row in rows if 0 <= row < starts[-1]}
        for group in sorted(groups):
            if not is_known:
                _check_size(parquet.metadata.row_group(group), field)
            last = max(row for row in rows if row < starts[group + 1])
            for first, block in _blocks(parquet, group, field, starts[group]):
                for row in rows:
                    if first <= row < first + len(block):
                        found[row] = block[row - first].as_py()
                if first + len(block) > last:
                    break
    except (pa.ArrowException, OSError) as error:
        if not is_damage(error):
            raise
        raise SourceError("the file is not Parquet, or is damaged", remedy="Write it again.") from error
    return found


def _only_field(schema: pa.Schema) -> str | None:
    fields = [field for name in schema.names if (field := bytes_field(schema, name)) is not None]
    return fields[0] if len(fields) == 1 else None


def _check_size(group: pq.RowGroupMetaData, field: str) -> None:
    columns = (group.column(number) for number in range(group.num_columns))
    size_mib = sum(found.total_uncompressed_size for found in columns if found.path_in_schema == field) / 2**20
    if size_mib > _MAX_CELLS_MIB:
        raise SourceError(
            f"its row group holds {size_mib:,.0f} MiB of images, and {_MAX_CELLS_MIB} MiB are read for one",
            remedy="Write the file in smaller row groups.",
        )


def _blocks(parquet: pq.ParquetFile, group: int, field: str, start: int) -> Iterator[tuple[int, pa.Array]]:
    for batch in parquet.iter_batches(batch_size=_ROWS_AT_A_TIME, row_groups=[group], columns=[field]):
        block = batch.column(0)
        if pa.types.is_struct(block.type):
            block = pc.struct_field(block, "bytes")
        yield start, block
        start += len(block)
