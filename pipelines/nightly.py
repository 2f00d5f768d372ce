"""Nightly enrichment: doctor, quality gate, plan, enrich, verify, report.

Incremental, and idempotent for its logical date: run again, it does what is due and says so if nothing is. While
another night is at work over the same source, it does nothing.
"""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from prefect import flow, runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import Completed
from pydantic import Field

from pipelines import alerts, artifacts
from pipelines.at_work import night_at_work, night_begun
from pipelines.common import (
    RETRIES,
    RETRY_DELAYS_S,
    RunProgress,
    also_left,
    log_to_flow_run,
    logical_date,
    make_steps,
    may_pass,
    nothing_due,
    read_job,
    rows_changed,
    slug,
    stop_jobs_of,
)
from pipelines.ray_jobs import Command
from pipelines.reports import default_folder, is_told, note_told, publish_report, unreported
from pipelines.steps import Golden, Steps, doctor_command, enrich_command, gate_command, plan_command
from vlmflow.catalog import Catalog, Verification
from vlmflow.catalog.verify import ERRORS, Finding
from vlmflow.config import Job
from vlmflow.engine import PlanSummary, RunReport
from vlmflow.errors import ConfigError, RegressionError, TransientError, UnreconciledError, VerificationError
from vlmflow.verification import verify as verify_catalog

logger = logging.getLogger("vlmflow")

# What images that arrive during the run look like to a verification, and how many of them are told apart.
_LATE = ("missing", "stale")
_MAX_LATE = 10_000


def _run_name() -> str:
    given = runtime.flow_run.parameters.get("date")
    return f"nightly {given or logical_date(None, runtime.flow_run.scheduled_start_time)}"


def _commands(flow_run: FlowRun) -> list[Command]:
    """What a flow run may follow on a Ray cluster."""
    given = flow_run.parameters
    job = read_job(given["job_file"], {"date": logical_date(given.get("date"), flow_run.expected_start_time)})
    commands = [doctor_command(job), plan_command(job), enrich_command(job)]
    golden = given.get("golden")
    return commands if golden is None else [*commands, gate_command(job, golden)]


@flow(
    name="nightly-enrichment",
    flow_run_name=_run_name,
    timeout_seconds=24 * 3600,
    persist_result=False,
    on_running=[alerts.check_messenger],
    on_failure=[alerts.tell_failure, stop_jobs_of(_commands)],
    on_crashed=[alerts.tell_failure],
    on_cancellation=[stop_jobs_of(_commands)],
)
def nightly_enrichment(
    job_file: Path,
    date: dt.date | None = None,
    golden: Golden | None = None,
    ray_jobs_url: str | None = None,
    deadline_hours: Annotated[float, Field(gt=0, le=24)] = 12.0,
    report_folder: str | None = None,
    report_url: str | None = None,
    keep_reports: Annotated[int, Field(ge=1)] = 30,
    max_flagged_jump: Annotated[float, Field(gt=0, le=1)] = 0.1,
    notify: str | None = None,
) -> State[Any]:
    """Enriches whatever is due of a job's source, after a gate that keeps broken models away from the table.

    While another night is at work over the same source, nothing is done. After 24 hours a night is ended: what it
    committed stays, and the next goes on.

    Args:
        job_file: The job (YAML): source, catalog, profile, policy. A file where the flow runs.
        date: Logical date of new rows. Default: the day for which the run was scheduled, UTC.
        golden: A golden set and its accepted values. Without one there is no quality gate.
        ray_jobs_url: Dashboard of a Ray cluster, such as http://ray-head:8265, to which the work is submitted.
            Default: the flow's own process does it.
        deadline_hours: A submitted job that runs longer is stopped; what it committed stays.
        report_folder: Folder or prefix for the reports of this catalog and of no other, for older ones are removed.
            Default: beside the catalog, with "-reports" at its end.
        report_url: Where people reach that folder in a browser; makes the report a link.
        keep_reports: So many stay; older ones are removed: their thumbnails outlive an erasure.
        max_flagged_jump: How much the share of flagged images may exceed the median of the last seven runs over the
            source, under the same policy, before someone is told.
        notify: A notification block, as type/name, such as slack-webhook/moderation, for failures and alerts.
    """
    log_to_flow_run()
    day = logical_date(date, runtime.flow_run.scheduled_start_time)
    job = read_job(job_file, {"date": day})
    name = slug(job.catalog.uri)
    steps = make_steps(ray_jobs_url, deadline_hours)
    folder = report_folder or default_folder(job.catalog)
    night = _Night(job, day, folder, keep_reports, max_flagged_jump, notify)
    if (other := look_around(steps, job)) is not None:
        return _skipped(other, day)
    with night_begun(job) as own:
        if own is not None and (other := look_around(steps, job, own)) is not None:  # one that began at the same time
            return _skipped(other, day)
        alerts.send_kept(notify, job.catalog)  # of nights that begin at once one tells
        with steps.session(job):
            check(steps, job, f"doctor-{name}")
            if golden is not None:
                pass_gate(steps, job, golden, f"gate-{name}")
            plan = make_plan(steps, job, f"plan-{name}")
            if (other := look_around(steps, job, own)) is not None:  # one that began meanwhile
                return _skipped(other, day)
            # With nothing due as well: it brings verdicts and lists into rows that a run left when it was ended.
            report = enrich_due(steps, job, name)
        night.take(report, name)
        _check_catalog(steps, job, name, night)
        for key, run in night.runs:
            publish(job, run, folder, report_url, keep_reports, key)
    runs = [run for _, run in night.runs]
    return Completed(message=_summary(runs, plan, day) if runs else _nothing(plan, report, day))


