"""Moderation backfill: the rows of a range of partitions come under another policy, partition by partition.

No image is read. The table is the progress: a partition whose rows carry the policy is passed over, so a backfill that
was killed is simply run again. While one is at work, none to another policy begins. Rolled back by an inverse backfill,
which touches only rows that still carry the policy.
"""

from __future__ import annotations

import datetime as dt
import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

from prefect import flow, runtime, tags, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import FlowRun, State
from prefect.futures import PrefectFuture, as_completed
from prefect.states import Completed
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import Field

from pipelines import alerts, artifacts
from pipelines.at_work import backfill_at_work
from pipelines.common import (
    RETRIES,
    RETRY_DELAYS_S,
    RunProgress,
    log_to_flow_run,
    make_steps,
    may_pass,
    read_job,
    slug,
    stop_jobs_of,
)
from pipelines.ray_jobs import Command
from pipelines.steps import Steps, check_command, remoderate_command
from vlmflow.catalog import Catalog
from vlmflow.config import CatalogConfig, Job
from vlmflow.engine.progress import SilentProgress
from vlmflow.engine.remoderate_report import RemoderateReport
from vlmflow.engine.scope import Scope
from vlmflow.errors import ConfigError, VlmflowError
from vlmflow.moderation.policy import load_policy

logger = logging.getLogger("vlmflow")

_MAX_AT_ONCE = 16
_SHOW_INTERVAL_S = 60.0
# Its own type parameter does not fit what `flow` asks for.
_RUNNER: Any = ThreadPoolTaskRunner(max_workers=_MAX_AT_ONCE)
# `prefect concurrency-limit create vlmflow-backfill N` bounds partitions at work over all backfills. A server that is
# started again may keep slots of tasks that are over: `prefect concurrency-limit reset vlmflow-backfill`.
TAG = "vlmflow-backfill"


def partitions(config: CatalogConfig, start: dt.date | None, end: dt.date | None) -> list[dt.date]:
    """The ingest dates that a catalog holds rows of, within a range that includes both ends.

    Raises:
        CatalogError: there is no catalog.
    """
    scope = Scope(start, end)
    files = Catalog.open(config).live_files("images").values()
    return sorted({file.ingest_date for file in files if scope.holds(file)})


def _run_name() -> str:
    given = runtime.flow_run.parameters
    if given.get("rollback"):
        what = f"rollback of {given['rollback']}"
    else:
        what = f"policy {Path(given['policy']).stem}" if given.get("policy") else "policy of the job"
    span = f"{given.get('start') or 'first'} to {given.get('end') or 'last'}"
    return f"{'dry run, ' if given.get('dry_run') else ''}{what}, {span}"


def _read_job(given: Mapping[str, Any]) -> Job:
    return read_job(Path(given["job_file"]), {"policy": given.get("policy"), "tasks": ("embed", "moderate")})


def _commands(flow_run: FlowRun) -> Iterator[Command]:
    """What a flow run may follow on a Ray cluster."""
    given = flow_run.parameters
    job = _read_job(given)
    yield check_command(job, given.get("where"), given.get("rollback"))
    for date in partitions(job.catalog, given.get("start"), given.get("end")):
        scope = Scope(date, date, given.get("where"))
        yield remoderate_command(job, scope, given.get("rollback"), dry_run=bool(given.get("dry_run")))


@flow(
    name="moderation-backfill",
    flow_run_name=_run_name,
    task_runner=_RUNNER,
    persist_result=False,
    on_running=[alerts.check_messenger],
    on_failure=[alerts.tell_failure],
    on_crashed=[alerts.tell_failure],
    on_cancellation=[stop_jobs_of(_commands)],
)
def moderation_backfill(
    job_file: Path,
    policy: str | None = None,
    rollback: str | None = None,
    start: dt.date | None = None,
    end: dt.date | None = None,
    where: str | None = None,
    dry_run: bool = False,
    partitions_at_once: Annotated[int, Field(ge=1, le=_MAX_AT_ONCE)] = 1,
    ray_jobs_url: str | None = None,
    deadline_hours: Annotated[float, Field(gt=0)] = 12.0,
    notify: str | None = None,
) -> State[Any]:
    """Puts the rows of a range of partitions under another moderation policy, or back under the one before.

    Refused while a backfill to another policy is at work on the catalog.

    Args:
        job_file: The job (YAML) of the catalog: its profile and its storage count, its source is not read.
        policy: The policy to go to: a YAML file where the flow runs, or the name of one that ships. Default: the
            job's, if it names one.
        rollback: Instead of a policy: digest, or its beginning, of the one to leave. Its rows go back to the policy
            that each had before; nothing else is undone.
        start: First ingest date. Default: the first there is.
        end: Last ingest date. Default: the last there is.
        where: Only rows of which this SQL condition is true (DuckDB).
        dry_run: Report how decisions would flip, and write nothing.
        partitions_at_once: Partitions at work at the same time.
        ray_jobs_url: Dashboard of a Ray cluster, such as http://ray-head:8265, to which the work is submitted.
            Default: the flow's own process does it.
        deadline_hours: Of each submitted partition; what it committed stays.
        notify: A notification block, as type/name, such as slack-webhook/moderation, for failures.
    """
    log_to_flow_run()
    job = _read_job({"job_file": job_file, "policy": policy})
    alerts.send_kept(notify, job.catalog)
    if rollback is None and job.policy is None:
        raise ConfigError("the backfill names neither a policy nor a rollback", remedy="Give policy or rollback.")
    if rollback is not None and policy is not None:
        raise ConfigError("the backfill names both a policy and a rollback", remedy="Give one of them.")
    dates = partitions(job.catalog, start, end)
    if not dates:
        span = f"{start or 'the first'} to {end or 'the last'}"
        return Completed(message=f"Nothing to do: catalog {job.catalog.uri} holds no partition from {span}.")
    steps = make_steps(ray_jobs_url, deadline_hours)
    target = _target(job, rollback)
    check(steps, job, where, rollback)  # of a dry run too: what cannot be used would fail in each partition
    alone = nullcontext() if dry_run else backfill_at_work(job.catalog, target)
    with alone, steps.session(job), tags(TAG):
        reports = _all_partitions(steps, job, dates, where, rollback, dry_run, partitions_at_once)
    title, moved = _title(reports, rollback, dry_run), sum(report.num_moved for report in reports)
    back = "" if rollback is None or not moved else f", back to {', '.join(artifacts.policies_of(reports))}"
    of = f"{len(dates)} partition{'' if len(dates) == 1 else 's'}"
    return Completed(message=f"{title}: {moved:,} rows{back}, {of}.")


