"""Manifest files as streams of Arrow tables: Parquet, CSV, JSON lines.

Columns keep their types where the format has them. CSV has none, and guessed ones would change from night to night
with the data, so all its columns are strings. JSON has one kind of number, so whole ones are doubles too: those of
tomorrow may not be whole. A column without any value has no type yet.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from vlmflow.errors import SourceError, VlmflowError
from vlmflow.sources.base import BATCH_ROWS, is_list
from vlmflow.sources.csv_faults import check_quotes, fault_of
from vlmflow.sources.json_columns import MISFITS, first_misfit, is_deeper, is_large, widened
from vlmflow.sources.parquet_rows import is_damage
from vlmflow.sources.regions import check_regions
from vlmflow.storage import access_error

# Lists and structs in each other. Arrow hands types of 64 levels to other libraries, and no more; it reads Parquet
# files of 100, where a list takes two.
DEEPEST = 30


class TableFile(Protocol):
    """A manifest file that can be read more than once."""

    @property
    def schema(self) -> pa.Schema:
        """All its columns, with types that every reader of a catalog knows, or the null type."""
        ...

    def batches(self) -> Iterator[pa.Table]:
        """Yields its rows, a few thousand at a time, with the columns of :attr:`schema` that are needed at least.

        Doubles of it may be integers here: keys and texts are written out as the file has them.
        """
        ...


def open_table(
    path: Path, name: str, regions_column: str | None = None, is_needed: Callable[[str], bool] = lambda _: True
) -> TableFile:
    """Opens a local manifest file by the extension of its name.

    Args:
        regions_column: a column that is passed over: it is not read, and not in the schema.
        is_needed: says it of a column by its name; of a Parquet file the values of others are not read, and one that
            has no portable type is not in the schema either.

    Raises:
        SourceError: no manifest format goes by the extension, or it cannot have a column of regions.
    """
    extension = Path(name).suffix.lower()
    if extension == ".parquet":
        return ParquetTable(path, name, regions_column, is_needed)
    if regions_column is not None:
        raise SourceError(f"{name}: regions in a {extension} file", remedy="Write the manifest as a .parquet file.")
    if extension == ".csv":
        return CsvTable(path, name)
    if extension in (".jsonl", ".ndjson", ".json"):
        return JsonTable(path, name)
    raise SourceError(
        f"{name} is not a manifest", remedy="Write a .csv, .jsonl, .ndjson, .json (one object a line) or .parquet file."
    )


def portable_type(kind: pa.DataType) -> pa.DataType | None:
    """The type under which a catalog keeps a column; None for one that Delta tables have no counterpart of.

    Nulls, and lists and structs that are all empty, have the null type: what they are a later listing says. Structs are
    without such members.
    """
    if pa.types.is_dictionary(kind):
        return portable_type(kind.value_type)
    if pa.types.is_null(kind):
        return kind
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind) or pa.types.is_fixed_size_binary(kind):
        return pa.binary()
    if pa.types.is_unsigned_integer(kind):  # Delta's integers are signed
        return {8: pa.int16(), 16: pa.int32()}.get(kind.bit_width, pa.int64())
    if pa.types.is_float16(kind):
        return pa.float32()
    if pa.types.is_timestamp(kind):
        return pa.timestamp("us", kind.tz)
    if pa.types.is_date64(kind):
        return pa.date32()
    if is_list(kind):
        inner = portable_type(kind.value_type)
        return inner if inner is None or pa.types.is_null(inner) else pa.list_(inner)
    if pa.types.is_struct(kind):
        members = [(field.name, portable_type(field.type)) for field in kind]
        if any(member is None for _, member in members):
            return None
        typed = [(name, member) for name, member in members if not pa.types.is_null(member)]
        return pa.struct(typed) if typed else pa.null()
    known = (
        pa.types.is_string,
        pa.types.is_binary,
        pa.types.is_boolean,
        pa.types.is_signed_integer,
        pa.types.is_floating,
        pa.types.is_date32,
        pa.types.is_decimal128,
    )
    return kind if any(is_kind(kind) for is_kind in known) else None


def portable_schema(schema: pa.Schema, name: str) -> pa.Schema:
    """Gives every column its portable type.

    Raises:
        SourceError: a column has none, or two share a name.
    """
    doubled = sorted({column for column in schema.names if schema.names.count(column) > 1})
    if doubled:
        message = f"{name} has two columns {doubled[0] or 'without a name'}"
        raise SourceError(message, remedy="Give every column a name of its own.")
    fields = []
    for field in schema:
        if _num_levels(field.type) > DEEPEST:
            message = f"{name}: column {field.name} is nested in more than {DEEPEST} levels"
            raise SourceError(message, remedy="Store it as a string, or leave it out.")
        kind = portable_type(field.type)
        if kind is None:
            remedy = "Store it as a string, number, boolean, date, timestamp, list or struct."
            remedy += " Or name the columns to keep with source.columns."
            raise SourceError(f"{name}: column {field.name} has the type {field.type}", remedy=remedy)
        fields.append(pa.field(field.name, kind))
    return pa.schema(fields)


def _num_levels(kind: pa.DataType) -> int:
    """In how many lists and structs, one in the other, values of a type may be."""
    kinds, levels = [kind], 0
    while kinds := [inner.field(at).type for inner in kinds for at in range(inner.num_fields)]:
        levels += 1
    return levels


def to_portable(rows: pa.Table, columns: pa.Schema, name: str) -> pa.Table:
    """Rows with the given columns, cast to portable types; times lose what is below a microsecond.

    Args:
        name: of the file, for messages.

    Raises:
        SourceError: a column is of another type, or holds what its portable type cannot.
    """
    cast = []
    for field in columns:
        if pa.types.is_null(field.type):  # empty lists would not become it
            cast.append(pa.nulls(rows.num_rows))
            continue
        column = rows[field.name]
        try:
            column = column.cast(options=pc.CastOptions(field.type, allow_time_truncate=True))
            column.validate(full=True)  # Arrow takes strings of a Parquet file as they are
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            found = rows.schema.field(field.name).type
            message = f"{name}: column {field.name} ({found}) does not become {field.type}: {line_of(error)}"
            raise SourceError(message, remedy=f"Write all its values, in every file, as {field.type}.") from error
        cast.append(column)
    return pa.table(cast, schema=columns)


def unreadable(error: Exception, name: str) -> VlmflowError:
    """The error for a Parquet file that cannot be read: it is damaged, or its store or disk failed."""
    if is_damage(error):
        return SourceError(f"{name} is not a Parquet file, or is damaged: {line_of(error)}", remedy="Write it again.")
    return access_error(error, name)


class ParquetTable:
    """A Parquet manifest."""

    def __init__(self, path: Path, name: str, regions_column: str | None, is_needed: Callable[[str], bool]) -> None:
        self._path, self._name, self._regions_column, self._is_needed = path, name, regions_column, is_needed

    @cached_property
    def schema(self) -> pa.Schema:
        """All its columns but that of regions, and those that nobody needs and no catalog could keep."""
        schema = self._open().schema_arrow
        if self._regions_column is not None:
            check_regions(schema, self._regions_column, self._name)
            schema = schema.remove(schema.get_field_index(self._regions_column))
        fields = [field for field in schema if self._is_needed(field.name) or portable_type(field.type) is not None]
        return portable_schema(pa.schema(fields), self._name)

    def batches(self) -> Iterator[pa.Table]:
        """Yields its rows, with the columns that somebody needs: what is wrong with others does not matter."""
        needed = pa.schema([field for field in self.schema if self._is_needed(field.name)])
        try:
            for batch in self._open().iter_batches(batch_size=BATCH_ROWS, columns=needed.names):
                if absent := set(needed.names) - set(batch.schema.names):  # another file lies there by now
                    message = f"{self._name} was changed while it was read: it has no column {min(absent)} any more"
                    raise SourceError(message, remedy="Run again when nothing writes to it.")
                yield to_portable(pa.table(batch), needed, self._name)
        except (pa.ArrowException, OSError) as error:
            raise unreadable(error, self._name) from error

    def _open(self) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self._path)
        except (pa.ArrowException, OSError) as error:
            raise unreadable(error, self._name) from error


class CsvTable:
    """A CSV manifest with a header, in UTF-8; every column is a string, and an empty field is null."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        self._are_quotes_checked = False

    @cached_property
    def schema(self) -> pa.Schema:
        """All its columns."""
        return portable_schema(pa.schema([(name, pa.string()) for name in self._header]), self._name)

    @cached_property
    def _header(self) -> list[str]:
        try:
            with self._open({}) as reader:
                names = list(reader.schema.names)
        except UnicodeDecodeError as error:
            raise self._damaged(error) from error
        if any(re.search("[\r\n]", name) for name in names):
            self._check_quotes()
        return names

    def batches(self) -> Iterator[pa.Table]:
        """Yields its rows."""
        try:
            with self._open(dict.fromkeys(self.schema.names, pa.string())) as reader:
                for batch in reader:
                    if any(_has_lines(column) for column in batch.columns):
                        self._check_quotes()
                    yield pa.table(batch)
        except pa.ArrowInvalid as error:
            raise self._damaged(error) from error

    def _check_quotes(self) -> None:
        if not self._are_quotes_checked:
            check_quotes(self._path, self._name)
        self._are_quotes_checked = True

    def _open(self, types: dict[str, pa.DataType]) -> pa.csv.CSVStreamingReader:
        try:
            return pa.csv.open_csv(
                self._path,
                parse_options=pa.csv.ParseOptions(newlines_in_values=True),
                convert_options=pa.csv.ConvertOptions(
                    column_types=types, strings_can_be_null=True, null_values=[""], auto_dict_encode=False
                ),
            )
        except pa.ArrowInvalid as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> SourceError:
        fault = fault_of(self._path, self._name, error)
        if fault is not None:
            return fault
        remedy = "Write it in UTF-8 with a header, commas, and as many fields in every row."
        return SourceError(f"{self._name} cannot be read as CSV: {line_of(error)}", remedy=remedy)


