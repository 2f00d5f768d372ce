"""The columns that a block carries inside a run, besides those of :mod:`vlmflow.schema`.

Their names stay inside the engine; none of them reaches a table.
"""

from __future__ import annotations

from collections.abc import Container

import pyarrow as pa
import pyarrow.compute as pc

# Tasks that remain to be run on the row, that have run, and that were tried and failed.
RUN_TASKS = "run_tasks"
TASKS_RUN = "tasks_run"
TASKS_FAILED = "tasks_failed"

# Tasks whose results are those of equal bytes: of a row of the catalog (the results travel in COPIED, a struct, until
# they are written), or of an image that the same actor has just worked on.
TASKS_COPIED = "tasks_copied"
COPIED = "copied"
TASKS_SHARED = "tasks_shared"

# A fault of the store that ends the run; rows after it are not to be committed. Ray Data, told to survive errored
# blocks, would swallow an exception, so the message travels as a value.
FATAL = "fatal"

# The address of the node that read the image.
NODE = "node"
# What that node's decoder is called there, as vlmflow.imaging.DECODER_VERSION.
DECODER_THERE = "decoder_there"

# Seconds of work, spread evenly over the rows of the batch so that sums stay right however blocks are cut.
SECONDS_PREFIX = "seconds_"
# Batches likewise: 1 / rows on each row.
BATCHES_PREFIX = "batches_"
# And JPEGs left to a pool's device that it did not decode.
REFUSED_PREFIX = "refused_"

# What a task has spent on a model that is paid for (requests, tokens, cost), spread likewise.
SPENT_PREFIX = "spent_"

# Floating-point operations of a task, spread likewise, and what the device could do in a second, on each row; null: it
# has not been measured yet.
FLOPS_PREFIX = "flops_"
CEILING_PREFIX = "ceiling_"

# What the run sums up over all rows; of the ceilings also how many rows have one.
SUMMED_PREFIXES = (SECONDS_PREFIX, BATCHES_PREFIX, REFUSED_PREFIX, SPENT_PREFIX, FLOPS_PREFIX, CEILING_PREFIX)
COUNT_PREFIX = "count_"

# Whether a server said, asked by what the row knows of the bytes, that it still has them: they were not read.
UNMODIFIED = "unmodified"

# The most images that a pool's tasks run at once since memory ran out; null: it never did.
AT_ONCE_PREFIX = "at_once_"

# Regions that the source has of an image, as schema.REGIONS; tasks know them by this name.
REGIONS = "regions_of_source"

# A JPEG whose pixels the first pool makes, and how it is turned (EXIF, 1 to 8); null: decoded already, or not at all.
ENCODED = "encoded"
ORIENTATION = "orientation"
SHAPER = "shaper"  # of its colours, see vlmflow.imaging.shapers.Shaper; null: sRGB
_ENCODED = (ENCODED, ORIENTATION, SHAPER)

PIXELS_PREFIX, VIEWS_PREFIX = "pixels_", "views_"


def seconds_column(stage: str) -> str:
    """Names the column with a stage's seconds of work per row."""
    return SECONDS_PREFIX + stage


def spent_column(task: str, what: str) -> str:
    """Names the column with what a task has spent of something."""
    return f"{SPENT_PREFIX}{task}:{what}"


def has_task(batch: pa.Table, column: str, task: str) -> pa.Array:
    """Tells row by row whether the list column names the task; bool, no nulls."""
    lists = batch[column].combine_chunks()
    parents = pc.list_parent_indices(lists)
    hits = pc.filter(parents, pc.equal(pc.list_flatten(lists), task))
    rows = pa.array(range(len(lists)), pa.int64())
    return pc.is_in(rows, value_set=hits.cast(pa.int64()))


def spread(seconds: float, num_rows: int) -> pa.Array:
    """Spreads an amount evenly over rows; float64."""
    return pa.repeat(pa.scalar(seconds / max(1, num_rows), pa.float64()), num_rows)


def drop_pixels(batch: pa.Table) -> pa.Table:
    """Takes the pixels off a batch, decoded and encoded; the names of the views stay."""
    dropped = [name for name in batch.column_names if name.startswith(PIXELS_PREFIX)]
    return batch.drop_columns([*dropped, *(name for name in _ENCODED if name in batch.column_names)])


def drop_regions(batch: pa.Table) -> pa.Table:
    """Takes the regions that the source has off a batch that no later pool needs."""
    return batch.drop_columns([REGIONS]) if REGIONS in batch.column_names else batch


def drop_views(batch: pa.Table, kept: Container[str] = ()) -> pa.Table:
    """Takes the names of the views off a batch that no later pool needs.

    Args:
        kept: keys of the requests whose names stay.
    """
    names = [name for name in batch.column_names if name.startswith(VIEWS_PREFIX)]
    return batch.drop_columns([name for name in names if name.removeprefix(VIEWS_PREFIX) not in kept])


def set_column(batch: pa.Table, name: str, values: pa.Array | pa.ChunkedArray) -> pa.Table:
    """Puts values in the place of a column's, under the same field."""
    index = batch.schema.get_field_index(name)
    return batch.set_column(index, batch.schema.field(index), values)


def append_to_lists(batch: pa.Table, column: str, additions: list[list[object]]) -> pa.Table:
    """Appends to a list column, row by row; rows without an addition keep their value."""
    if not any(additions):
        return batch
    index = batch.schema.get_field_index(column)
    values = [(old or []) + new for old, new in zip(batch[column].to_pylist(), additions, strict=True)]
    return batch.set_column(index, column, pa.array(values, batch.schema.field(column).type))
