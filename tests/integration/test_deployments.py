"""deploy/prefect.yaml by Prefect's own tools: deployed, triggered, run by a worker, cancelled."""

from __future__ import annotations

import datetime as dt
import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.job_submission import JobSubmissionClient

from tests.flows import Prefect, held_images, held_job, worker, write_job
from tests.pictures import write_pictures
from tests.processes import ROOT, RayNodes, free_port, prefect_server, wait_for
from vlmflow.catalog import Catalog
from vlmflow.config import Job

NIGHT = dt.date(2026, 11, 1)


@pytest.fixture(scope="module")
def at_work(prefect: Prefect, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A worker over all deployments; gives its log."""
    log = tmp_path_factory.mktemp("worker") / "worker.log"
    with worker(prefect, log):
        yield log


def trigger(prefect: Prefect, deployment: str, **parameters: Any) -> str:
    """Asks for a run as an operator does; gives its id."""
    given = [f"--param={name}={json.dumps(value)}" for name, value in parameters.items()]
    asked = prefect.command("deployment", "run", deployment, *given)
    assert asked.returncode == 0, asked.stdout + asked.stderr
    found = re.search(r"UUID: ([0-9a-f-]{36})", asked.stdout)
    assert found, asked.stdout
    return found[1]


def state(prefect: Prefect, run_id: str) -> str:
    return str(prefect.run(run_id)["state_name"])


def kept_results(prefect: Prefect) -> set[str]:
    """Files with results that Prefect keeps; the errors of flows that failed are among them."""
    return {path.name for path in (prefect.home / "storage").glob("*")}


@pytest.mark.slow
def test_the_worker_starts_what_is_asked_for_and_the_run_says_what_is_wrong(
    prefect: Prefect, at_work: Path, tmp_path: Path
) -> None:
    run_id = trigger(prefect, "nightly-enrichment/nightly", job_file=str(tmp_path / "none.yaml"), date=str(NIGHT))
    wait_for(lambda: prefect.run(run_id)["end_time"] is not None)
    run = prefect.run(run_id)
    assert (run["state_name"], run["name"]) == ("Failed", "nightly 2026-11-01"), at_work.read_text()
    assert "none.yaml" in run["state"]["message"]


@pytest.mark.slow
def test_a_deployed_night_runs_to_completion(
    prefect: Prefect, at_work: Path, make_job: Callable[..., Job], tmp_path: Path
) -> None:
    write_pictures(tmp_path / "images", 4)
    ray = {"num_cpus": 2, "object_store_bytes": 200 * 1024 * 1024}
    job = make_job(tmp_path / "images", tasks=("embed", "moderate"), ray=ray)
    job_file = write_job(job, tmp_path / "job.yaml")
    before = kept_results(prefect)

    run_id = trigger(prefect, "nightly-enrichment/nightly", job_file=str(job_file), date=str(NIGHT))
    wait_for(lambda: prefect.run(run_id)["end_time"] is not None)

    run = prefect.run(run_id)
    assert run["state_name"] == "Completed", at_work.read_text()
    assert run["state"]["message"].startswith("2026-11-01: 4 rows new, 0 replaced")
    assert run["name"] == "nightly 2026-11-01"
    assert set(run["tags"]) == {"vlmflow", "nightly"}
    assert Catalog.open(job.catalog).images(["uri"]).num_rows == 4
    shown = {artifact["key"].partition("-")[0] for artifact in prefect.artifacts_of(run_id)}
    assert shown >= {"doctor", "plan", "enrich", "counts", "verify", "report"}
    assert "4 of 4 images are due" in prefect.log(run_id)
    # Small values only: neither a flow's nor a task's result is kept anywhere.
    assert kept_results(prefect) == before


@pytest.mark.slow
def test_cancelling_a_flow_run_stops_its_ray_job(
    prefect: Prefect, at_work: Path, nodes: RayNodes, make_job: Callable[..., Job], tmp_path: Path
) -> None:
    client = JobSubmissionClient(nodes.jobs_url)
    before = {job.submission_id for job in client.list_jobs()}

    def jobs() -> list[str]:
        return [str(job.status.value) for job in client.list_jobs() if job.submission_id not in before]

    with held_images() as held:
        job_file = held_job(held, make_job, tmp_path, 4)
        run_id = trigger(prefect, "adhoc-job/adhoc", job_file=str(job_file), ray_jobs_url=nodes.jobs_url)
        wait_for(held.asked.is_set)
        assert jobs() == ["RUNNING"]
        cancelled = prefect.command("flow-run", "cancel", run_id)
        assert cancelled.returncode == 0, cancelled.stdout + cancelled.stderr
        wait_for(lambda: state(prefect, run_id) == "Cancelled")
        assert jobs() == ["STOPPED"], at_work.read_text()
    assert "was stopped, as its flow run was" in prefect.log(run_id)


def test_what_is_deployed_is_what_the_file_says(prefect: Prefect, at_work: Path) -> None:
    written = yaml.safe_load((ROOT / "deploy" / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]
    found = {deployment["name"]: deployment for deployment in prefect.deployments()}
    assert found.keys() == {deployment["name"] for deployment in written} == {"nightly", "backfill", "adhoc"}
    (schedule,) = found["nightly"]["schedules"]
    assert (schedule["active"], schedule["schedule"]["cron"]) == (True, "0 2 * * *")
    assert found["backfill"]["schedules"] == found["adhoc"]["schedules"] == []
    assert prefect.waiting() == [], "a night would begin beside the tests"
    for deployment in found.values():
        assert deployment["work_pool_name"] == "vlmflow"
        assert deployment["global_concurrency_limit"] is None
        assert deployment["enforce_parameter_schema"]
        described = deployment["parameter_openapi_schema"]["properties"]
        assert all(about.get("description") for about in described.values()), described
        assert deployment["parameters"].keys() <= described.keys()


@pytest.mark.slow
def test_a_paused_schedule_stays_so_when_the_file_is_deployed_again(prefect: Prefect, at_work: Path) -> None:
    def the_schedule() -> dict[str, Any]:
        (found,) = (schedule for deployment in prefect.deployments() for schedule in deployment["schedules"])
        return dict(found)

    before = the_schedule()
    paused = prefect.command("deployment", "schedule", "pause", "nightly-enrichment/nightly", before["id"])
    assert paused.returncode == 0, paused.stdout + paused.stderr
    again = prefect.command("deploy", "--prefect-file", "deploy/prefect.yaml", "--name", "nightly")
    assert again.returncode == 0, again.stdout + again.stderr
    assert (the_schedule()["id"], the_schedule()["active"]) == (before["id"], False)
    resumed = prefect.command("deployment", "schedule", "resume", "nightly-enrichment/nightly", before["id"])
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr


@pytest.mark.slow
def test_a_server_that_is_started_again_ends_no_night_and_keeps_none_away(
    make_job: Callable[..., Job], tmp_path: Path
) -> None:
    home, port = tmp_path / "prefect", free_port()
    home.mkdir()
    with held_images() as held, ExitStack() as stack:
        job_file = held_job(held, make_job, tmp_path, 4)
        server = stack.enter_context(ExitStack())
        prefect = Prefect(server.enter_context(prefect_server(home, port)), home)
        stack.enter_context(worker(prefect, tmp_path / "worker.log"))

        first = trigger(prefect, "nightly-enrichment/nightly", job_file=str(job_file), date=str(NIGHT))
        wait_for(held.asked.is_set)
        server.close()
        server.enter_context(prefect_server(home, port))
        # A lease would end the flow run some minutes later, when it cannot be renewed.
        assert prefect.run(first)["state"]["state_details"]["deployment_concurrency_lease_id"] is None
        held.released.set()
        wait_for(lambda: prefect.run(first)["end_time"] is not None)
        assert prefect.run(first)["state"]["message"].startswith("2026-11-01: 4 rows new"), prefect.log(first)

        second = trigger(prefect, "nightly-enrichment/nightly", job_file=str(job_file), date=str(NIGHT))
        wait_for(lambda: prefect.run(second)["end_time"] is not None)
        assert prefect.run(second)["state"]["message"].startswith("Nothing was due"), prefect.log(second)
