"""The record and the lease of every run, under ``CATALOG/runs/``."""

from __future__ import annotations

import datetime as dt
import json
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from vlmflow.catalog.folder import Folder
from vlmflow.errors import CatalogError

RUNS = "runs"
DEAD_AFTER = dt.timedelta(minutes=10)

RunState: TypeAlias = Literal["running", "dead", "finished"]


@dataclass(frozen=True)
class RunInfo:
    """A run as its files tell it."""

    run_id: str
    state: RunState  # dead: no heartbeat for DEAD_AFTER, and never finished
    record: dict[str, Any]
    seen_at: dt.datetime | None  # last heartbeat; None for a finished run


class RunStore:
    """Reads and writes run records. A lease is a file whose time of modification is the last heartbeat."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder

    def start(self, run_id: str, record: dict[str, Any]) -> None:
        """Opens a run: lease first, so that nobody ever takes it for dead.

        Raises:
            CatalogError: there is a run of that name.
        """
        if self.get(run_id) is not None:
            raise CatalogError(f"run {run_id} exists already", remedy="Every run needs an id of its own.")
        self.heartbeat(run_id)
        self._put(run_id, record)

    def heartbeat(self, run_id: str) -> None:
        """Renews the lease. To be called at least once a minute."""
        self._folder.write(_lease(run_id), json.dumps({"at": dt.datetime.now(dt.UTC).isoformat()}).encode())

    def finish(self, run_id: str, record: dict[str, Any]) -> None:
        """Puts the final record in place and gives up the lease."""
        self._put(run_id, record)
        self._folder.delete(_lease(run_id))

    def get(self, run_id: str) -> dict[str, Any] | None:
        """The record of a run; None: there is no such run."""
        return self._folder.read_json(_record(run_id))

    def list(self) -> list[RunInfo]:
        """All runs, the newest first (by the time of their record)."""
        leases: dict[str, dt.datetime] = {}
        records: dict[str, dt.datetime] = {}
        for file in self._folder.list(RUNS):
            name = file.path.removeprefix(f"{RUNS}/")
            if name.endswith(".lease"):
                leases[name.removesuffix(".lease")] = file.modified_at
            elif name.endswith(".json"):
                records[name.removesuffix(".json")] = file.modified_at
        runs = sorted(leases.keys() | records.keys(), key=lambda run: records.get(run) or leases[run], reverse=True)
        return [RunInfo(run, _state(leases.get(run)), self.get(run) or {}, leases.get(run)) for run in runs]

    def state(self, run_id: str) -> RunState | None:
        """How the run is doing; None: there is no such run."""
        lease = self._folder.stat(_lease(run_id))
        if lease is None and self._folder.stat(_record(run_id)) is None:
            return None
        return _state(lease.modified_at if lease else None)

    def is_live(self, run_id: str) -> bool:
        """Whether the run may still write."""
        return self.state(run_id) == "running"

    def _put(self, run_id: str, record: dict[str, Any]) -> None:
        data = json.dumps({**record, "run_id": run_id}, indent=2, default=str, ensure_ascii=False)
        self._folder.write(_record(run_id), data.encode("utf-8"))


def _record(run_id: str) -> str:
    return f"{RUNS}/{run_id}.json"


def _lease(run_id: str) -> str:
    return f"{RUNS}/{run_id}.lease"


def _state(seen_at: dt.datetime | None) -> RunState:
    if seen_at is None:
        return "finished"
    # The store's clock against ours: ten minutes bear the difference.
    return "running" if dt.datetime.now(dt.UTC) - seen_at < DEAD_AFTER else "dead"
