"""What lies in a catalog's folder, held against what its tables' logs say."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from vlmflow.catalog.file_info import FileInfo
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.indexes import INDEXES
from vlmflow.catalog.known_images import KNOWN
from vlmflow.catalog.log import TableLog
from vlmflow.catalog.messages import MESSAGES
from vlmflow.catalog.policies import POLICIES
from vlmflow.catalog.reviews import REVIEWS
from vlmflow.catalog.runs import DEAD_AFTER, FLOWS, RUNS, RunState
from vlmflow.catalog.tombstones import TOMBSTONES
from vlmflow.catalog.writer import STAGING, writer_of

# A file of a run without a record is an orphan only after this time: a record is written before any file, but a
# store may show the two in another order.
UNKNOWN_RUN_AGE = dt.timedelta(hours=24)

_CHANGE_DATA = "_change_data/"  # where other programs put copies of rows that they change, should a table ask for them

_OTHERS = (REVIEWS, RUNS, FLOWS, INDEXES, POLICIES, KNOWN, TOMBSTONES, MESSAGES)  # folders whose files stand in no log

FileKind: TypeAlias = Literal[
    "live",  # in the newest version of its table
    "old",  # of an earlier version, whoever wrote it: the log says when it was removed; or a copy of changed rows
    "orphan",  # no version has it, and its run will not bring it into one any more; or its writer died writing it
    "staged",  # rows to be merged, of a run that will not merge them any more
    "pending",  # of a run that may still commit it, or of somebody who may still be writing it
    "foreign",  # none of ours, by its name
]


@dataclass(frozen=True)
class Found:
    """A file of the folder."""

    file: FileInfo  # path relative to the catalog
    kind: FileKind
    expired: bool = False  # of an old one: removed longer ago than the retention


def look_through(
    folder: Folder,
    logs: tuple[TableLog, ...],
    states: dict[str, RunState],
    now: dt.datetime,
    retention: dt.timedelta,
) -> Iterator[Found]:
    """Tells what each file of the tables, each staged file, and each unfinished one of logs and other folders is.

    The folder is listed before the logs are read. So a file that is listed and in no version is either of a run that
    may still commit, or an orphan for good.

    Args:
        states: of the runs, read before this call; a run that was over then brings no file into a version any more.
        now: by the store's clock.
    """

    def is_over(file: FileInfo, run_id: str) -> bool:
        if run_id in states:
            return states[run_id] != "running"
        return now - file.modified_at > UNKNOWN_RUN_AGE

    def all_below(name: str) -> list[FileInfo]:
        files = [*folder.list(name), *folder.unfinished(name)]
        return [file for file in files if "/_delta_log/" not in file.path]

    listed = {log.name: all_below(log.name) for log in logs}
    staged = all_below(STAGING)
    for log in logs:
        live = log.refresh().files.keys()
        removed, expired = log.removed_files(dt.timedelta()), log.removed_files(retention)
        lately: frozenset[str] | None = None  # looked up where a file is in doubt
        for file in listed[log.name]:
            path = file.path.removeprefix(f"{log.name}/")
            run_id = writer_of(file.finished_path)
            if path in live:
                yield Found(file, "live")
            elif path in removed:
                yield Found(file, "old", expired=path in expired)
            elif path.startswith(_CHANGE_DATA):
                yield Found(file, "old", expired=now - file.modified_at > retention)
            elif run_id is None:
                yield Found(file, "foreign")
            elif not is_over(file, run_id):
                yield Found(file, "pending")
            else:
                lately = log.removed_lately(now) if lately is None else lately
                yield Found(file, "old" if path in lately else "orphan")
    for file in staged:
        run_id = writer_of(file.finished_path)
        if run_id is None:
            yield Found(file, "foreign")
        else:
            yield Found(file, "staged" if is_over(file, run_id) else "pending")
    for name in (*_OTHERS, *(f"{log.name}/_delta_log" for log in logs)):
        for file in folder.unfinished(name):
            yield Found(file, "pending" if is_being_written(file, now) else "orphan")


def is_being_written(file: FileInfo, now: dt.datetime) -> bool:
    """Whether somebody may still be at an unfinished file: no run tells, as of a table's."""
    return now - file.modified_at <= DEAD_AFTER
