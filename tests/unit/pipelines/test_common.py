"""What a flow run that is ended by force stops on a Ray cluster, and what logs of flow runs hold."""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prefect import Flow
from prefect.client.schemas.objects import FlowRun
from prefect.states import AwaitingRetry, Cancelling, Failed, Pending, Running, State

from pipelines import common
from pipelines.adhoc import adhoc_job
from pipelines.nightly import nightly_enrichment
from pipelines.ray_jobs import Attempt
from pipelines.steps import enrich_command
from vlmflow.config import load_job
from vlmflow.errors import StorageAccessError

Told = list[tuple[str, Collection[str]]]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    """Who told a cluster to stop what it submitted, and jobs of which names."""
    found: Told = []

    class Jobs:
        def __init__(self, url: str) -> None: ...

        def stop_all(self, owner: str, names: Collection[str]) -> list[Attempt]:
            found.append((owner, names))
            return []

    monkeypatch.setattr(common, "RayJobs", Jobs)
    return found


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text("{source: {uri: s3://b/p/}, catalog: {uri: s3://b/c}, profile: starter}", encoding="utf-8")
    return path


@pytest.fixture
def cancel(job_file: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., FlowRun]:
    """Runs the hooks of a flow run that is cancelled after it has had some states."""

    def cancelled(
        flow: Flow[..., Any], date: str, run_count: int, states: Sequence[State[Any]] = (Pending(), Running())
    ) -> FlowRun:
        monkeypatch.setattr(common, "_states", lambda _: [*states, Cancelling()])
        given = {"job_file": str(job_file), "ray_jobs_url": "http://ray-head:8265", "date": date}
        run = FlowRun(flow_id=uuid4(), name="a-run", parameters=given, run_count=run_count)
        for hook in flow.on_cancellation_hooks:
            hook(flow, run, Cancelling())
        return run

    return cancelled


@pytest.mark.parametrize("flow", [nightly_enrichment, adhoc_job])
@pytest.mark.parametrize("date", ["2026-02-01", "2026-02-01T00:00:00Z"])
def test_a_cancelled_run_stops_its_jobs_however_its_date_was_written(
    flow: Flow[..., Any], date: str, job_file: Path, cancel: Callable[..., FlowRun], told: Told
) -> None:
    run = cancel(flow, date, run_count=1)
    ((owner, names),) = told
    assert owner == str(run.id)
    assert enrich_command(load_job(job_file, {"date": dt.date(2026, 2, 1)})).name in names


@pytest.mark.parametrize("flow", [nightly_enrichment, adhoc_job])
def test_a_run_that_is_cancelled_before_it_began_leaves_jobs_of_others_alone(
    flow: Flow[..., Any], cancel: Callable[..., FlowRun], told: Told
) -> None:
    cancel(flow, "2026-02-01", run_count=0)
    assert told == []


@pytest.mark.parametrize("flow", [nightly_enrichment, adhoc_job])
def test_a_retried_run_that_is_cancelled_before_it_begins_again_stops_what_it_submitted_alone(
    flow: Flow[..., Any], cancel: Callable[..., FlowRun], told: Told
) -> None:
    states = (Pending(), Running(), Failed(), AwaitingRetry(), Pending(name="Submitting"))
    run = cancel(flow, "2026-02-01", run_count=1, states=states)
    assert told == [(str(run.id), set())]
    told.clear()
    cancel(flow, "2026-02-01", run_count=2, states=(*states, Running()))
    ((_, names),) = told
    assert names


@pytest.mark.parametrize("name", ["prefect.flow_runs", "prefect.task_runs"])
def test_logs_hold_our_errors_without_their_causes_and_all_of_others(
    name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger(name)
    monkeypatch.setattr(logger, "handlers", [caplog.handler])  # not Prefect's own, which want a run
    monkeypatch.setattr(logger, "propagate", False)

    def fail(error: Exception) -> str:
        caplog.clear()
        try:
            raise error from OSError("x-amz-security-token:hunter2")
        except type(error) as caught:
            logger.exception("failed: %r", caught)
        return caplog.text

    said = fail(StorageAccessError("s3://shop refused the credentials"))
    assert "s3://shop refused the credentials" in said
    assert "hunter2" not in said
    assert "Traceback" not in said
    assert "Traceback" in fail(ZeroDivisionError("a defect"))
