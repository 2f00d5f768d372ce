"""The record and the lease of every run, under ``CATALOG/runs/``."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import logging
import secrets
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from vlmflow.catalog.folder import Folder
from vlmflow.errors import CatalogError, VlmflowError
from vlmflow.threads import Threads

logger = logging.getLogger("vlmflow")

RUNS = "runs"
FLOWS = "flows"
LEASE_SUFFIX = ".lease"
DEAD_AFTER = dt.timedelta(minutes=10)
# A lease that is to come, by more than a clock is ever set back under a live run: of one that died before that.
_TO_COME = dt.timedelta(days=1)
HEARTBEAT_S = 30.0
_STAMP = "%Y%m%dT%H%M%S"
_READ_AT_ONCE = 16  # records
_UPKEEP_BYTES = 1024  # no record of :meth:`RunStore.recorded` has more
_CLOCK = "clock"  # file that is written to learn what time the store has
# In the record of a run that has brought late verdicts into all rows: when it began to, by the store's clock.
_EVERY_ROW = "every_row"

LONG_AGO = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)

RunState: TypeAlias = Literal["running", "dead", "finished"]


def new_run_id() -> str:
    """An id for a run: when it started, and something that no other has."""
    return f"{dt.datetime.now(dt.UTC):{_STAMP}}-{secrets.token_hex(4)}"


@dataclass(frozen=True)
class RunInfo:
    """A run as its files tell it."""

    run_id: str
    state: RunState  # dead: no heartbeat for DEAD_AFTER, and never finished
    record: dict[str, Any]
    seen_at: dt.datetime | None  # last heartbeat; None for a finished run

    @property
    def started_at(self) -> dt.datetime:
        """When it started, to the second: by its id, else by its record; long ago where neither says it."""
        return _second_of(self.run_id) or _started_at(self.record).replace(microsecond=0)

    @property
    def has_ended(self) -> bool:
        """Whether its record says how it ended. It may keep a lease all the same; see :meth:`RunStore.finish`."""
        return self.state == "finished" or _says_its_end(self.record)


class RunStore:
    """Reads and writes run records. A lease is a file whose time of modification is the last heartbeat.

    That time is the store's. Clocks of machines may differ from it by more than a lease bears, so whoever acts on what
    is dead goes by :meth:`now`, and has started a run of his own or called :meth:`set_clock` before.

    Args:
        below: the folder in the catalog: RUNS, or FLOWS for what commits no row itself and keeps others of its kind
            away. Nobody waits for those, or looks through rows for their sake.
    """

    def __init__(self, folder: Folder, below: str = RUNS) -> None:
        self._folder, self._below = folder, below
        self._clock: tuple[dt.datetime, float] | None = None  # what the store's clock said, and then the monotonic one

    def start(self, run_id: str, record: dict[str, Any]) -> None:
        """Opens a run: lease first, so that nobody ever takes it for dead. It goes again if there can be no record.

        Raises:
            CatalogError: there is a run of that name.
        """
        if self.get(run_id) is not None:
            raise CatalogError(f"run {run_id} exists already", remedy="Every run needs an id of its own.")
        try:
            self.heartbeat(run_id)
            self._set_clock_by(self._lease(run_id))
            self._put(run_id, record)
        except BaseException:
            # Else it would be one of a run that died, for which the next runs look through all rows.
            with contextlib.suppress(VlmflowError):
                self._folder.delete(self._lease(run_id))
            raise

    def set_clock(self) -> None:
        """Learns what time the store has, for who starts no run: by a small file."""
        path = f"{self._below}/{_CLOCK}"
        self._folder.write(path, b"")
        self._set_clock_by(path)

    def _set_clock_by(self, path: str) -> None:
        written_at = time.monotonic()  # after it was stamped: runs look rather younger than older
        file = self._folder.stat(path)
        if file is not None:
            self._clock = (file.modified_at, written_at)

    def now(self) -> dt.datetime:
        """The time by the store's clock; by that of this machine where nothing was written yet."""
        if self._clock is None:
            return dt.datetime.now(dt.UTC)
        then, monotonic = self._clock
        return then + dt.timedelta(seconds=time.monotonic() - monotonic)

    def heartbeat(self, run_id: str) -> None:
        """Renews the lease. To be called at least once a minute."""
        self._folder.write(self._lease(run_id), json.dumps({"at": dt.datetime.now(dt.UTC).isoformat()}).encode())

    @contextlib.contextmanager
    def keep_alive(self, run_id: str) -> Iterator[None]:
        """Renews the lease in a thread while the block runs."""
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(HEARTBEAT_S):
                try:
                    self.heartbeat(run_id)
                except VlmflowError as error:
                    # The run goes on: a lost lease matters only to a vacuum, and the next beat renews it.
                    logger.warning("heartbeat of run %s failed: %s", run_id, error)

        thread = threading.Thread(target=beat, name="vlmflow-heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    @contextlib.contextmanager
    def recorded(self, operation: str, *, is_kept: bool = True, every_row: bool = False) -> Iterator[str]:
        """A run of upkeep (vacuum, erase, ...): gives its id, and keeps its lease while the block runs.

        What it did is in the log of the tables; its record says no more than when it ran and how it ended.

        Args:
            is_kept: False: the record goes at the end, as of what is done every few seconds.
            every_row: it brings late verdicts into all rows; see :meth:`unsettled`.
        """
        run_id = new_run_id()
        record: dict[str, Any] = {"operation": operation, "started_at": dt.datetime.now(dt.UTC).isoformat()}
        self.start(run_id, record | {"status": "running"})
        if every_row:
            record[_EVERY_ROW] = self.now().isoformat()
        status = "interrupted"  # by what is no Exception: Ctrl-C, or what Prefect ends a flow run with
        try:
            with self.keep_alive(run_id):
                yield run_id
            status = "done"
        except GeneratorExit:  # it was let go of before its end: it leaves what a killed one does
            status = ""
            raise
        except Exception:
            status = "failed"
            raise
        finally:
            ended = record | {"status": status, "finished_at": dt.datetime.now(dt.UTC).isoformat()}
            if status:
                self.conclude(run_id, ended if is_kept else None)

    def conclude(self, run_id: str, record: dict[str, Any] | None, *, keep_lease: bool = False) -> None:
        """Finishes a run that has done what it could: what fails here is logged, and hides nothing that ended it.

        Args:
            record: None: it leaves none.
            keep_lease: as of :meth:`finish`.
        """
        try:
            if record is None:
                # First: without a lease it would be one of a finished run.
                self._folder.delete_all([self._record(run_id)])
                self._folder.delete(self._lease(run_id))
            else:
                self.finish(run_id, record, keep_lease=keep_lease)
        except VlmflowError as error:
            logger.warning("the record of run %s could not be completed: %s", run_id, error)

    def finish(self, run_id: str, record: dict[str, Any], *, keep_lease: bool = False) -> None:
        """Puts the final record in place and gives up the lease.

        Args:
            keep_lease: the run has left something undone, and counts as one that died until a vacuum buries it.
        """
        self._put(run_id, record)
        if not keep_lease:
            self._folder.delete(self._lease(run_id))

    def amend(self, run_id: str, **counts: int) -> None:
        """Puts counts into the record of a run at work, for who meets it killed; what fails here is logged."""
        try:
            if (record := self.get(run_id)) is not None:
                self._put(run_id, record | counts)
        except VlmflowError as error:
            logger.warning("the record of run %s could not be kept up: %s", run_id, error)

    def get(self, run_id: str) -> dict[str, Any] | None:
        """The record of a run, empty where it is damaged: no run stops for that; None: there is no such run."""
        try:
            return self._folder.read_json(self._record(run_id))
        except CatalogError as error:
            logger.warning("%s", error)
            return {}

    def started_at(self, run_id: str) -> dt.datetime:
        """When a run started, by its record, else by its id; long ago where neither says it."""
        found = _started_at(self.get(run_id) or {})
        return (_second_of(run_id) or LONG_AGO) if found == LONG_AGO else found

    def list(self) -> list[RunInfo]:
        """All runs, the newest first; see :meth:`newest`, which reads no more records than are asked for."""
        return [*self.newest()]

    def newest(self) -> Iterator[RunInfo]:
        """The runs, the newest first; their records are read as they come, some at a time.

        They come by when they started: to the second as their ids say, which begin with it, then as their records say,
        and of equal ones by id. An id that does not begin so is placed by its record. Not by the time of the record's
        file: a vacuum and an erasure write old records anew.
        """
        leases = self._leases()
        seconds = {run: _second_of(run) for run in leases}
        records = self._read([run for run, second in seconds.items() if second is None])
        starts = {run: second or _started_at(records[run]).replace(microsecond=0) for run, second in seconds.items()}
        order = sorted(leases, key=starts.__getitem__, reverse=True)
        while order:
            count = min(_READ_AT_ONCE, len(order))
            while count < len(order) and starts[order[count]] == starts[order[count - 1]]:
                count += 1
            some, order = order[:count], order[count:]
            records |= self._read([run for run in some if run not in records])
            infos = [RunInfo(run, self._state(leases[run]), records[run], leases[run]) for run in some]
            yield from sorted(
                infos, key=lambda run: (starts[run.run_id], _started_at(run.record), run.run_id), reverse=True
            )

    def spent(self, operations: Collection[str], age: dt.timedelta) -> Sequence[str]:
        """Runs of upkeep of some kinds that have ended, and began longer ago than that.

        Records that are longer than those of upkeep are not read: a catalog of years has thousands.
        """
        since = dt.datetime.now(dt.UTC) - age
        sizes = {file.path.removeprefix(f"{self._below}/"): file.size_bytes for file in self._folder.list(self._below)}
        short = [name.removesuffix(".json") for name, size in sizes.items() if size <= _UPKEEP_BYTES]
        old = [run for run in short if (second := _second_of(run)) is not None and second < since]
        over = [run for run in old if f"{run}.json" in sizes and f"{run}{LEASE_SUFFIX}" not in sizes]
        return [run for run, record in self._read(over).items() if record.get("operation") in operations]

    def forget(self, run_ids: Sequence[str]) -> None:
        """Removes the records of runs that are over."""
        self._folder.delete_all([self._record(run) for run in run_ids])

    def running(self) -> Sequence[RunInfo]:
        """The runs with a young lease, in no order; no record of others is read."""
        leases = {run: seen_at for run, seen_at in self._leases().items() if self._state(seen_at) == "running"}
        records = self._read([*leases])
        return [RunInfo(run, "running", records[run], seen_at) for run, seen_at in leases.items()]

    def states(self) -> dict[str, RunState]:
        """How every run is doing."""
        return {run: self._state(seen_at) for run, seen_at in self._leases().items()}

    def unsettled(self) -> set[str]:
        """The runs that have not ended and may have committed rows without what people and lists say of them.

        Not those that were dead already when all rows were looked at: a run that goes on after all renews its lease.
        """
        seen = {run: seen_at for run, seen_at in self._leases().items() if seen_at is not None}
        for run in self.newest() if seen else ():
            started_at = _started_at(run.record)
            if LONG_AGO < started_at < min(seen.values()) + DEAD_AFTER:
                break
            looked_at = _time_of(run.record.get(_EVERY_ROW))  # none: of a version that did not ask the store's clock
            if looked_at != LONG_AGO and run.record.get("status") == "done":
                return {run_id for run_id, seen_at in seen.items() if looked_at < seen_at + DEAD_AFTER}
        return set(seen)

    def bury(self, run_id: str) -> None:
        """Says in the record of a dead run that it is, and takes its lease away. It must have been revoked.

        Late verdicts must be in its rows too: the next run looks for them only where a run has a lease.
        """
        record = self.get(run_id) or {}
        if not _says_its_end(record):
            message = "died: it gave no sign of life, and a vacuum has removed what it had not committed"
            record |= {"status": "failed", "state": "dead", "message": message}
        self.finish(run_id, record)

    def over(self) -> set[str]:
        """The runs that commit no more: finished, or buried.

        A dead run is not among them: its process may only be suspended, between the commits of the two tables too, and
        goes on where it was until a vacuum has revoked it.
        """
        return {run for run, seen_at in self._leases().items() if seen_at is None}

    def state(self, run_id: str) -> RunState | None:
        """How the run is doing; None: there is no such run."""
        lease = self._folder.stat(self._lease(run_id))
        if lease is None and self._folder.stat(self._record(run_id)) is None:
            return None
        return self._state(lease.modified_at if lease else None)

    def seen_at(self, run_id: str) -> dt.datetime | None:
        """The last heartbeat of a run; None: it has no lease."""
        lease = self._folder.stat(self._lease(run_id))
        return lease.modified_at if lease else None

    def is_live(self, run_id: str) -> bool:
        """Whether the run may still write."""
        return self.state(run_id) == "running"

    def _state(self, seen_at: dt.datetime | None) -> RunState:
        if seen_at is None:
            return "finished"
        return "running" if -_TO_COME < self.now() - seen_at < DEAD_AFTER else "dead"

    def _leases(self) -> dict[str, dt.datetime | None]:
        """The last heartbeat of each run; None: it has no lease."""
        found: dict[str, dt.datetime | None] = {}
        for file in self._folder.list(self._below):
            run_id, _, kind = file.path.removeprefix(f"{self._below}/").rpartition(".")
            if kind == "lease":
                found[run_id] = file.modified_at
            elif kind == "json":
                found.setdefault(run_id, None)
        return found

    def _read(self, run_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Records by id; empty ones of runs that have none."""
        with Threads(_READ_AT_ONCE) as pool:
            return dict(zip(run_ids, (record or {} for record in pool.map(self.get, run_ids)), strict=True))

    def _put(self, run_id: str, record: dict[str, Any]) -> None:
        data = json.dumps({**record, "run_id": run_id}, indent=2, default=str, ensure_ascii=False)
        self._folder.write(self._record(run_id), data.encode("utf-8"))

    def _record(self, run_id: str) -> str:
        return f"{self._below}/{run_id}.json"

    def _lease(self, run_id: str) -> str:
        return f"{self._below}/{run_id}{LEASE_SUFFIX}"


def _says_its_end(record: dict[str, Any]) -> bool:
    return bool(record.get("status", "running") != "running")


def _second_of(run_id: str) -> dt.datetime | None:
    """When the run started, by an id that :func:`new_run_id` made; None: another made it."""
    try:
        return dt.datetime.strptime(run_id.partition("-")[0], _STAMP).replace(tzinfo=dt.UTC)
    except ValueError:
        return None


def _started_at(record: dict[str, Any]) -> dt.datetime:
    """When the run started; before all others where the record does not say."""
    return _time_of(record.get("started_at"))


def _time_of(value: object) -> dt.datetime:
    try:
        found = dt.datetime.fromisoformat(str(value))
    except ValueError:
        return LONG_AGO
    return found if found.tzinfo else found.replace(tzinfo=dt.UTC)
