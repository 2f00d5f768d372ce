"""Parquet files with a column of image bytes: one file, or all ``.parquet`` files under a prefix."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

import pyarrow as pa
import pyarrow.parquet as pq

from vlmflow.config import ImageLimits, SourceConfig
from vlmflow.errors import SourceError
from vlmflow.sources.base import (
    BATCH_ROWS,
    Reader,
    check_named,
    is_kept,
    is_list,
    is_read,
    own_columns,
    reference_batch,
    source_struct,
    texts,
)
from vlmflow.sources.delta import delta_files, is_delta_table
from vlmflow.sources.disk import home_of
from vlmflow.sources.listing import list_files
from vlmflow.sources.parquet_rows import bytes_field
from vlmflow.sources.prefix import no_files, no_images
from vlmflow.sources.reader import SourceReader, row_version
from vlmflow.sources.regions import check_regions
from vlmflow.sources.stores import Stores
from vlmflow.sources.tables import portable_schema, to_portable, unreadable
from vlmflow.sources.unique import UniqueReferences
from vlmflow.sources.uris import normalise_uri, resolve
from vlmflow.storage import STORE_ERRORS, Address, parse_address

_MOST_TOLD = 10  # columns, by name

logger = logging.getLogger("vlmflow")


class ParquetSource:
    """Lists the rows of Parquet files; reads their columns but not the bytes.

    An image is known as ``<file>#<row>``, or by the column of uris where the files have one.
    """

    def __init__(self, config: SourceConfig, catalog: Address | None) -> None:
        self._config, self._catalog = config, catalog
        self._stores = Stores(config.storage)
        self._address = parse_address(config.uri)
        self._home = home_of(self._address.parent, self._address)
        self._unique = UniqueReferences(self._references)
        self._told = False
        self.version: str | None = None

    @property
    def columns(self) -> pa.Schema:
        """The columns that rows keep, as the first file has them; see :class:`vlmflow.sources.base.Source`."""
        return pa.schema([field for field in self._columns if is_kept(self._config, field.name)])

    @property
    def num_repeated(self) -> int:
        """Further rows of images that have one; see :class:`vlmflow.sources.base.Source`."""
        return self._unique.num_repeated

    def list(self) -> Iterator[pa.RecordBatch]:
        """Yields the references; see :class:`vlmflow.sources.base.Source`."""
        empty = True
        for batch in self._unique:
            empty = empty and batch.num_rows == 0
            yield batch
        if empty and not self._config.allow_empty:
            raise no_images(self._config.uri) if self._files else no_files(self._config.uri, ".parquet")

    def reader(self, limits: ImageLimits) -> Reader:
        """Builds the reader of this source's references."""
        return SourceReader(self._config, limits, self._home, self._stores)

    @cached_property
    def _files(self) -> Sequence[str]:
        files = list_files(str(self._address), ".parquet", self._stores, self._catalog)
        if files != [str(self._address)] and is_delta_table(self._config, self._stores):
            return delta_files(self._config)
        return files

    @cached_property
    def _columns(self) -> pa.Schema:
        """Those that are read, besides bytes and uris."""
        found = pa.schema([])
        for uri in self._files:
            file, _ = self._stores.open_file(uri)
            with file:
                schema = _open(file, uri).schema_arrow
            self._check(schema, uri)
            own = self._own_columns(schema)
            # A column without values in one file may have some in the next, which tells its type.
            found = pa.schema([_typed(field, own) for field in found or own])
            if all(_is_typed(field.type) for field in found):
                break
        return portable_schema(found, self._files[0] if self._files else self._config.uri)

    def _own_columns(self, schema: pa.Schema) -> pa.Schema:
        dropped = (self._config.bytes_column, self._config.uri_column, self._config.regions_column)
        return pa.schema([f for f in schema if f.name not in dropped and is_read(self._config, f.name)])

    def _check(self, schema: pa.Schema, uri: str) -> None:
        there = ", ".join(f"{field.name} ({field.type})" for field in schema)
        if bytes_field(schema, self._config.bytes_column) is None:
            message = f"{uri} has no column {self._config.bytes_column} of image bytes; it has {there}"
            raise SourceError(message, remedy="Name another with source.bytes_column.")
        check_named(self._config, schema.names, uri)
        if self._config.regions_column is not None:
            check_regions(schema, self._config.regions_column, uri)

    def _references(self) -> Iterator[pa.RecordBatch]:
        for uri in self._files:
            file, head = self._stores.open_file(uri)
            if uri == str(self._address):
                self.version = head.object_version
            with file:
                parquet = _open(file, uri)
                self._check(parquet.schema_arrow, uri)
                self._tell_passed_over(parquet.schema_arrow, uri)
                try:
                    yield from self._rows(parquet, uri, head.object_version)
                except (pa.ArrowException, *STORE_ERRORS) as error:
                    raise unreadable(error, uri) from error

    def _tell_passed_over(self, schema: pa.Schema, uri: str) -> None:
        """Says once what of a file is not kept because the first file lacks it."""
        if self._told:
            return
        passed_over = list(_lacking(self._own_columns(schema), self._columns))
        if passed_over:
            self._told = True
            more = f" and {len(passed_over) - _MOST_TOLD:,} more" if len(passed_over) > _MOST_TOLD else ""
            logger.warning(
                "%s has columns that %s lacks and that no row keeps: %s%s; write all files with the same columns",
                *(uri, self._files[0], ", ".join(passed_over[:_MOST_TOLD]), more),
            )

    def _rows(self, parquet: pq.ParquetFile, uri: str, file_version: str) -> Iterator[pa.RecordBatch]:
        has_uris = self._config.uri_column in parquet.schema_arrow.names
        wanted = [*self._columns.names, *([self._config.uri_column] if has_uris else [])]
        missing = sorted(set(self._columns.names) - set(parquet.schema_arrow.names))
        if missing:
            raise SourceError(f"{uri} has no column {missing[0]}, which {self._files[0]} has", remedy="Write it again.")
        first = 0
        for group in range(parquet.num_row_groups):
            count = parquet.metadata.row_group(group).num_rows
            # A file may have no other column, and Arrow reads no rows then: they are counted by the metadata.
            batches = (
                parquet.iter_batches(BATCH_ROWS, row_groups=[group], columns=wanted) if wanted else [None] * bool(count)
            )
            for batch in batches:
                rows = None if batch is None else pa.table(batch)
                num_rows = count if rows is None else rows.num_rows
                if num_rows:
                    yield self._batch(rows, uri, file_version, range(first, first + num_rows))
                first += num_rows

    def _batch(self, rows: pa.Table | None, uri: str, file_version: str, numbers: range) -> pa.RecordBatch:
        given = {
            "uri": pa.array([f"{uri}#{number}" for number in numbers], pa.string()),
            "locator": pa.repeat(uri, len(numbers)),
            "row": pa.array(numbers, pa.int64()),
            "object_version": pa.array([row_version(file_version, number) for number in numbers], pa.string()),
        }
        if rows is None:
            return reference_batch(given)
        if self._config.uri_column in rows.column_names:
            named = texts(rows[self._config.uri_column], f"{uri}: column {self._config.uri_column}").to_pylist()
            spelled = [name or f"{uri}#{number}" for name, number in zip(named, numbers, strict=True)]
            given["uri"] = pa.array(
                [normalise_uri(name) for name in resolve(spelled, parse_address(uri).parent)], pa.string()
            )
        own = to_portable(rows, self._columns, uri)
        name = self._config.uri_column
        # The text or the key may be the column of the uris, which is none of the caller's.
        readable = {column: own[column] for column in own.column_names}
        readable |= {name: rows[name]} if name in rows.column_names else {}
        given |= own_columns(pa.table(readable), self._config, uri)
        return reference_batch(given, source_struct(own, self.columns))