def _has_lines(texts: pa.Array) -> bool:
    return bool(pc.any(pc.match_substring_regex(texts, "[\r\n]")).as_py())


class JsonTable:
    """A manifest of JSON objects, one a line. A column's type is the one that holds all its values."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name

    @cached_property
    def schema(self) -> pa.Schema:
        """All its columns, found by reading the file once; integers are doubles, unless one is too large for that."""
        schema, large = self._found
        wide = [field if field.name in large else pa.field(field.name, widened(field.type)) for field in schema]
        return pa.schema(wide)

    def batches(self) -> Iterator[pa.Table]:
        """Yields its rows; what a row leaves out is null."""
        schema, _ = self._found
        typed = pa.schema([field for field in schema if not pa.types.is_null(field.type)])
        for lines, rows in self._rows():
            try:
                table = pa.Table.from_pylist(rows, schema=typed)
            except MISFITS as error:  # an integer, where a later one of the column is none
                raise self._misfit(error, lines, rows, typed) from error
            yield to_portable(table, schema, self._name)

    @cached_property
    def _found(self) -> tuple[pa.Schema, set[str]]:
        """All columns as read, and those of integers that a double does not hold."""
        schema, large = pa.schema([]), set[str]()
        for lines, rows in self._rows():
            if not rows:
                continue
            try:
                # Not Table.from_pylist: it takes its columns from the first row alone.
                batch = pa.RecordBatch.from_struct_array(pa.array(rows))
                schema = pa.unify_schemas([schema, batch.schema], promote_options="permissive")
            except MISFITS as error:
                raise self._misfit(error, lines, rows, schema) from error
            large |= {name for name in batch.schema.names if is_large(batch[name])}
        return portable_schema(schema, self._name), large

    def _misfit(
        self, error: Exception, lines: Sequence[int], rows: Sequence[Mapping[str, Any]], schema: pa.Schema
    ) -> SourceError:
        """The error for rows that become no columns.

        Args:
            schema: of what there is before them.
        """
        at, column, error = first_misfit(rows, schema) or (0, None, error)
        where = f"{self._name}, line {lines[at]}, column {column}" if column else f"{self._name}, lines from {lines[0]}"
        if isinstance(error, UnicodeEncodeError):
            message = f"{where}: a text holds half a character: {line_of(error)}"
            return SourceError(message, remedy="Write both halves of the \\u escape, or leave it out.")
        if isinstance(error, OverflowError):
            remedy = "Store it as a string, or leave it out."
            return SourceError(f"{where}: an integer has more than 64 bits", remedy=remedy)
        remedy = "Give each column values of one type."
        return SourceError(f"{where}: values do not fit together: {line_of(error)}", remedy=remedy)

    def _rows(self) -> Iterator[tuple[list[int], list[dict[str, Any]]]]:
        """Yields rows and the lines that hold them."""
        with self._path.open(encoding="utf-8-sig") as file:
            numbered = enumerate(file, start=1)
            try:
                while lines := list(islice(numbered, BATCH_ROWS)):
                    filled = [(number, line) for number, line in lines if line.strip()]
                    yield [number for number, _ in filled], [self._parse(number, line) for number, line in filled]
            except UnicodeDecodeError as error:
                raise SourceError(f"{self._name} is not in UTF-8", remedy="Write it in UTF-8.") from error

    def _parse(self, number: int, line: str) -> dict[str, Any]:
        too_deep = SourceError(
            f"{self._name}, line {number} is nested too deep",
            remedy=f"Store what is nested in more than {DEEPEST} levels as a string, or leave it out.",
        )
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            message = f"{self._name}, line {number} is not JSON: {error.msg}"
            raise SourceError(message, remedy="Write one object a line.") from error
        except ValueError as error:  # of Python, beyond 4,300 digits
            message = f"{self._name}, line {number} holds a number of too many digits"
            raise SourceError(message, remedy="Store it as a string, or leave it out.") from error
        except RecursionError as error:
            raise too_deep from error
        if not isinstance(row, dict):
            message = f"{self._name}, line {number} holds a {type(row).__name__}"
            raise SourceError(message, remedy="Write one object a line.")
        if line.count("[") + line.count("{") > DEEPEST and is_deeper(row, DEEPEST + 1):
            raise too_deep
        return row


def line_of(error: Exception) -> str:
    """What an error says, in one line that is not long."""
    return " ".join(str(error).split())[:200]
