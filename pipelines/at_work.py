"""Who is at work on a catalog, by the signs of life of its runs: two nights would compute everything twice, and two
backfills to different policies would leave some rows under each.

Prefect's own limits on concurrency are not up to this. A slot is held by a lease that the server forgets when it is
started again: the flow run that holds it is ended, for it cannot renew the lease, and nobody gets the slot any more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pipelines.reports import is_night
from vlmflow.catalog import Catalog
from vlmflow.catalog.runs import HEARTBEAT_S, RunInfo, RunStore
from vlmflow.config import CatalogConfig, Job
from vlmflow.errors import BackfillError
from vlmflow.sources import normalise_uri

# Heartbeats that may be late: a store may be slow.
_LOOK_S = 3 * HEARTBEAT_S
_POLL_S = 5.0
_BACKFILL, _NIGHT = "backfill: ", "night: "


@contextmanager
def night_begun(job: Job) -> Iterator[str | None]:
    """Says that a night over the job's source has begun, while the block runs: it takes minutes to its first images.

    So of the nights that a server starts at once after it was away, which missed their hour, one computes.

    Returns:
        What it is known by to :func:`night_at_work`; None: there is no catalog yet, and nowhere to say it.

    Raises:
        StorageAccessError, TransientError: the catalog is out of reach.
    """
    if not Catalog.exists(job.catalog):
        yield None
        return
    with Catalog.open(job.catalog).runs.recorded(_name(job), is_kept=False) as own:
        yield own


def night_at_work(job: Job, own: str | None = None) -> RunInfo | None:
    """The run of another night over the job's source that is at work on its catalog, or on its way to that.

    Args:
        own: of a night that has said it has begun, what it is known by. It goes before those that said so later, by
            their clocks; if these are wrong both may compute, and the commits see to it that each image is there once.

    Raises:
        StorageAccessError, TransientError: the catalog cannot be looked at.
    """
    if not Catalog.exists(job.catalog):
        return None
    runs, name = Catalog.open(job.catalog).runs, _name(job)
    runs.set_clock()
    began = None if own is None else (str((runs.get(own) or {}).get("started_at")), own)

    def is_before(run: RunInfo) -> bool:
        if run.record.get("operation") != name:
            return is_night(run.record, job)
        return began is None or (str(run.record.get("started_at")), run.run_id) < began

    return _living(runs, is_before)


def _name(job: Job) -> str:
    return _NIGHT + normalise_uri(job.source.uri)


@contextmanager
def backfill_at_work(config: CatalogConfig, target: str) -> Iterator[None]:
    """Keeps the lease of a backfill while the block runs.

    Another one to the same target is let in: it may be this one, killed and started again, and does no harm. Two that
    begin at once are both refused: each has said that it is there before it looks, so that one of them sees the other,
    and which of them was first no clock can tell.

    Args:
        target: where the rows go, in words.

    Raises:
        BackfillError: one to another target is at work.
    """
    runs = Catalog.open(config).runs
    with runs.recorded(_BACKFILL + target) as own:

        def is_in_the_way(run: RunInfo) -> bool:
            operation = str(run.record.get("operation"))
            return run.run_id != own and operation.startswith(_BACKFILL) and operation != _BACKFILL + target

        other = _living(runs, is_in_the_way)
        if other is not None:
            raise BackfillError(
                f"catalog {config.uri}: run {other.run_id} is at work, {other.record['operation']}",
                remedy="Start this one when that is over, or has been cancelled.",
            )
        yield


def _living(runs: RunStore, is_meant: Callable[[RunInfo], bool]) -> RunInfo | None:
    """A run that gives a sign of life while one looks, which takes a minute and a half where none comes.

    That its lease is young does not suffice: it may have been killed since.
    """
    found = [run for run in runs.list() if run.state == "running" and not run.has_ended and is_meant(run)]
    until = time.monotonic() + _LOOK_S
    while found and time.monotonic() < until:
        time.sleep(_POLL_S)
        now = {run.run_id: runs.seen_at(run.run_id) for run in found}
        for run in found:
            if now[run.run_id] not in (None, run.seen_at):
                return run
        found = [run for run in found if now[run.run_id] is not None]  # the others are over
    return None
