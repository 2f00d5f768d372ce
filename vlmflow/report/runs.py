"""The record of a run, as the page needs it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import islice
from typing import Any

from vlmflow.catalog import Catalog, RunInfo
from vlmflow.engine.report import RunReport
from vlmflow.errors import ConfigError
from vlmflow.report.killed import enrichment_of, with_counts

_RUN_ID = re.compile("[A-Za-z0-9_-]{1,100}")


@dataclass(frozen=True)
class RunFacts:
    """A run.

    Attributes:
        enrichment: with what the table holds of a run that was killed. None: the run was another kind of work, such as
            a remoderation, or a version of vlmflow wrote its record that we do not understand.
    """

    run_id: str
    state: str  # running, dead, finished
    record: dict[str, Any]
    enrichment: RunReport | None


def find_run(catalog: Catalog, run_id: str | None) -> RunFacts | None:
    """The run of that id; without one, the newest that wrote rows. None: there has been none.

    Raises:
        ConfigError: there is no run of that id.
    """
    if run_id is not None:
        # An id becomes part of a path: what no run is called is not looked for.
        record = catalog.runs.get(run_id) if _RUN_ID.fullmatch(run_id) else None
        if record is None:
            newest = ", ".join(run.run_id for run in islice(catalog.runs.newest(), 3)) or "none"
            raise ConfigError(f"--run {run_id[:100]}: no such run", remedy=f"The newest runs are: {newest}.")
        return _facts(catalog, RunInfo(run_id, catalog.runs.state(run_id) or "finished", record, None))
    for run in catalog.runs.newest():
        if "tasks" in run.record and run.record.get("status") != "nothing_due":
            return _facts(catalog, run)
        if run.record.get("num_moved") and not run.record.get("dry_run"):
            return _facts(catalog, run)
    return None


def _facts(catalog: Catalog, run: RunInfo) -> RunFacts:
    report = enrichment_of(run.record)
    state = "finished" if run.has_ended else run.state  # it has its figures then, though it may keep a lease
    if report is not None and state != "running":
        (report,) = with_counts(catalog, [report])
    return RunFacts(run.run_id, state, run.record, report)
