"""What lies in a catalog's folder, held against what its tables' logs say."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from vlmflow.catalog.folder import FileInfo, Folder
from vlmflow.catalog.log import TableLog
from vlmflow.catalog.runs import RunState
from vlmflow.catalog.writer import STAGING, writer_of

# A file of a run without a record is an orphan only after this time: a record is written before any file, but a
# store may show the two in another order.
UNKNOWN_RUN_AGE = dt.timedelta(hours=24)

FileKind: TypeAlias = Literal[
    "live",  # in the newest version of its table
    "old",  # of an earlier version: the log says when it was removed
    "orphan",  # no version has it, and its run will not bring it into one any more
    "staged",  # rows to be merged, of a run that will not merge them any more
    "pending",  # of a run that may still commit it
    "foreign",  # none of ours, by its name
]


@dataclass(frozen=True)
class Found:
    """A file of the folder."""

    file: FileInfo  # path relative to the catalog
    kind: FileKind
    expired: bool = False  # of an old one: removed longer ago than the retention


def look_through(
    folder: Folder, logs: tuple[TableLog, ...], states: dict[str, RunState], retention: dt.timedelta
) -> Iterator[Found]:
    """Tells what each file of the tables and each staged file is.

    The folder is listed before the logs are read. So a file that is listed and in no version is either of a run that
    may still commit, or an orphan for good.

    Args:
        states: of the runs, read before this call; a run that was over then brings no file into a version any more.
    """
    now = dt.datetime.now(dt.UTC)

    def is_over(file: FileInfo, run_id: str) -> bool:
        if run_id in states:
            return states[run_id] != "running"
        return now - file.modified_at > UNKNOWN_RUN_AGE

    listed = {log.name: [file for file in folder.list(log.name) if "/_delta_log/" not in file.path] for log in logs}
    staged = list(folder.list(STAGING))
    for log in logs:
        live = log.refresh().files.keys()
        removed, expired = log.removed_files(dt.timedelta()), log.removed_files(retention)
        for file in listed[log.name]:
            path = file.path.removeprefix(f"{log.name}/")
            run_id = writer_of(file.path)
            if path in live:
                yield Found(file, "live")
            elif run_id is None:
                yield Found(file, "foreign")
            elif path in removed:
                yield Found(file, "old", expired=path in expired)
            else:
                yield Found(file, "orphan" if is_over(file, run_id) else "pending")
    for file in staged:
        run_id = writer_of(file.path)
        if run_id is None:
            yield Found(file, "foreign")
        else:
            yield Found(file, "staged" if is_over(file, run_id) else "pending")
