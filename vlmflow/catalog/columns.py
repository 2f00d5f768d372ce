"""The caller's columns: types that Delta tables of any reader can hold, new ones, and tables brought to a schema."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from vlmflow import schema
from vlmflow.errors import CatalogError

_JOINED_BYTES = 64 * 1024 * 1024  # of a table that rows are taken of in one go: all of it is copied for that
_PIECE_BYTES = 128 * 1024 * 1024  # of rows that are taken of a larger one: about so many at a time
_MOST_BYTES = 1024 * 1024 * 1024  # of these rows, where some are much longer than others


def storable(columns: pa.Schema) -> pa.Schema:
    """The caller's columns under the types that the catalog keeps them in.

    Delta has no unsigned integers, dictionaries or nanoseconds, and timestamps without a zone would shut out
    readers of protocol version 1, so they are taken as UTC. A column of nulls alone has no type yet: it is left out,
    as are such members of structs.

    Raises:
        CatalogError: a type cannot be stored, or two names differ by their case only.
    """
    fields = [pa.field(field.name, _storable(field.name, field.type)) for field in columns]
    typed = [field for field in fields if not pt.is_null(field.type)]
    _check_cases([field.name for field in typed])
    return pa.schema(typed)


def plain(rows: pa.Table) -> pa.Table:
    """A table under the types that vlmflow writes texts, bytes and lists as.

    A Parquet file says as what it was written, and Arrow reads it so: views of deltalake and Polars, large types,
    dictionaries. Of a Delta table all are the same type, but Arrow's functions take some for others, or not at all.
    """
    if all(_plain(field.type) == field.type for field in rows.schema):
        return rows
    return rows.cast(pa.schema([field.with_type(_plain(field.type)) for field in rows.schema]))


def source_columns(table: pa.Schema) -> pa.Schema:
    """The caller's columns that a table of images has."""
    index = table.get_field_index("source")
    return pa.schema([]) if index < 0 else pa.schema(list(table.field(index).type))


def missing_columns(table: pa.Schema, wanted: pa.Schema) -> tuple[pa.Field, ...]:
    """What the images table lacks of the caller's ``wanted`` columns: nothing, or a struct ``source`` to merge into it.

    A column that is there may lack members of its structs: the struct to merge has the column with these alone.

    Raises:
        CatalogError: the table holds a column under another type that cannot take the values, or one or its member
            under a name that differs by its case only.
    """
    held = {field.name: field.type for field in source_columns(table)}
    for field in wanted:
        if field.name in held and not _fits(field.type, held[field.name]):
            raise CatalogError(
                f"source column {field.name!r} is {field.type} but the catalog holds it as {held[field.name]}",
                remedy=_remedy(held[field.name]),
            )
    new = _new_members(pa.struct(list(wanted)), pa.struct(list(source_columns(table))))
    return () if new is None else (pa.field("source", new),)


def grown(held: pa.DataType, given: pa.DataType) -> pa.DataType:
    """The type of a column that is there once it has the members that a listing's has besides."""
    if pt.is_list(held) and pt.is_list(given):
        return pa.list_(grown(held.value_type, given.value_type))
    if not (pt.is_struct(held) and pt.is_struct(given)):
        return held
    types = {field.name: field.type for field in given}
    kept = [pa.field(field.name, grown(field.type, types.pop(field.name, field.type))) for field in held]
    return pa.struct([*kept, *(pa.field(name, kind) for name, kind in types.items())])


