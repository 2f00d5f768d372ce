"""What stood in the table before a run: its log remembers, until a vacuum takes the old files away."""

from __future__ import annotations

import datetime as dt

import pyarrow.compute as pc

from vlmflow.catalog.folder import Folder
from vlmflow.catalog.keys import KeyIndex, concat, index_of, to_binary
from vlmflow.catalog.log import TableLog
from vlmflow.errors import VlmflowError


def flagged_before(folder: Folder, images: TableLog, run_id: str, started_at: dt.datetime) -> KeyIndex | None:
    """The images that were flagged before a run's first commit; those whose file is live are left out, because the run
    has not touched them. None: that cannot be told any more.

    Args:
        started_at: of the run.
    """
    snapshot = images.refresh()
    try:
        first = images.first_commit_of(run_id, started_at)
        if first is None:
            return None
        old = sorted(images.files_at(first - 1).keys() - snapshot.files.keys())
        tables = [folder.read_parquet(f"images/{path}", ["image_id", "decision"]) for path in old]
    except VlmflowError:  # the log or a file of then has been cleaned away
        return None
    flagged = [to_binary(rows.filter(pc.not_equal(rows["decision"], "allow"))["image_id"]) for rows in tables]
    return index_of(concat(flagged))