def _typed(field: pa.Field, other: Iterable[pa.Field]) -> pa.Field:
    """The field; where it, or a member of it, has no type yet, with that of another file."""
    found = next((one.type for one in other if one.name == field.name), field.type)
    return field.with_type(_first_typed(field.type, found))


def _first_typed(kind: pa.DataType, other: pa.DataType) -> pa.DataType:
    if pa.types.is_null(kind):
        return other
    if pa.types.is_struct(kind) and pa.types.is_struct(other):
        return pa.struct([_typed(field, other) for field in kind]) if kind.num_fields else other
    if is_list(kind) and is_list(other):
        return pa.list_(_first_typed(kind.value_type, other.value_type))
    return kind


def _is_typed(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.num_fields > 0 and all(_is_typed(field.type) for field in kind)
    return _is_typed(kind.value_type) if is_list(kind) else not pa.types.is_null(kind)


def _lacking(given: Iterable[pa.Field], kept: Iterable[pa.Field], of: str = "") -> Iterator[str]:
    """The columns, and members of columns, that have values, as far as their types tell, and are not kept."""
    types = {field.name: field.type for field in kept}
    for field in given:
        name, kind, held = f"{of}{field.name}", field.type, types.get(field.name)
        if held is None:
            if _is_typed(kind):
                yield name
            continue
        while is_list(kind) and is_list(held):
            kind, held = kind.value_type, held.value_type
        if pa.types.is_struct(kind) and pa.types.is_struct(held):
            yield from _lacking(kind, held, f"{name}.")


def _open(file: object, uri: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, *STORE_ERRORS) as error:
        raise unreadable(error, uri) from error


def holds_image_bytes(config: SourceConfig) -> bool:
    """Whether the Parquet file of a source has its column of image bytes; only the footer is read.

    Raises:
        SourceError, StorageAccessError, TransientError: the file cannot be read, or is not Parquet.
    """
    stores = Stores(config.storage)
    files = list_files(config.uri, ".parquet", stores, None)
    uri = files[0] if files else config.uri
    file, _ = stores.open_file(uri)
    with file:
        return bytes_field(_open(file, uri).schema_arrow, config.bytes_column) is not None
