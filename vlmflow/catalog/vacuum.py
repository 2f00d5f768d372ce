"""Removes what nobody needs any more from a catalog's folder: leftovers of killed runs, and files of old versions."""

from __future__ import annotations

import datetime as dt
import uuid
from collections import Counter
from dataclasses import dataclass

from vlmflow.catalog.commit import Change, CommitRequest, commit
from vlmflow.catalog.files import FileKind, Found, look_through
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.log import LONGEST_RETENTION, TableLog
from vlmflow.catalog.runs import RunStore
from vlmflow.errors import ConfigError

RETENTION = dt.timedelta(days=7)
# Operations whose records go with the retention. Of an erasure its tombstones tell when it was, and for good.
UPKEEP = ("erase", "index", "review", "vacuum")
_NUM_EXAMPLES = 5


@dataclass(frozen=True)
class VacuumResult:
    """What a vacuum removed, or would remove.

    Attributes:
        num_files, num_bytes: removed, by kind: orphan, staged, old.
        num_pending: files of live runs, which stay.
        num_kept: files of old versions within the retention, which stay.
        foreign: examples of files that are none of ours, which stay.
        revoked: dead runs that may commit no more.
        live_runs: runs that write at the moment.
        failed: paths that could not be deleted; another vacuum tries again.
        num_records: records of upkeep past the retention that were removed too: they say no more than when it was.
    """

    dry_run: bool
    num_files: dict[str, int]
    num_bytes: dict[str, int]
    num_pending: int
    num_kept: int
    num_foreign: int
    foreign: tuple[str, ...]
    revoked: tuple[str, ...]
    live_runs: tuple[str, ...]
    failed: tuple[str, ...]
    num_records: int = 0


def vacuum(
    folder: Folder, logs: tuple[TableLog, ...], runs: RunStore, run_id: str, *, retention: dt.timedelta, dry_run: bool
) -> VacuumResult:
    """Removes orphans of runs that are over, and files of old versions past the retention.

    The order makes it safe. The states of runs are read first. Dead runs are revoked in both tables before anything
    is listed: from then on they cannot commit, even if their process was only suspended. The folder is listed before
    the logs are read. So what a run has committed is seen as live, and what a run may still commit is never touched.

    The runs that it has revoked are still to be buried: :meth:`vlmflow.catalog.runs.RunStore.bury`.

    Args:
        run_id: of this vacuum.
        retention: how long files of old versions stay for time travel and slow readers.

    Raises:
        ConfigError: the retention is negative, or longer than the log remembers removed files.
    """
    if not dt.timedelta() <= retention <= LONGEST_RETENTION:
        hours = LONGEST_RETENTION // dt.timedelta(hours=1)
        raise ConfigError(
            f"a retention of {retention / dt.timedelta(hours=1):g} hours is not between 0 and {hours}",
            remedy=f"Give at most {hours}: the log forgets removed files after that.",
        )
    states = runs.states()
    states.pop(run_id, None)
    dead = tuple(sorted(run for run, state in states.items() if state == "dead"))
    if dead and not dry_run:
        revoke(logs, run_id, dead)
    kinds: Counter[FileKind] = Counter()
    num_bytes: Counter[str] = Counter()
    num_kept = 0
    foreign: list[str] = []
    doomed: list[str] = []
    for found in look_through(folder, logs, states, runs.now(), retention):
        if _may_go(found):
            kinds[found.kind] += 1
            num_bytes[found.kind] += found.file.size_bytes
            doomed.append(found.file.path)
        elif found.kind == "old":
            num_kept += 1
        elif found.kind != "live":
            kinds[found.kind] += 1
            if found.kind == "foreign" and len(foreign) < _NUM_EXAMPLES:
                foreign.append(found.file.path)
    failed = [] if dry_run else folder.delete_all(doomed)
    spent = runs.spent(UPKEEP, retention)
    if not dry_run:
        runs.forget(spent)
    return VacuumResult(
        dry_run=dry_run,
        num_files={kind: kinds[kind] for kind in ("orphan", "staged", "old")},
        num_bytes={kind: num_bytes[kind] for kind in ("orphan", "staged", "old")},
        num_pending=kinds["pending"],
        num_kept=num_kept,
        num_foreign=kinds["foreign"],
        foreign=tuple(foreign),
        revoked=dead,
        live_runs=tuple(sorted(run for run, state in states.items() if state == "running")),
        failed=tuple(failed),
        num_records=len(spent),
    )


def revoke(logs: tuple[TableLog, ...], run_id: str, dead: tuple[str, ...]) -> None:
    """Makes sure that runs commit no more, by a commit in each table that whoever decided before must look at."""
    for log in logs:
        request = CommitRequest(uuid.uuid4().hex, run_id, "revoke", log.refresh().version, revokes=dead, always=True)
        commit(log, request, lambda _: Change())


def _may_go(found: Found) -> bool:
    return found.kind in ("orphan", "staged") or (found.kind == "old" and found.expired)