class _Night:
    """The runs that await their report: those of the night, and those that other tries and nights have left without.

    Attributes:
        runs: in the order in which they are reported, each with the name of its artifacts.
    """

    def __init__(self, job: Job, day: dt.date, folder: str, keep: int, max_jump: float, notify: str | None) -> None:
        self._job, self._day, self._folder, self._keep = job, day, folder, keep
        self._max_jump, self._notify = max_jump, notify
        self.runs: list[tuple[str, RunReport]] = []

    def take(self, report: RunReport, name: str) -> None:
        """Takes up what an enrichment did, and what else has no report: a try that failed has committed rows as well.

        People are told here and now of many flagged images: what follows may fail.
        """
        new = [report] if report.status == "done" else []
        for run in new:  # before the folder of reports is looked at, which may be out of reach
            watch(self._job, run, self._folder, self._max_jump, self._notify)
        known = {run.run_id for run in (*new, *(run for _, run in self.runs))}
        left = look_back(self._job, self._day, self._folder, self._keep)
        left = [run for run in left if run.run_id not in known]
        for run in left:
            if not is_told(self._job.catalog, run, self._folder):
                watch(self._job, run, self._folder, self._max_jump, self._notify)
        runs = [*left, *new]
        self.runs += [(f"earlier-{name}", run) for run in runs[:-1]] + [(name, run) for run in runs[-1:]]


def _skipped(other: str, day: dt.date) -> State[Any]:
    """The other night does what is due. By its name no automation takes this one for a night that was completed."""
    return Completed(name="Skipped", message=f"{day}: nothing was done, for another night is at work: run {other}.")


def _nothing(plan: PlanSummary, report: RunReport, day: dt.date) -> str:
    if not plan.num_planned:
        return f"Nothing was due on {day}: {nothing_due(report)}."
    return (
        f"{day}: no run to report. {plan.num_planned:,} images were due when it was planned and none afterwards: "
        "another run has done them, or a try that was killed, which the next night reports."
    )


def _summary(reports: Sequence[RunReport], plan: PlanSummary, day: dt.date) -> str:
    bad = sum(count for run in reports for status, count in run.statuses.items() if status != "ok")
    flagged = sum(count for run in reports for decision, count in run.decisions.items() if decision != "allow")
    runs = ", ".join(run.run_id for run in reports)
    return (
        f"{day}: {rows_changed(reports)}, {flagged:,} flagged, {bad:,} with errors; "
        f"run{'s' if len(reports) > 1 else ''} {runs}{also_left(plan)}."
    )


