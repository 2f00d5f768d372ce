"""Ad-hoc job: an enrichment submitted to a Ray cluster through its Jobs API, and followed to its end.

The Ray job's id follows from the job itself. Whoever asks for the same job while it runs, be it this flow after it was
killed, follows the one that runs: there is never a second copy.
"""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from prefect import flow, runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed
from pydantic import Field

from pipelines import alerts, artifacts
from pipelines.common import (
    RETRIES,
    RETRY_DELAYS_S,
    RunProgress,
    also_left,
    has_completed,
    log_to_flow_run,
    make_steps,
    may_pass,
    nothing_due,
    read_job,
    rows_changed,
    slug,
    stop_jobs_of,
)
from pipelines.ray_jobs import without_user
from pipelines.steps import Steps, enrich_command
from vlmflow.config import Job, TaskName
from vlmflow.engine import RunReport

logger = logging.getLogger("vlmflow")

_OVERRIDES = ("tasks", "profile", "policy", "limit", "date")


def _run_name() -> str:
    given = runtime.flow_run.parameters
    return f"{Path(str(given['job_file'])).stem} on {without_user(str(given['ray_jobs_url']))}"


def _read_job(given: Mapping[str, Any]) -> Job:
    over: dict[str, Any] = {name: given.get(name) for name in _OVERRIDES}
    over |= {"source": {"uri": given.get("source")}, "catalog": {"uri": given.get("catalog")}}
    return read_job(Path(given["job_file"]), over)


@flow(
    name="adhoc-job",
    flow_run_name=_run_name,
    persist_result=False,
    on_running=[alerts.check_messenger],
    on_failure=[alerts.tell_failure],
    on_crashed=[alerts.tell_failure],
    on_cancellation=[stop_jobs_of(lambda flow_run: [enrich_command(_read_job(flow_run.parameters))])],
)
def adhoc_job(
    job_file: Path,
    ray_jobs_url: str,
    source: str | None = None,
    catalog: str | None = None,
    tasks: list[TaskName] | None = None,
    profile: str | None = None,
    policy: str | None = None,
    limit: Annotated[int, Field(ge=1)] | None = None,
    date: dt.date | None = None,
    deadline_hours: Annotated[float, Field(gt=0)] = 12.0,
    notify: str | None = None,
) -> State[Any]:
    """Runs an enrichment on a Ray cluster and follows it. Cancelling the flow run stops the Ray job.

    Args:
        job_file: The job (YAML): source, catalog, profile, policy. What is given below wins over it.
        ray_jobs_url: Dashboard of the Ray cluster, such as http://ray-head:8265.
        source: Where the images are: a prefix or a manifest that the cluster reaches.
        catalog: The catalog to write.
        tasks: Tasks to run. Default: those of the job.
        profile: A named set of models.
        policy: Moderation policy: a YAML file where the flow runs, or the name of one that ships.
        limit: At most this many images, for a trial.
        date: Logical date of new rows. Default: the day on which the job runs, UTC.
        deadline_hours: After so long the Ray job is stopped; what it committed stays.
        notify: A notification block, as type/name, such as slack-webhook/moderation, for failures.
    """
    given = {
        "job_file": job_file,
        "source": source,
        "catalog": catalog,
        "tasks": tasks,
        "profile": profile,
        "policy": policy,
        "limit": limit,
        "date": date,
    }
    log_to_flow_run()
    job = _read_job(given)
    alerts.send_kept(notify, job.catalog)
    steps = make_steps(ray_jobs_url, deadline_hours, once=not has_completed())
    report = follow_job(steps, job, slug(job.catalog.uri))
    if report.status == "nothing_due":
        return Completed(message=f"Nothing was due: {nothing_due(report)}.")
    return Completed(message=f"{rows_changed([report])}; run {report.run_id}{also_left(report)}.")


@task(
    name="follow job",
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=RETRIES,
    retry_delay_seconds=list(RETRY_DELAYS_S),
    retry_condition_fn=may_pass,
)
def follow_job(steps: Steps, job: Job, name: str) -> RunReport:
    """Submits the job, or finds it running, and waits for its end."""
    progress = RunProgress(f"enrich-{name}")
    report = steps.enrich(job, progress)
    progress.done(report)
    artifacts.show_counts(f"counts-{name}", report)
    return report


if __name__ == "__main__":
    from pipelines.command_line import main

    main(adhoc_job)
