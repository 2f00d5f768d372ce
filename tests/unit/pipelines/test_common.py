"""What a flow run that is ended by force stops on a Ray cluster."""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prefect import Flow
from prefect.client.schemas.objects import FlowRun
from prefect.states import Cancelled

from pipelines import common
from pipelines.adhoc import adhoc_job
from pipelines.nightly import nightly_enrichment
from pipelines.ray_jobs import Attempt
from pipelines.steps import enrich_command
from vlmflow.config import load_job


@pytest.mark.parametrize("flow", [nightly_enrichment, adhoc_job])
@pytest.mark.parametrize("date", ["2026-02-01", "2026-02-01T00:00:00Z"])
def test_a_cancelled_run_stops_its_jobs_however_its_date_was_written(
    flow: Flow[..., Any], date: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_file = tmp_path / "job.yaml"
    job_file.write_text("{source: {uri: s3://b/p/}, catalog: {uri: s3://b/c}, profile: starter}", encoding="utf-8")
    told = []

    class Jobs:
        def __init__(self, url: str) -> None: ...

        def stop_all(self, owner: str, names: Collection[str]) -> list[Attempt]:
            told.append((owner, names))
            return []

    monkeypatch.setattr(common, "RayJobs", Jobs)
    given = {"job_file": str(job_file), "ray_jobs_url": "http://ray-head:8265", "date": date}
    run = FlowRun(flow_id=uuid4(), name="a-run", parameters=given)
    for hook in flow.on_cancellation_hooks:
        hook(flow, run, Cancelled())

    ((owner, names),) = told
    assert owner == str(run.id)
    assert enrich_command(load_job(job_file, {"date": dt.date(2026, 2, 1)})).name in names