@task(name="look around", cache_policy=NO_CACHE, retries=RETRIES, retry_delay_seconds=list(RETRY_DELAYS_S),
      retry_condition_fn=may_pass)  # fmt: skip
def look_around(steps: Steps, job: Job, own: str | None = None) -> str | None:
    """The run of another night that is at work; see :func:`pipelines.at_work.night_at_work`."""
    other = night_at_work(job, own)
    return None if other is None or steps.follows(job) else other.run_id


@task(name="doctor", cache_policy=NO_CACHE, retries=RETRIES, retry_delay_seconds=list(RETRY_DELAYS_S),
      retry_condition_fn=may_pass, timeout_seconds=1800)  # fmt: skip
def check(steps: Steps, job: Job, key: str) -> None:
    """Looks at what the run needs, and stops it if something is missing.

    Raises:
        TransientError: something is missing that may be there again in a while.
        ConfigError: something else is missing.
    """
    checks = steps.doctor(job)
    artifacts.show_checks(key, checks)
    failed = [found for found in checks if found.verdict == "fail"]
    if failed:
        error_class = TransientError if all(found.may_pass for found in failed) else ConfigError
        raise error_class(
            "; ".join(f"{found.name}: {found.found}" for found in failed),
            remedy=" ".join(found.remedy for found in failed if found.remedy),
        )


@task(name="quality gate", cache_policy=NO_CACHE, retries=RETRIES, retry_delay_seconds=list(RETRY_DELAYS_S),
      retry_condition_fn=may_pass)  # fmt: skip
def pass_gate(steps: Steps, job: Job, golden: Golden, key: str) -> None:
    """Holds the job's models against the accepted values, and stops the run if they do worse.

    Raises:
        RegressionError: they do.
    """
    report = steps.gate(job, golden)
    artifacts.show_gate(key, report)
    if not report.passed:
        problems = "; ".join(report.problems)
        alerts.emit(alerts.REGRESSION, job.catalog.uri, "vlmflow: the quality gate is closed", problems)
        raise RegressionError(
            f"the golden set {golden.uri} does not come out as accepted: {problems}",
            remedy="Nothing was written. If the change is meant, look at the new values and run `vlmflow gate accept`.",
        )


@task(name="plan", cache_policy=NO_CACHE, retries=RETRIES, retry_delay_seconds=list(RETRY_DELAYS_S),
      retry_condition_fn=may_pass)  # fmt: skip
def make_plan(steps: Steps, job: Job, key: str) -> PlanSummary:
    """Says what is due."""
    plan = steps.plan(job)
    artifacts.show_plan(key, plan)
    logger.info("%d of %d images are due%s", plan.num_planned, plan.num_listed, also_left(plan))
    return plan


@task(name="enrich", cache_policy=NO_CACHE, retries=RETRIES, retry_delay_seconds=list(RETRY_DELAYS_S),
      retry_condition_fn=may_pass)  # fmt: skip
def enrich_due(steps: Steps, job: Job, name: str) -> RunReport:
    """Does what is due. A retry goes on where the try before it stopped: the catalog is what remembers."""
    progress = RunProgress(f"enrich-{name}")
    try:
        report = steps.enrich(job, progress)
    except UnreconciledError as error:
        alerts.emit(alerts.UNRECONCILED, job.catalog.uri, "vlmflow: rows do not reconcile", str(error))
        raise
    if report.status != "nothing_due" or report.num_columns_updated:
        progress.done(report)
        artifacts.show_counts(f"counts-{name}", report)
    return report


@task(name="verify", cache_policy=NO_CACHE, retries=RETRIES, retry_delay_seconds=list(RETRY_DELAYS_S),
      retry_condition_fn=may_pass)  # fmt: skip
