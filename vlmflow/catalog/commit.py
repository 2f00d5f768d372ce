"""The one commit function, for everything that changes a table of the catalog.

A raw commit of deltalake doubles or loses rows when two writers meet: both may append the same key, a file may be
removed twice, a replacement may follow a compaction of the file that it replaces. So every change is decided on
the newest snapshot, commits from that very snapshot or not at all, and is decided anew after a conflict:

- all writers share one application id and take the next number, with no retries inside deltalake: of two commits
  from one snapshot the second fails, whatever they touch;
- the commit's own id is in its metadata and is looked for in all versions since the change was planned, so that
  a commit whose answer was lost is not made twice; so is a revocation of its run, in all versions since the handle
  was opened;
- files to remove must be live, and files to add must exist and not be in the table.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa
from deltalake import DeltaTable, Field
from deltalake.exceptions import CommitFailedError, DeltaError
from deltalake.transaction import AddAction, CommitProperties, RemoveAction, Transaction

from vlmflow.catalog.folder import Folder
from vlmflow.catalog.history import COMMIT_ID, REVOKED, RUN_ID
from vlmflow.catalog.log import APPLICATION_ID, DataFile, Snapshot, TableLog, unusable
from vlmflow.catalog.runs import DEAD_AFTER
from vlmflow.errors import CatalogChangedError, CommitError, RunRevokedError
from vlmflow.storage import access_error, is_of_store, parse_address, text_of

OPERATION = "vlmflow.operation"

MAX_ATTEMPTS = 60  # at conflicts
MAX_FAULTS = 5  # of the store
_FIRST_DELAY_S = 0.05
_LONGEST_DELAY_S = 3.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CommitRequest:
    """Who commits what, and since when its id may already be in the log."""

    commit_id: str
    run_id: str
    operation: str  # append, replace, compact, add_columns, ...: for people who read the log
    since: int  # version of the table before the first attempt
    revokes: tuple[str, ...] = ()  # runs that may commit no more once this commit is made
    always: bool = (
        False  # commit even if nothing changes: whoever decided before decides anew, and it is not made twice
    )


@dataclass(frozen=True)
class Change:
    """What one commit does, decided on one snapshot: files in and out, or new columns, never both."""

    add: tuple[DataFile, ...] = ()
    remove: tuple[DataFile, ...] = ()
    new_fields: tuple[pa.Field, ...] = ()  # top-level fields, or a struct with further children
    data_change: bool = True  # False: the same rows in other files

    @property
    def is_empty(self) -> bool:
        """Nothing to commit."""
        return not (self.add or self.remove or self.new_fields)


@dataclass(frozen=True)
class Committed:
    """How a commit went."""

    version: int  # of the table afterwards
    num_conflicts: int
    repeated: bool  # an earlier call had already made this commit


def commit(log: TableLog, request: CommitRequest, propose: Callable[[Snapshot], Change]) -> Committed:
    """Makes one change whole, or not at all.

    Args:
        log: opened before the run of the request began.
        propose: decides on the newest snapshot what to do, anew after every conflict, and where a file of the
            snapshot that it reads has been replaced meanwhile. An empty change commits nothing, unless the request
            says so.

    Raises:
        RunRevokedError: the run was taken for dead, and what it wrote is being removed.
        CommitError: the change does not fit the snapshot that it was decided on (a file to remove is not live, a
            file to add does not exist or is in the table), or other writers won every attempt.
        CatalogError: the log does not go back to the version that the change was planned on any more, or deltalake
            cannot commit to the table.
        StorageAccessError: the store refuses to be written to, would let commits overwrite each other, or is gone.
        TransientError: the store failed again and again.
    """
    looked_up_to = request.since
    faults: list[Exception] = []
    for attempt in range(MAX_ATTEMPTS + 1):
        _wait(attempt)
        snapshot = log.refresh()
        log.check_writable()
        # Also after a failed attempt: it may have been made all the same, its answer lost.
        if log.was_committed(request.commit_id, looked_up_to):
            return Committed(snapshot.version, attempt, repeated=attempt == 0)
        # Not only since the change was planned: upkeep plans on the newest version, which may come after.
        if request.run_id in log.revoked(min(request.since, log.opened_at)):
            raise RunRevokedError(
                f"run {request.run_id} gave no sign of life for {DEAD_AFTER} and was revoked by a vacuum",
                remedy="What it committed stays. Run the same command again to go on.",
            )
        if attempt == MAX_ATTEMPTS or len(faults) == MAX_FAULTS:
            break
        looked_up_to = snapshot.version
        try:
            change = propose(snapshot)
        except CatalogChangedError as error:  # an erasure after the snapshot was a writer that was first
            if log.refreshed_table().version() == snapshot.version:
                raise
            logger.debug("%s: attempt %d: %s", log.name, attempt, error)
            continue
        if change.is_empty and not request.always:
            return Committed(snapshot.version, attempt, repeated=False)
        log.folder.check_exclusive()
        _check(log.folder, log.name, change, snapshot)
        try:
            _write(log.table, request, change, snapshot.number + 1)
        except CommitFailedError as error:
            logger.debug("%s: another writer was first, attempt %d", log.name, attempt)
            if log.refreshed_table().version() == snapshot.version:  # nobody was: deltalake does not want to
                faults.append(error)
        except (DeltaError, OSError) as error:
            # deltalake's words for a bucket that is gone are those for a file that is.
            log.folder.check_access()
            told = access_error(error, log.folder.config.uri) if is_of_store(error) else text_of(error)
            logger.info("%s: the commit failed and is looked at again: %s", log.name, told)
            faults.append(error)
        else:
            return Committed(log.refresh().version, attempt, repeated=False)
    if len(faults) == MAX_FAULTS:
        if is_of_store(faults[-1]):
            raise access_error(faults[-1], log.folder.config.uri) from faults[-1]
        raise unusable(log.folder, log.name, "cannot be committed to", faults[-1]) from faults[-1]
    what = f"{log.name}: other writers won {MAX_ATTEMPTS} times over a commit of run {request.run_id}"
    raise CommitError(what, remedy="Run the same command again when fewer runs write to this catalog.")


def _wait(attempt: int) -> None:
    """Lets others go first, longer after each conflict and never all for the same time."""
    if attempt:
        time.sleep(random.uniform(0, min(_LONGEST_DELAY_S, _FIRST_DELAY_S * 2**attempt)))


def _check(folder: Folder, table: str, change: Change, snapshot: Snapshot) -> None:
    """Refuses a change that would lose or double rows on this snapshot."""
    for file in change.remove:
        if file.path not in snapshot.files:
            raise CommitError(f"{table}: {file.path} is to be removed but is not in version {snapshot.version}")
    paths = [file.path for file in change.add]
    if len(set(paths)) != len(paths):
        raise CommitError(f"{table}: the same file is to be added twice")
    for file in change.add:
        if file.path in snapshot.files:
            raise CommitError(f"{table}: {file.path} is to be added but is already in version {snapshot.version}")
        found = folder.stat(f"{table}/{file.path}")
        if found is None or found.size_bytes != file.size_bytes:
            state = "does not exist" if found is None else f"has {found.size_bytes} bytes, not {file.size_bytes}"
            remedy = "Run again: what was not committed is computed anew."
            if found is None and parse_address(folder.config.uri).is_local:
                remedy += (
                    " Where other nodes of a Ray cluster wrote it, see that all have the catalog's folder at the same "
                    "path, or name a catalog in a store."
                )
            raise CommitError(f"{table}: {file.path} is to be added but {state}", remedy=remedy)


def _write(table: DeltaTable, request: CommitRequest, change: Change, number: int) -> None:
    metadata = {COMMIT_ID: request.commit_id, RUN_ID: request.run_id, OPERATION: request.operation}
    if request.revokes:
        metadata[REVOKED] = ",".join(request.revokes)
    properties = CommitProperties(
        custom_metadata=metadata,
        max_commit_retries=0,
        app_transactions=[Transaction(APPLICATION_ID, number)],
    )
    if change.new_fields:
        fields = [Field.from_arrow(field) for field in change.new_fields]
        table.alter.add_columns(fields, commit_properties=properties)
        return
    now_ms = int(time.time() * 1000)
    actions: list[AddAction | RemoveAction] = [_remove_action(file, change, now_ms) for file in change.remove]
    actions += [_add_action(file, change, now_ms) for file in change.add]
    table.create_write_transaction(
        actions,
        mode="append",
        schema=table.schema(),
        partition_by=["ingest_date"],
        commit_properties=properties,
    )


def _add_action(file: DataFile, change: Change, now_ms: int) -> AddAction:
    return AddAction(
        path=file.path,
        size=file.size_bytes,
        partition_values={"ingest_date": file.ingest_date.isoformat()},
        modification_time=now_ms,
        data_change=change.data_change,
        stats=file.stats,
    )


def _remove_action(file: DataFile, change: Change, now_ms: int) -> RemoveAction:
    return RemoveAction(
        file.path,
        change.data_change,
        now_ms,
        file.size_bytes,
        {"ingest_date": file.ingest_date.isoformat()},
    )
