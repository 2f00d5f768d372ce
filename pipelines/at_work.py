"""Who is at work on a catalog, by signs of life in it: two nights would compute everything twice, and two
backfills to different policies would leave some rows under each.

Prefect's own limits on concurrency are not up to this. A slot is held by a lease that the server forgets when it is
started again: the flow run that holds it is ended, for it cannot renew the lease, and nobody gets the slot any more.
"""

from __future__ import annotations

import datetime as dt
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from pipelines.reports import is_night
from vlmflow.catalog import Catalog
from vlmflow.catalog.runs import HEARTBEAT_S, RunInfo, RunStore
from vlmflow.config import CatalogConfig, Job
from vlmflow.errors import MAY_PASS, BackfillError
from vlmflow.sources import normalise_uri

logger = logging.getLogger("vlmflow")

# Heartbeats that may be late: a store may be slow.
_LOOK_S = 3 * HEARTBEAT_S
_POLL_S = 5.0
_BACKFILL, _NIGHT = "backfill: ", "night: "


@contextmanager
def night_begun(job: Job) -> Iterator[str | None]:
    """Says that a night over the job's source has begun, while the block runs: it takes minutes to its first images.

    So of the nights that a server starts at once after it was away, which missed their hour, one computes.

    Returns:
        What it is known by to :func:`night_at_work`; None: there is no catalog yet, or it was out of reach when this
        was to be said, for which no night fails.

    Raises:
        StorageAccessError: the catalog's store refuses, or may not be written below ``flows/``.
    """
    with ExitStack() as stack:
        own = None
        try:
            if Catalog.exists(job.catalog):
                own = stack.enter_context(_said(Catalog.open(job.catalog).flows, _name(job)))
        except MAY_PASS as error:
            logger.warning("another night that begins now will not know of this one: %s", error)
        yield own


def night_at_work(job: Job, own: str | None = None) -> RunInfo | None:
    """The run of another night over the job's source that is at work on its catalog, or a night on its way to that.

    Args:
        own: of a night that has said it has begun, what it is known by. It goes before those that said so later, by
            their clocks; if these are wrong both may compute, and the commits see to it that each image is there once.

    Raises:
        StorageAccessError, TransientError: the catalog cannot be looked at.
    """
    if not Catalog.exists(job.catalog):
        return None
    catalog, name = Catalog.open(job.catalog), _name(job)
    for store in (catalog.runs, catalog.flows):
        store.set_clock()
    began = None if own is None else _order(own, catalog.flows.get(own) or {})

    def is_before(run: RunInfo) -> bool:
        is_ours = run.record.get("operation") == name and run.run_id != own
        return is_ours and (began is None or _order(run.run_id, run.record) < began)

    return _living((catalog.runs, lambda run: is_night(run.record, job)), (catalog.flows, is_before))


def _order(run_id: str, record: dict[str, object]) -> tuple[str, str]:
    return str(record.get("started_at")), run_id


def _name(job: Job) -> str:
    return _NIGHT + normalise_uri(job.source.uri)


@contextmanager
def backfill_at_work(config: CatalogConfig, target: str) -> Iterator[None]:
    """Says that a backfill is at work while the block runs.

    Another one to the same target is let in: it may be this one, killed and started again, and does no harm. Two that
    begin at once are both refused: each has said that it is there before it looks, so that one of them sees the other,
    and which of them was first no clock can tell.

    Args:
        target: where the rows go, in words.

    Raises:
        BackfillError: one to another target is at work.
    """
    flows = Catalog.open(config).flows
    with _said(flows, _BACKFILL + target) as own:

        def is_in_the_way(run: RunInfo) -> bool:
            operation = str(run.record.get("operation"))
            return run.run_id != own and operation.startswith(_BACKFILL) and operation != _BACKFILL + target

        other = _living((flows, is_in_the_way))
        if other is not None:
            raise BackfillError(
                f"catalog {config.uri}: {other.run_id} is at work, {other.record['operation']}",
                remedy="Start this one when that is over, or has been cancelled.",
            )
        yield


@contextmanager
def _said(flows: RunStore, what: str) -> Iterator[str]:
    """Gives signs of life while the block runs. What was killed, and gives none any more, is swept away first."""
    with flows.recorded(what, is_kept=False) as own:
        for run_id in [run_id for run_id, state in flows.states().items() if state != "running"]:
            flows.conclude(run_id, None)
        yield own


def _living(*meant: tuple[RunStore, Callable[[RunInfo], bool]]) -> RunInfo | None:
    """A run that gives a sign of life while one looks, which ends when each has been silent for a minute and a half.

    That its lease is young does not suffice: it may have been killed since. Who looks again at the same ones, as a
    night does before each of its steps, does not wait again.

    Args:
        meant: stores that have set their clock, and which of their runs one looks for. All are waited for at once.
    """
    # By this clock too: leases of a time when the store's was ahead stay young until it is that time again.
    until = time.monotonic() + _LOOK_S
    meant_runs = ((runs, run) for runs, is_meant in meant for run in runs.running() if is_meant(run))
    found = [(runs, run) for runs, run in meant_runs if not run.has_ended and _may_live(runs, run.seen_at)]
    if found:
        names = ", ".join(run.run_id for _, run in found)
        logger.info("waiting for a sign of life, for up to %d seconds, of what may be at work: %s", _LOOK_S, names)
    while found:
        time.sleep(_POLL_S)
        now = [runs.seen_at(run.run_id) for runs, run in found]
        for (_, run), seen_at in zip(found, now, strict=True):
            if seen_at not in (None, run.seen_at):
                return run
        young = [one for one, seen_at in zip(found, now, strict=True) if _may_live(one[0], seen_at)]
        found = young if time.monotonic() < until else []
    return None


def _may_live(runs: RunStore, seen_at: dt.datetime | None) -> bool:
    """Whether the last sign of life, by the store's clock, is young; without one a run is over."""
    return seen_at is not None and runs.now() - seen_at < dt.timedelta(seconds=_LOOK_S)
