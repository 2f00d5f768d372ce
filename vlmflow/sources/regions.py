"""Regions of images that the caller has computed, by a detector of theirs: a struct column of a Parquet file.

``source.regions_column`` names it, in a manifest or in a file of image bytes. Its fields, one value an image:

    features  list<list<float>>   R lists of F numbers, the best region first
    boxes     list<list<float>>   R lists of left, top, right, bottom, in pixels
    width     int                 of the image that the boxes were found in
    height    int

An image's regions can be as large as the image. So listing and planning pass them over, the catalog gets no copy in
``source``, and a worker reads them, row by row, where it reads the image. Write the file in row groups of some hundred
rows: a group is read from its start. Regions are no part of what makes an image due: after a change of detector, run
the task anew with a model folder of another name or revision.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlmflow.config import SourceConfig
from vlmflow.errors import SourceError, StoreLostError, VlmflowError
from vlmflow.schema import REGIONS
from vlmflow.sources.parquet_rows import is_damage
from vlmflow.sources.stores import Stores
from vlmflow.storage import STORE_ERRORS, access_error

_ROWS_AT_A_TIME = 16


def check_regions(schema: pa.Schema, column: str, name: str) -> None:
    """Makes sure that a file has a column of regions.

    Raises:
        SourceError: it has not, or not with the fields above.
    """
    index = schema.get_field_index(column)
    kind = schema.field(index).type if index >= 0 else None
    if kind is not None and pa.types.is_struct(kind):
        found = {field.name: field.type for field in kind}
        lists = all(_is_lists(found.get(part)) for part in ("features", "boxes"))
        if lists and all(_is_number(found.get(part)) for part in ("width", "height")):
            return
    what = "no such column" if kind is None else str(kind)
    raise SourceError(
        f"{name}: column {column} of regions: {what[:200]}",
        remedy="Store a struct of features and boxes (lists of lists of numbers), width and height.",
    )


def _is_lists(kind: pa.DataType | None) -> bool:
    return _is_list(kind) and _is_list(kind.value_type) and _is_number(kind.value_type.value_type)  # type: ignore[union-attr]


def _is_list(kind: pa.DataType | None) -> bool:
    tests = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return kind is not None and any(is_kind(kind) for is_kind in tests)


def _is_number(kind: pa.DataType | None) -> bool:
    return kind is not None and bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


class RegionReader:
    """Reads the regions of references in a worker; can be pickled.

    Args:
        version: of the one file of the source, as it was listed; None: the references name the files themselves.
    """

    def __init__(self, config: SourceConfig, version: str | None) -> None:
        self._config, self._version = config, version
        self._stores = Stores(config.storage)

    def __reduce__(self) -> tuple[type[RegionReader], tuple[SourceConfig, str | None]]:
        return (RegionReader, (self._config, self._version))

    def read(self, refs: pa.Table, wanted: Sequence[bool]) -> pa.Array:
        """One value of ``schema.REGIONS`` for each reference; null where it is not wanted, or the source has none.

        Raises:
            StoreLostError: the file is gone, or another than when the run was planned.
        """
        values: list[pa.Array] = [pa.nulls(1, REGIONS)]
        places = [0] * refs.num_rows
        for uri, rows in self._by_file(refs, wanted).items():
            for number, value in self._read_file(uri, sorted(set(rows.values()))).items():
                values.append(value)
                for row, at in rows.items():
                    if at == number:
                        places[row] = len(values) - 1
        return pa.concat_arrays(values).take(pa.array(places, pa.int64()))

    def _by_file(self, refs: pa.Table, wanted: Sequence[bool]) -> dict[str, dict[int, int]]:
        """Of each file, which of its rows belongs to which reference."""
        files: dict[str, dict[int, int]] = {}
        columns = (refs[name].to_pylist() for name in ("locator", "row", "regions_row"))
        for index, (locator, row, regions_row) in enumerate(zip(*columns, strict=True)):
            uri, number = (locator, row) if row is not None else (self._config.uri, regions_row)
            if wanted[index] and number is not None:
                files.setdefault(uri, {})[index] = number
        return files

    def _read_file(self, uri: str, rows: Sequence[int]) -> dict[int, pa.Array]:
        remedy = "Put it back and run again: what was committed stays."
        try:
            file, head = self._stores.open_file(uri)
            with file:
                if self._version not in (None, head.object_version):
                    message = f"{uri} has changed since it was listed: its regions may be those of other images"
                    raise StoreLostError(message, remedy="Run again: what was committed stays.")
                return read_regions(file, self._config.regions_column or "", rows)
        except STORE_ERRORS as error:
            raise StoreLostError(str(access_error(error, uri)), remedy=remedy) from error
        except VlmflowError as error:
            if isinstance(error, StoreLostError):
                raise
            raise StoreLostError(f"regions: {error}", remedy=error.remedy or remedy) from error


def read_regions(file: BinaryIO, column: str, rows: Sequence[int]) -> dict[int, pa.Array]:
    """Reads rows of a column of regions, a few at a time: one value of ``schema.REGIONS`` each.

    Raises:
        SourceError: the file is not Parquet, or its column is of another kind.
    """
    found: dict[int, pa.Array] = {}
    try:
        parquet = pq.ParquetFile(file)
        check_regions(parquet.schema_arrow, column, "the file")
        counts = [parquet.metadata.row_group(index).num_rows for index in range(parquet.num_row_groups)]
        starts = [0, *accumulate(counts)]
        for group in sorted({bisect_right(starts, row) - 1 for row in rows if 0 <= row < starts[-1]}):
            first = starts[group]
            last = max(row for row in rows if row < starts[group + 1])
            for batch in parquet.iter_batches(_ROWS_AT_A_TIME, row_groups=[group], columns=[column]):
                block = batch.column(0)
                here = [row for row in rows if first <= row < first + len(block)]
                found |= {row: _conform(block.slice(row - first, 1)) for row in here}
                first += len(block)
                if first > last:
                    break
    except (pa.ArrowException, OSError) as error:
        if not is_damage(error):
            raise
        raise SourceError("the file is not Parquet, or is damaged", remedy="Write it again.") from error
    return found


def _conform(value: pa.StructArray) -> pa.Array:
    if value.null_count:
        return pa.nulls(1, REGIONS)
    parts = [pc.struct_field(value, field.name).cast(field.type) for field in REGIONS]
    return pa.StructArray.from_arrays(parts, fields=list(REGIONS))
