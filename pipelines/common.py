"""What the three flows share: their job, their names, where their steps run, and what a failure leads to."""

from __future__ import annotations

import datetime as dt
import hashlib
import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import Flow, runtime
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.client.schemas.objects import FlowRun, State, TaskRun
from prefect.tasks import Task

from pipelines.ray_jobs import Command, RayJobs
from pipelines.steps import InProcess, OnCluster, Steps
from vlmflow.config import Job, load_job
from vlmflow.engine.progress import Tally, describe
from vlmflow.errors import ClusterError, StoreLostError, TransientError, VlmflowError

logger = logging.getLogger("vlmflow")

RETRIES = 2
RETRY_DELAYS_S = (30.0, 300.0)
_PASSES = (TransientError, StoreLostError, ClusterError)
_PROGRESS_INTERVAL_S = 10.0


def read_job(job_file: Path, overrides: Mapping[str, Any]) -> Job:
    """The job of a flow run: the file, and what the run's parameters say, which wins.

    Raises:
        ConfigError: the file is absent, or a value does not fit.
    """
    logger.setLevel(logging.INFO)
    return load_job(job_file, dict(overrides))


def logical_date(given: dt.date | None) -> dt.date:
    """The date that a flow run stands for: the one given, else that of its schedule, which no late start moves."""
    if given is not None:
        return given
    scheduled: dt.datetime | None = runtime.flow_run.scheduled_start_time
    return (scheduled or dt.datetime.now(dt.UTC)).astimezone(dt.UTC).date()


def slug(uri: str) -> str:
    """A short name of a catalog for artifact keys, which may hold small letters, digits and dashes alone."""
    tail = re.sub(r"[^a-z0-9]+", "-", uri.rstrip("/").rsplit("/", 1)[-1].lower()).strip("-")[:40]
    return f"{tail or 'catalog'}-{hashlib.sha256(uri.encode()).hexdigest()[:6]}"


def make_steps(ray_jobs_url: str | None, *, deadline_hours: float | None = None) -> Steps:
    """Where the steps of the present flow run are done.

    Raises:
        ClusterError: no Ray dashboard answers at the address.
    """
    if ray_jobs_url is None:
        return InProcess()
    deadline_s = None if deadline_hours is None else deadline_hours * 3600
    return OnCluster(ray_jobs_url, owner=str(runtime.flow_run.id), on_line=_log_line, deadline_s=deadline_s)


def _log_line(line: str) -> None:
    logger.info("ray | %s", line)


def may_pass(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Whether a failed task is worth another try: a store or cluster out of reach is, bad input is not."""
    try:
        state.result()
    except _PASSES:
        return True
    except Exception:  # noqa: BLE001 - any other error is final, whatever its class
        return False
    return False


class RunProgress:
    """Progress of a run, as lines of the log and as an artifact of the flow run."""

    def __init__(self, key: str, interval_s: float = _PROGRESS_INTERVAL_S) -> None:
        self._key, self._interval_s = key, interval_s
        self._artifact: UUID | None = None
        self._last = float("-inf")

    def stage(self, text: str) -> None:
        """Logs the stage."""
        logger.info("%s", text)

    def update(self, tally: Tally) -> None:
        """Shows the counts, if they are old enough or complete."""
        now, over = time.monotonic(), tally.total > 0 and tally.committed >= tally.total
        if now - self._last < self._interval_s and not over:
            return
        self._last = now
        logger.info("%s", describe(tally))
        percent = 100.0 * tally.committed / tally.total if tally.total else 0.0
        self.show(percent, describe(tally))

    def show(self, percent: float, description: str) -> None:
        """Puts the artifact to a percentage."""
        if self._artifact is None:
            made = create_progress_artifact(percent, key=self._key, description=description)
            self._artifact = made if isinstance(made, UUID) else None
        else:
            update_progress_artifact(self._artifact, percent, description=description)

    def close(self) -> None:
        """Does nothing."""


def stop_jobs_of(commands: Callable[[Mapping[str, Any]], Iterable[Command]]) -> Callable[..., None]:
    """A hook for the cancellation of a flow: stops the Ray jobs that the flow run follows.

    Args:
        commands: from the parameters of a flow run, what it may have submitted.
    """

    def stop_ray_jobs(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
        url = flow_run.parameters.get("ray_jobs_url")
        if url is None:
            return
        try:
            jobs = RayJobs(url)
            for command in commands(flow_run.parameters):
                attempt = jobs.last(command)
                if attempt is not None and attempt.is_running:
                    jobs.stop(attempt)
                    logger.warning("stopped Ray job %s: its flow run was cancelled", attempt.submission_id)
        except VlmflowError as error:
            logger.error("flow run %s was cancelled, its Ray jobs may go on: %s", flow_run.name, error)

    return stop_ray_jobs