def _target(job: Job, rollback: str | None) -> str:
    """Where a backfill leads, in words that are equal for equal targets.

    Raises:
        PolicyError: the policy cannot be used.
    """
    if job.policy is None or rollback is not None:
        return f"rollback of policy {rollback}"
    return f"policy {load_policy(job.policy).full_name}"


def _title(reports: list[RemoderateReport], rollback: str | None, dry_run: bool) -> str:
    what = f"Policy {reports[0].policy}" if rollback is None else f"Rollback of policy {rollback}"
    return f"{what}, dry run" if dry_run else what


def _all_partitions(
    steps: Steps,
    job: Job,
    dates: list[dt.date],
    where: str | None,
    rollback: str | None,
    dry_run: bool,
    at_once: int,
) -> list[RemoderateReport]:
    """Moves partitions, a few at once, the oldest first; progress is shown as they are done.

    After the first that fails no other begins, and those at work are waited for: the backfill is at work until then.
    """
    done = _Done(slug(job.catalog.uri), dates, rollback, dry_run)
    waiting = deque(dates)
    running: dict[PrefectFuture[RemoderateReport], dt.date] = {}
    failure: Exception | None = None
    try:
        while running or (waiting and failure is None):
            while waiting and failure is None and len(running) < at_once:
                date = waiting.popleft()
                running[move_partition.submit(steps, job, date, where, rollback, dry_run)] = date
            future = next(as_completed(list(running)))
            date = running.pop(future)
            try:
                report = future.result()
            except Exception as error:  # noqa: BLE001 - raised below, once nothing is at work
                logger.error("partition %s failed, and no other begins: %s", date, error)
                if isinstance(error, VlmflowError):  # who is told of it sees no log
                    error.args = (f"partition {date}, when {len(done.reports)} of {len(dates)} were done: {error}",)
                failure = failure or error
            else:
                done.add(date, report)
    finally:
        done.show()  # a backfill that is stopped has told what it did
    if failure is not None:
        raise failure
    return done.reports


class _Done:
    """The partitions that are done, and what people see of them."""

    def __init__(self, name: str, dates: list[dt.date], rollback: str | None, dry_run: bool) -> None:
        self._name, self._rollback, self._dry_run = name, rollback, dry_run
        self._progress = RunProgress(f"backfill-{name}")
        self._found: dict[str, RemoderateReport | None] = {str(date): None for date in dates}
        self._num_shown, self._shown_at = 0, float("-inf")

    @property
    def reports(self) -> list[RemoderateReport]:
        return [report for report in self._found.values() if report is not None]

    def add(self, date: dt.date, report: RemoderateReport) -> None:
        """Takes up a partition. Tables are shown if they are old enough: Prefect keeps each one, of every partition."""
        self._found[str(date)] = report
        moved = "would move" if report.dry_run else "moved"
        logger.info("partition %s: %d rows %s; %s", date, report.num_moved, moved, self._so_far)
        self._progress.show(100.0 * len(self.reports) / len(self._found), self._so_far)
        if time.monotonic() - self._shown_at >= _SHOW_INTERVAL_S:
            self.show()

    def show(self) -> None:
        """Shows the tables, unless they say the same as the last time."""
        reports = self.reports
        if len(reports) == self._num_shown:
            return
        artifacts.show_partitions(f"backfill-partitions-{self._name}", self._found)
        title = f"{_title(reports, self._rollback, self._dry_run)}, {self._so_far}"
        artifacts.show_diff(f"backfill-diff-{self._name}", title, reports)
        self._num_shown, self._shown_at = len(reports), time.monotonic()

    @property
    def _so_far(self) -> str:
        return f"{len(self.reports)} of {len(self._found)} partitions"


@task(name="check", cache_policy=NO_CACHE, persist_result=False, retries=RETRIES,
      retry_delay_seconds=list(RETRY_DELAYS_S), retry_condition_fn=may_pass)  # fmt: skip
def check(steps: Steps, job: Job, where: str | None, rollback: str | None) -> None:
    """Refuses a policy, a rollback or a condition that no partition could use."""
    steps.check_remoderation(job, where, rollback)


@task(
    name="move partition",
    task_run_name="partition {date}",
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=RETRIES,
    retry_delay_seconds=list(RETRY_DELAYS_S),
    retry_condition_fn=may_pass,
)
def move_partition(
    steps: Steps, job: Job, date: dt.date, where: str | None, rollback: str | None, dry_run: bool
) -> RemoderateReport:
    """Moves the rows of one ingest date."""
    return steps.remoderate(job, Scope(date, date, where), rollback, dry_run=dry_run, progress=SilentProgress())


if __name__ == "__main__":
    from pipelines.command_line import main

    main(moderation_backfill)
