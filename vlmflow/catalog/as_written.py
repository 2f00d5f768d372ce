"""Rows of a table's file as vlmflow would have written them, whoever did: its types, and lists of whole items."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from vlmflow import schema
from vlmflow.catalog.folder import Folder
from vlmflow.errors import CatalogError

# Without which items of the lists of an image say nothing.
_NEEDED = {
    "labels": ("category", "label", "decision"),
    "detections": ("detector", "output"),
    "answers": ("question",),
    "errors": ("class",),
}


def as_written(rows: pa.Table, folder: Folder, path: str) -> pa.Table:
    """The rows without such items of labels, detections, answers and errors as are null, or null in their name.

    Args:
        path: of the file, relative to the catalog, which begins with the table's name.

    Raises:
        CatalogError: a column of ours has values of another type.
    """
    is_images = path.startswith("images/")
    for field in schema.IMAGES if is_images else schema.EMBEDDINGS:
        place = rows.schema.get_field_index(field.name)
        if place < 0:
            continue
        found = rows.schema.field(place)
        if not _is_like(found.type, field.type):
            raise CatalogError(
                f"{folder.config.uri}: {path} has {field.name} as {found.type}, not {field.type}",
                remedy="Another program wrote it: have it write the column again, or restore the version before.",
            )
        if is_images and field.name in _NEEDED and pt.is_list(found.type):
            rows = rows.set_column(place, found, _with_whole_items(rows.column(place), _NEEDED[field.name]))
    return rows


def _is_like(found: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether values of one type mean the same under another."""
    if pt.is_null(found) or found == wanted:
        return True
    if pt.is_list(wanted):
        return bool(pt.is_list(found)) and _is_like(found.value_type, wanted.value_type)
    if pt.is_struct(wanted):
        types = {field.name: field.type for field in wanted}
        return bool(pt.is_struct(found)) and all(
            _is_like(field.type, types.get(field.name, field.type)) for field in found
        )
    are_numbers = (pt.is_integer(kind) or pt.is_floating(kind) for kind in (found, wanted))
    are_times = (pt.is_timestamp(kind) for kind in (found, wanted))
    return all(are_numbers) or all(are_times)


def _with_whole_items(column: pa.ChunkedArray, needed: Sequence[str]) -> pa.ChunkedArray:
    return pa.chunked_array([_whole(chunk, needed) for chunk in column.chunks], column.type)


def _whole(lists: pa.ListArray, needed: Sequence[str]) -> pa.ListArray:
    items = lists.flatten()
    if not pt.is_struct(items.type):  # of a null type: there are none
        return lists
    # Of a struct that is null its members are, too.
    members = [pc.struct_field(items, name) for name in needed if items.type.get_field_index(name) >= 0]
    if not any(member.null_count for member in members):
        return lists
    are_whole = np.logical_and.reduce([np.asarray(member.is_valid()) for member in members])
    parents = np.asarray(pc.list_parent_indices(lists))[are_whole]
    ends = np.cumsum([0, *np.bincount(parents, minlength=len(lists))], dtype=np.int32)
    return pa.ListArray.from_arrays(
        pa.array(ends), items.filter(pa.array(are_whole)), type=lists.type, mask=lists.is_null()
    )
