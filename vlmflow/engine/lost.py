"""Images that went into a run and came back from no worker: which they are, and what may still be done for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import pyarrow as pa

from vlmflow.catalog import keys
from vlmflow.engine.quarantine import Stages
from vlmflow.errors import UnreconciledError

# An image that kills its worker costs its block. Where that makes many, they are sent through the pipeline again in
# blocks of so many rows, and then so many.
SMALL_BLOCKS = (16, 4)
# So many are run alone at once: one image may take a block of them down, and another pipeline needs its models first. A
# node that dies takes more, and nothing is wrong with them; alone they would take many times as long.
SOON_ALONE = 512
# Of the images that were sent, a share that no single ones take down: then something else is wrong, such as the models.
NOT_OF_IMAGES = 0.9


def lost_rows(planned: Iterable[pa.Table], committed: Sequence[pa.Array]) -> pa.Table:
    """The planned rows whose key no committed file holds.

    Args:
        planned: at least one table.
        committed: keys, as ``schema.KEY``.
    """
    # One index for all tables: is_in would hash every committed key again for each of them.
    index = keys.index_of(keys.concat(committed))
    absent = [
        rows.filter(pa.array(index.find(*keys.to_words(keys.to_binary(rows["image_id"]))) < 0)) for rows in planned
    ]
    return pa.concat_tables(absent)


def want_small_blocks(num_lost: int, num_sent: int, max_images: int) -> bool:
    """Whether lost images are sent through the pipeline in smaller blocks before they are run alone.

    Args:
        num_lost: of the ``num_sent`` that were sent last.
        max_images: how many may be run alone.
    """
    return min(max_images, SOON_ALONE) < num_lost <= NOT_OF_IMAGES * num_sent


def in_small_batches(stages: Stages, num_rows: int) -> Stages:
    """The stages with batches of at most so many rows: Ray Data would join the blocks to larger ones."""
    pools = [pool.model_copy(update={"batch_size": min(pool.batch_size, num_rows)}) for pool in stages.pools]
    return dataclasses.replace(stages, pools=tuple(pools))


def unreconciled(
    run_id: str, lost: pa.Table, num_planned: int, max_images: int, reason: str | None
) -> UnreconciledError:
    """The error for images that stay lost. It names the run: people are told of it, and look for its record.

    Args:
        max_images: how many are run alone.
        reason: what a worker failed with.
    """
    because = f"; a worker failed with: {reason}" if reason else ""
    examples = ", ".join(lost["uri"].slice(0, 3).to_pylist())
    return UnreconciledError(
        f"{lost.num_rows:,} of {num_planned:,} images did not come out of run {run_id}, such as {examples}{because}",
        remedy="The others are committed. Run the same command again: only these are due. If it is they that take "
        f"workers down, and not the models or the machines, set quarantine.max_images (now {max_images:,}) to at least "
        f"{lost.num_rows:,}: then each is run alone.",
    )