def checked_numbers(batches: Iterable[pa.RecordBatch], table: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Yields references whose numbers keep their values under the types that the images table holds them as.

    Files without missing numbers have integers where those with some have doubles.

    Raises:
        CatalogError: a number does not.
    """
    held = {field.name: field.type for field in source_columns(table)}
    for batch in batches:
        for field in source_columns(batch.schema):
            kind = held.get(field.name, field.type)
            is_mixed = {pt.is_floating(field.type), pt.is_floating(kind)} == {False, True}
            if (is_mixed or pt.is_nested(kind)) and field.type != kind and not pt.is_null(field.type):
                _cast(member(batch["source"], field.name), field.with_type(kind))
        yield batch


def _remedy(kind: pa.DataType) -> str:
    return (
        f"A catalog keeps the type that a column had first: give its values as {kind}, give the column another name in "
        "the source, or begin another catalog."
    )


def flat(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """A column in one piece, whatever its number of chunks."""
    if isinstance(column, pa.Array):
        return column
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays([pa.array([], column.type), *column.chunks])


def as_floats(values: pa.Array) -> npt.NDArray[np.float64]:
    """(N,) numbers of any kind, nulls as NaN."""
    return np.asarray(pc.fill_null(values.cast(pa.float64()), np.nan), np.float64)


def taken(rows: pa.Table, at: npt.NDArray[np.int64]) -> pa.Table:
    """Rows by their numbers, in as many chunks as they need: callers' texts may be of any length.

    ``Table.take`` joins all chunks of a column first, and fails where they hold more than 2 GiB of text.
    """
    if rows.nbytes <= _JOINED_BYTES:
        return rows.take(pa.array(at))
    batches = rows.to_batches()
    starts = np.cumsum([0, *(batch.num_rows for batch in batches)])
    step = max(1, rows.num_rows * _PIECE_BYTES // rows.nbytes)
    pieces = [_gathered(batches, starts, at[first : first + step]) for first in range(0, len(at), step)]
    return pa.concat_tables([rows.schema.empty_table(), *pieces])


def _gathered(batches: Sequence[pa.RecordBatch], starts: npt.NDArray[np.int64], at: npt.NDArray[np.int64]) -> pa.Table:
    holders = np.searchsorted(starts, at, side="right") - 1
    parts, places = [], []
    for number in np.unique(holders).tolist():
        mine = np.flatnonzero(holders == number)
        parts.append(batches[number].take(pa.array(at[mine] - starts[number])))
        places.append(mine)
    found = pa.Table.from_batches(parts)
    if len(parts) == 1:
        return found
    if found.nbytes > _MOST_BYTES:
        half = len(at) // 2
        return pa.concat_tables([_gathered(batches, starts, some) for some in (at[:half], at[half:])])
    return found.take(pa.array(np.argsort(np.concatenate(places))))


def constant(value: str | None, count: int) -> pa.Array:
    """A column that says the same in every row."""
    return pa.repeat(pa.scalar(value, pa.string()), count)


def member(values: pa.StructArray, name: str) -> pa.Array:
    """A column of the caller's, null where there is no struct; by its number, for a name may begin with a dot."""
    # Unlike StructArray.field it heeds the parent's offset and nulls; of a name it would take `.a` for the field `a`.
    return pc.struct_field(values, values.type.get_field_index(name))


def conform(rows: pa.Table, columns: pa.Schema) -> pa.Table:
    """Brings rows to a schema: order, types, and nulls for columns (and fields of structs) that they lack."""
    arrays = [conform_column(rows, field) for field in columns]
    return pa.table(arrays, schema=columns)


def conform_column(rows: pa.Table, field: pa.Field) -> pa.ChunkedArray:
    """One column of :func:`conform`."""
    index = rows.schema.get_field_index(field.name)
    if index < 0:
        return pa.chunked_array([pa.nulls(rows.num_rows, field.type)])
    column = rows.column(index)
    if field.name == "source" and column.type != field.type:
        chunks = [_conform_struct(chunk, field.type) for chunk in column.chunks]
        return pa.chunked_array(chunks, type=field.type)
    return column.cast(field.type)


def _conform_struct(values: pa.StructArray, wanted: pa.StructType) -> pa.StructArray:
    children = []
    for field in wanted:
        if values.type.get_field_index(field.name) < 0:
            children.append(pa.nulls(len(values), field.type))
        else:
            children.append(_cast(member(values, field.name), field))
    return pa.StructArray.from_arrays(children, fields=list(wanted), mask=pc.is_null(values))


def _cast(values: pa.Array, field: pa.Field) -> pa.Array:
    try:
        return values.cast(field.type)
    except pa.ArrowInvalid as error:  # an integer, say, that a double does not hold exactly
        raise CatalogError(
            f"source column {field.name!r} holds what does not become {field.type}, as the catalog holds it: {error}",
            remedy=_remedy(field.type),
        ) from error


def _check_cases(names: list[str]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.lower(), name)
        if other != name:
            raise CatalogError(
                f"source columns {other!r} and {name!r} differ by case only",
                remedy="Rename one: many readers of the table take them for the same.",
            )


def _new_members(given: pa.DataType, held: pa.DataType, of: str = "") -> pa.DataType | None:
    """What of a given type the held one, which it fits, lacks: structs with these members alone, in lists too."""
    if pt.is_list(given) and pt.is_list(held):
        items = _new_members(given.value_type, held.value_type, of)
        return None if items is None else pa.list_(items)
    if not (pt.is_struct(given) and pt.is_struct(held)):
        return None
    types = {field.name: field.type for field in held}
    names = [*types, *(field.name for field in given if field.name not in types)]
    if len(names) > len(types):
        _check_cases([of + name for name in names])
    lacking = []
    for field in given:
        inner = f"{of}{field.name}."
        kind = _new_members(field.type, types[field.name], inner) if field.name in types else field.type
        if kind is not None:
            lacking.append(pa.field(field.name, kind))
    return pa.struct(lacking) if lacking else None


def _fits(given: pa.DataType, held: pa.DataType) -> bool:
    if pt.is_list(given) and pt.is_list(held):
        return _fits(given.value_type, held.value_type)
    if pt.is_struct(given) and pt.is_struct(held):  # either may have members that the other lacks
        types = {field.name: field.type for field in held}
        return all(_fits(field.type, types.get(field.name, field.type)) for field in given)
    if given == held or (pt.is_integer(given) and pt.is_integer(held) and given.bit_width <= held.bit_width):
        return True
    if pt.is_integer(held) and pt.is_floating(given):
        return True  # checked_numbers tells of values that are no integers
    return bool(pt.is_float64(held) and (pt.is_integer(given) or pt.is_floating(given)))


def _plain(kind: pa.DataType) -> pa.DataType:
    if pt.is_dictionary(kind):
        return _plain(kind.value_type)
    if pt.is_large_string(kind) or pt.is_string_view(kind):
        return pa.string()
    if pt.is_large_binary(kind) or pt.is_binary_view(kind):
        return pa.binary()
    if pt.is_list(kind) or pt.is_large_list(kind):
        return pa.list_(kind.value_field.with_type(_plain(kind.value_type)))
    if pt.is_map(kind):
        return pa.map_(_plain(kind.key_type), _plain(kind.item_type))
    if pt.is_struct(kind):
        return pa.struct([field.with_type(_plain(field.type)) for field in kind])
    return kind


def _storable(name: str, kind: pa.DataType) -> pa.DataType:
    if pt.is_dictionary(kind):
        return _storable(name, kind.value_type)
    if pt.is_unsigned_integer(kind):
        return {8: pa.int16(), 16: pa.int32(), 32: pa.int64()}.get(kind.bit_width, pa.decimal128(20, 0))
    if pt.is_timestamp(kind):
        return schema.TIMESTAMP
    if pt.is_date(kind):
        return pa.date32()
    if pt.is_float16(kind):
        return pa.float32()
    if pt.is_large_string(kind) or pt.is_string_view(kind):
        return pa.string()
    if pt.is_large_binary(kind) or pt.is_binary_view(kind) or pt.is_fixed_size_binary(kind):
        return pa.binary()
    if pt.is_list(kind) or pt.is_large_list(kind) or pt.is_fixed_size_list(kind):
        items = _storable(name, kind.value_type)
        return items if pt.is_null(items) else pa.list_(items)
    if pt.is_struct(kind):
        members = [pa.field(child.name, _storable(name, child.type)) for child in kind]
        typed = [member for member in members if not pt.is_null(member.type)]
        return pa.struct(typed) if typed else pa.null()
    if pt.is_null(kind):
        return kind
    plain = pt.is_integer(kind) or pt.is_floating(kind) or pt.is_boolean(kind)
    if plain or pt.is_string(kind) or pt.is_binary(kind) or pt.is_decimal(kind):
        return kind
    raise CatalogError(f"source column {name!r} has type {kind}", remedy="Convert it to a string, a number or a time.")
