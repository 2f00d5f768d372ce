"""What the three flows share: their job, their names, where their steps run, and what a failure leads to."""

from __future__ import annotations

import datetime as dt
import hashlib
import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import Flow, runtime
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State, TaskRun
from prefect.exceptions import ParameterTypeError
from prefect.logging.handlers import APILogHandler
from prefect.logging.loggers import flow_run_logger
from prefect.tasks import Task

from pipelines.artifacts import SERVER_ERRORS, left_alone, say_unshown
from pipelines.ray_jobs import Command, RayJobs, without_user
from pipelines.steps import InProcess, OnCluster, Steps
from vlmflow.config import Job, load_job
from vlmflow.engine import PlanSummary, RunReport
from vlmflow.engine.progress import Lines, Tally, describe
from vlmflow.errors import MAY_PASS, VlmflowError

logger = logging.getLogger("vlmflow")

RETRIES = 2
RETRY_DELAYS_S = (30.0, 300.0)
_PROGRESS_INTERVAL_S = 10.0
# Telling a server that is away takes more than a minute, in which the run waits.
_SILENCE_S = 600.0


def read_job(job_file: Path, overrides: Mapping[str, Any]) -> Job:
    """The job of a flow run: the file, and what the run's parameters say, which wins.

    Raises:
        ConfigError: the file is absent, or a value does not fit.
    """
    return load_job(job_file, dict(overrides))


class _InOneLine(logging.Filter):
    """Leaves the traceback of our errors out of the logs of flow and task runs: they say what a reader needs.

    What a traceback repeats of their causes may hold more than anybody should read, such as the token of a session in
    what a store answers to a signature that is wrong.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], VlmflowError):
            record.exc_info = record.exc_text = None
        return True


for _name in ("prefect.flow_runs", "prefect.task_runs"):
    logging.getLogger(_name).addFilter(_InOneLine())


def log_to_flow_run() -> None:
    """Sends the library's log to the flow run's, from here on."""
    logger.setLevel(logging.INFO)
    if not any(isinstance(handler, APILogHandler) for handler in logger.handlers):
        logger.addHandler(APILogHandler())


def logical_date(given: dt.date | None, scheduled: dt.datetime | None) -> dt.date:
    """The date that a flow run stands for: the one given, else that of its schedule, which no late start moves."""
    return given or (scheduled or dt.datetime.now(dt.UTC)).astimezone(dt.UTC).date()


def slug(uri: str) -> str:
    """A short name of a catalog for artifact keys, which may hold small letters, digits and dashes alone."""
    tail = re.sub(r"[^a-z0-9]+", "-", uri.rstrip("/").rsplit("/", 1)[-1].lower()).strip("-")[:40]
    return f"{tail or 'catalog'}-{hashlib.sha256(uri.encode()).hexdigest()[:6]}"


def make_steps(ray_jobs_url: str | None, deadline_hours: float, *, once: bool = False) -> Steps:
    """Where the steps of the present flow run are done."""
    if ray_jobs_url is None:
        return InProcess()
    owner = str(runtime.flow_run.id)
    return OnCluster(ray_jobs_url, owner=owner, on_line=_log_line, deadline_s=deadline_hours * 3600, once=once)


def has_completed() -> bool:
    """Whether the present flow run has been completed before, and is retried to do its work anew."""
    return any(state.is_completed() for state in _states(UUID(str(runtime.flow_run.id))))


def _states(flow_run_id: UUID) -> list[State[Any]]:
    """The states that a flow run has had, in their order."""
    with get_client(sync_client=True) as client:
        return client.read_flow_run_states(flow_run_id)


def _waits(flow_run: FlowRun) -> bool:
    """Whether a flow run that was ended was not at work: it is retried, and waited for its start."""
    before = [state for state in _states(flow_run.id) if not (state.is_cancelling() or state.is_final())]
    return bool(before) and not before[-1].is_running()


def _log_line(line: str) -> None:
    logger.info("ray | %s", line)


def may_pass(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Whether a failed task is worth another try: a store or cluster out of reach is, bad input is not."""
    try:
        state.result()
    except MAY_PASS:
        return True
    except Exception:  # noqa: BLE001 - any other error is final, whatever its class
        return False
    return False