def verify(job: Job, key: str, earlier: Verification | None = None) -> Verification:
    """Holds the catalog against the source's listing and against its own logs.

    Args:
        earlier: what was found before images that arrived meanwhile were enriched: what is missing counts only if it
            was missing then.
    """
    found = verify_catalog(job.source, job.catalog, num_examples=_MAX_LATE)
    for kind in _LATE:
        finding = found.findings.get(kind)
        if finding is None:
            continue
        if earlier is not None and finding.count <= _MAX_LATE:  # all are known by name
            finding.examples = _in_both(earlier.findings.get(kind), finding)
            finding.count = len(finding.examples)
        if job.limit is not None or not finding.examples:
            del found.findings[kind]  # a limit leaves images out, and images go on arriving
    artifacts.show_verification(key, found)
    return found


def _in_both(before: Finding | None, now: Finding) -> list[str]:
    known = set() if before is None else set(before.examples)
    return [uri for uri in now.examples if uri in known]


def _check_catalog(steps: Steps, job: Job, name: str, night: _Night) -> None:
    """Verifies the catalog. Images that arrived since the listing are enriched first: they are no error.

    Raises:
        VerificationError: an image has no row or two, or a file is lost.
    """
    found = verify(job, f"verify-{name}")
    if any(kind in found.findings for kind in _LATE):
        logger.info("images have arrived since the listing: one more round")
        with steps.session(job):
            late = enrich_due(steps, job, f"late-{name}")
        night.take(late, f"late-{name}")
        found = verify(job, f"verify-{name}", found)
    if found.is_sound:
        return
    body = "; ".join(f"{finding.count:,} {ERRORS[kind]}" for kind, finding in found.findings.items() if kind in ERRORS)
    alerts.emit(alerts.UNRECONCILED, job.catalog.uri, "vlmflow: the catalog does not verify", body)
    raise VerificationError(f"catalog {job.catalog.uri}: {body}", remedy="`vlmflow verify` shows examples.")


@task(name="report", cache_policy=NO_CACHE, retries=RETRIES, retry_delay_seconds=list(RETRY_DELAYS_S),
      retry_condition_fn=may_pass)  # fmt: skip
def publish(job: Job, report: RunReport, folder: str, url: str | None, keep: int, name: str) -> None:
    """Writes the report of the run, and shows where it lies and what was flagged anew."""
    place, written = publish_report(job, report.run_id, report.date, folder, keep)
    link = None if url is None else f"{url.rstrip('/')}/{place.rsplit('/', 1)[-1]}"
    artifacts.show_report(f"report-{name}", place, link, f"Run {report.run_id}, {written.num_images:,} images.")
    artifacts.show_flagged(f"flagged-{name}", job, report.run_id)


@task(name="look back", cache_policy=NO_CACHE, retries=RETRIES, retry_delay_seconds=list(RETRY_DELAYS_S),
      retry_condition_fn=may_pass)  # fmt: skip
def look_back(job: Job, day: dt.date, folder: str, keep: int) -> list[RunReport]:
    """Finds the runs that have no report; see :func:`pipelines.reports.unreported`."""
    return unreported(job, day, folder, keep)


@task(name="watch", cache_policy=NO_CACHE, retries=RETRIES, retry_delay_seconds=list(RETRY_DELAYS_S),
      retry_condition_fn=may_pass)  # fmt: skip
def watch(job: Job, report: RunReport, folder: str, max_jump: float, notify: str | None) -> None:
    """Tells people if the run flagged many more images than those before it, and notes that they know."""
    jump = alerts.flagged_jump(report, Catalog.open(job.catalog).runs.newest(), max_jump)
    if jump is not None:
        share, usual = jump
        subject = "vlmflow: many more images are flagged"
        body = f"Run {report.run_id} of {job.catalog.uri}: {share:.1%} of its images; of the runs before, {usual:.1%}."
        facts = {"share": share, "usual": usual, "run_id": report.run_id}
        alerts.emit(alerts.FLAGGED_JUMP, job.catalog.uri, subject, body, facts)
        if alerts.send(notify, subject, body, job.catalog):
            note_told(job.catalog, report, folder)


if __name__ == "__main__":
    from pipelines.command_line import main

    main(nightly_enrichment)
