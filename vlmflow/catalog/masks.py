"""Masks over columns: which rows are null, equal, or hold something in a list."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from vlmflow.catalog.columns import flat

Mask: TypeAlias = npt.NDArray[np.bool_]


def as_mask(values: pa.Array | pa.ChunkedArray) -> Mask:
    """Booleans of Arrow, without nulls, as a mask."""
    return np.asarray(
        values.to_numpy(zero_copy_only=False) if isinstance(values, pa.Array) else values.to_numpy(), bool
    )


def is_valid(values: pa.Array | pa.ChunkedArray) -> Mask:
    """Rows that are not null."""
    return as_mask(pc.is_valid(values))


def equal(left: pa.Array | pa.ChunkedArray, right: pa.Array | pa.ChunkedArray | str) -> Mask:
    """Both known and equal."""
    return as_mask(pc.fill_null(pc.equal(left, right), False))


def decoded_alike(decoders: pa.ChunkedArray, decoder: str) -> Mask:
    """What was readable to these decoders is the same to that one: they differ in nothing but extras, behind a plus."""
    return equal(pc.list_element(pc.split_pattern(decoders, "+", max_splits=1), 0), decoder.partition("+")[0])


def same_or_null(left: pa.ChunkedArray, right: pa.ChunkedArray) -> Mask:
    """Equal, or both null."""
    both_null = pc.and_(pc.is_null(left), pc.is_null(right))
    return equal(left, right) | as_mask(both_null)


def chosen(mask: Mask, yes: pa.Array, no: pa.Array) -> pa.Array:
    """Row by row the one or the other; Arrow's if_else knows no nested lists."""
    places = np.arange(len(mask)) + np.where(mask, 0, len(mask))
    return pa.concat_arrays([yes, no]).take(pa.array(places))


def alike(left: pa.Array, right: pa.Array) -> Mask:
    """Both null, or the same value: NaN is NaN, and lists, structs and maps are the same if all that is in them is.

    Args:
        right: of the type of ``left``.
    """
    both = is_valid(left) & is_valid(right)
    same = np.ones(len(left), dtype=np.bool_)
    if pt.is_struct(left.type):
        for number in range(left.type.num_fields):
            same &= alike(pc.struct_field(left, number), pc.struct_field(right, number))
    elif pt.is_list(left.type) or pt.is_large_list(left.type) or pt.is_fixed_size_list(left.type):
        same = _alike_lists(left, right, both)
    elif pt.is_map(left.type):  # a column of another program's
        entries = pa.list_(pa.struct([("key", left.type.key_type), ("value", left.type.item_type)]))
        same = _alike_lists(left.cast(entries), right.cast(entries), both)
    else:
        same = equal(left, right)
        if pt.is_floating(left.type):
            same |= as_mask(pc.fill_null(pc.and_(pc.is_nan(left), pc.is_nan(right)), False))
    return (both & same) | ~(is_valid(left) | is_valid(right))


def _alike_lists(left: pa.ListArray, right: pa.ListArray, both: Mask) -> Mask:
    """Of those that are both not null, lists with the same items."""
    same = both & equal(pc.list_value_length(left), pc.list_value_length(right))
    rows = np.flatnonzero(same)
    left, right = left.take(pa.array(rows)), right.take(pa.array(rows))
    items = alike(pc.list_flatten(left), pc.list_flatten(right))
    parents = pc.list_parent_indices(left).to_numpy(zero_copy_only=False)
    same[rows[parents[~items]]] = False
    return same


def explode(lists: pa.ChunkedArray) -> tuple[npt.NDArray[np.int64], pa.Array]:
    """The items of all lists, each with the number of its row."""
    whole = flat(lists)
    return pc.list_parent_indices(whole).to_numpy(zero_copy_only=False).astype(np.int64), pc.list_flatten(whole)


def field_strings(items: pa.Array, field: str) -> npt.NDArray[np.object_]:
    """A field of structs, as an array of strings. For what is rare, such as errors: each becomes an object."""
    return np.asarray(pc.struct_field(items, field).to_pylist(), dtype=object)


def holds(lists: pa.ChunkedArray, value: str) -> Mask:
    """Rows whose list holds ``value``."""
    rows, items = explode(lists)
    marks = np.zeros(len(lists), dtype=np.bool_)
    marks[rows[as_mask(pc.fill_null(pc.equal(items, value), False))]] = True
    return marks