def rows_changed(reports: Sequence[RunReport]) -> str:
    """What runs did to rows, in words."""
    added, replaced = sum(run.num_added for run in reports), sum(run.num_replaced for run in reports)
    return f"{added:,} rows new, {replaced:,} replaced{columns_updated(reports)}"


def columns_updated(reports: Sequence[RunReport]) -> str:
    """In how many further rows runs updated the caller's columns, in words that others go before; empty for none."""
    count = sum(run.num_columns_updated for run in reports)
    return f", the caller's columns updated in {count:,} rows" if count else ""


def also_left(found: PlanSummary | RunReport) -> str:
    """What else a run leaves as it is, in words that others go before; empty for nothing."""
    return "".join(f"; {count:,} {what}" for what, count in left_alone(found).items())


def nothing_due(report: RunReport) -> str:
    """What a run says that had no images to do: how many were listed, and what of them it leaves as it is."""
    left = also_left(report)
    state = "" if left else ", all up to date"  # an image that failed three times is not
    return f"{report.num_listed:,} images listed{state}{columns_updated([report])}{left}"


class RunProgress:
    """Progress of a run, as lines of the log and as an artifact of the flow run."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._artifact: UUID | None = None
        self._lines = Lines(_PROGRESS_INTERVAL_S)
        self._silent_until = float("-inf")

    def stage(self, text: str) -> None:
        """Logs the stage, and before it the counts of the one before."""
        self.close()
        logger.info("%s", text)

    def update(self, tally: Tally) -> None:
        """Shows the counts, if they are old enough or complete."""
        if self._lines.is_due(tally):
            self._show_counts(tally)

    def close(self) -> None:
        """Shows the counts that nothing shows yet."""
        if (tally := self._lines.left()) is not None:
            self._show_counts(tally)

    def _show_counts(self, tally: Tally) -> None:
        logger.info("%s", describe(tally))
        if time.monotonic() >= self._silent_until:
            percent = 100.0 * tally.committed / tally.total if tally.total else 0.0
            self.show(percent, describe(tally))

    def done(self, report: RunReport) -> None:
        """Shows that the run is over."""
        self.close()
        self.show(100.0, rows_changed([report]))

    def show(self, percent: float, description: str) -> None:
        """Puts the artifact to a percentage. Where Prefect's server is away that is logged, and the run goes on."""
        try:
            if self._artifact is None:
                made = create_progress_artifact(percent, key=self._key, description=description)
                self._artifact = made if isinstance(made, UUID) else None
            else:
                update_progress_artifact(self._artifact, percent, description=description)
        except SERVER_ERRORS as error:
            say_unshown(self._key, error)
            self._silent_until = time.monotonic() + _SILENCE_S


def stop_jobs_of(commands: Callable[[FlowRun], Iterable[Command]]) -> Callable[..., None]:
    """A hook for the end of a flow run by force: stops the Ray jobs that it submitted, or follows.

    Args:
        commands: what a flow run may follow, whose parameters are as the flow has them. It may run in another process
            than the flow, such as a worker's.
    """

    def stop_ray_jobs(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
        url = flow_run.parameters.get("ray_jobs_url")
        if url is None or (state.is_failed() and state.name != "TimedOut"):
            return
        if not flow_run.run_count:  # cancelled before it began: it has submitted none
            return
        told = flow_run_logger(flow_run, flow)
        names = set()
        try:
            if not _waits(flow_run):  # else jobs of these names are those of other runs
                # The run keeps them as they were given: a date may have a time of midnight.
                given = flow.validate_parameters(flow_run.parameters)
                names = {command.name for command in commands(flow_run.model_copy(update={"parameters": given}))}
        except (VlmflowError, ParameterTypeError, *SERVER_ERRORS) as error:
            told.warning(
                "the jobs that others submitted and this flow run follows cannot be named: %s", without_user(str(error))
            )
        try:
            for attempt in RayJobs(url).stop_all(str(flow_run.id), names):
                told.warning("Ray job %s was stopped, as its flow run was", attempt.submission_id)
        except VlmflowError as error:
            told.error("the Ray jobs of this flow run may go on: %s", error)

    return stop_ray_jobs
