"""The record of a run, as the page needs it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from vlmflow.catalog import Catalog
from vlmflow.engine.progress import duration
from vlmflow.engine.report import PoolReport, RunReport
from vlmflow.errors import ConfigError

_RUN_ID = re.compile("[A-Za-z0-9_-]{1,100}")
_MIN_BUSY = 0.8  # share of its time from which a pool is what limits a run
_MIN_STARTUP = 0.5


@dataclass(frozen=True)
class RunFacts:
    """A run.

    Attributes:
        enrichment: None: the run was another kind of work, such as a remoderation, or a version of vlmflow wrote its
            record that we do not understand.
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
            newest = ", ".join(run.run_id for run in catalog.runs.list()[:3]) or "none"
            raise ConfigError(f"--run {run_id[:100]}: no such run", remedy=f"The newest runs are: {newest}.")
        return _facts(run_id, catalog.runs.state(run_id) or "finished", record)
    for run in catalog.runs.list():
        if "tasks" in run.record and run.record.get("status") != "nothing_due":
            return _facts(run.run_id, run.state, run.record)
        if run.record.get("num_moved") and not run.record.get("dry_run"):
            return _facts(run.run_id, run.state, run.record)
    return None


def what_limited(report: RunReport) -> str:
    """In a sentence or two, what the run spent its time on; empty where the record does not tell."""
    sentences = []
    if report.seconds and report.startup_s / report.seconds > _MIN_STARTUP:
        sentences.append(
            f"Start-up: {duration(report.startup_s)} of {duration(report.seconds)} went by before the first images "
            "were done (processes started, models loaded)."
        )
    pool = max(report.pools, key=_busy_share, default=None)
    if pool is None or not pool.busy_s:
        return " ".join(sentences)
    share = _busy_share(pool)
    busy = {stage.stage: stage.busy_s for stage in report.stages}
    then = "After that: " if sentences else ""
    if share >= _MIN_BUSY:
        slowest = max(pool.tasks, key=lambda task: busy.get(task, 0.0))
        sentences.append(
            f"{then}the models. Pool {'+'.join(pool.tasks)} was busy {share:.0%} of its time, most of it with "
            f"{slowest} ({duration(busy.get(slowest, 0.0))}). More or faster devices would make such a run shorter."
        )
    else:
        slower = max(("read", "decode"), key=lambda stage: busy.get(stage, 0.0))
        doing = "reading the images" if slower == "read" else "decoding"
        sentences.append(
            f"{then}{doing}. The busiest pool, {'+'.join(pool.tasks)}, waited {1 - share:.0%} of its time for images; "
            f"reading took {duration(busy.get('read', 0.0))} and decoding {duration(busy.get('decode', 0.0))} of the "
            "workers' time. More processors would make such a run shorter, or a store that answers sooner."
        )
    text = " ".join(sentences)
    return text[0].upper() + text[1:]


def _busy_share(pool: PoolReport) -> float:
    return pool.busy_s / max(pool.busy_s + pool.waiting_s, 1e-9)


def _facts(run_id: str, state: str, record: dict[str, Any]) -> RunFacts:
    known = {name: value for name, value in record.items() if name in RunReport.model_fields}
    try:
        report = RunReport.model_validate(known)
    except ValidationError:
        report = None
    return RunFacts(run_id, state, record, report)
