"""The ad-hoc flow on a real Ray cluster of two nodes: whatever happens to the flow, there is one Ray job."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from ray.job_submission import JobSubmissionClient

from tests.flows import HeldImages, Prefect, held_images, held_job, process, write_job
from tests.pictures import write_pictures
from tests.processes import RayNodes, end_family, ray_nodes, wait_for
from vlmflow.catalog import Catalog
from vlmflow.config import CatalogConfig, Job

NUM_IMAGES = 6


@pytest.fixture
def held() -> Iterator[HeldImages]:
    with held_images() as server:
        yield server


@pytest.fixture
def job_file(make_job: Callable[..., Job], held: HeldImages, tmp_path: Path) -> Path:
    return held_job(held, make_job, tmp_path, NUM_IMAGES)


class Jobs:
    """The Ray jobs since the beginning of a test."""

    def __init__(self, url: str) -> None:
        self._client = JobSubmissionClient(url)
        self._before: set[str | None] = set()
        self._before = set(self.statuses())

    def statuses(self) -> dict[str | None, str]:
        found = {job.submission_id: str(job.status.value) for job in self._client.list_jobs()}
        return {name: status for name, status in found.items() if name not in self._before}


@pytest.fixture
def jobs(nodes: RayNodes) -> Jobs:
    return Jobs(nodes.jobs_url)


def flow(job_file: Path, nodes: RayNodes) -> list[str]:
    return ["pipelines.adhoc", "--job-file", str(job_file), "--ray-jobs-url", nodes.jobs_url]


def catalog(folder: Path) -> Catalog:
    return Catalog.open(CatalogConfig(uri=str(folder / "catalog")))


def num_rows(folder: Path) -> int:
    """Rows, of which none is there twice."""
    found = catalog(folder).images(["image_id"])["image_id"]
    assert len(found.unique()) == len(found)
    return len(found)


@pytest.mark.slow
def test_killed_and_started_again_and_asked_twice_it_is_one_job(
    prefect: Prefect, nodes: RayNodes, jobs: Jobs, held: HeldImages, job_file: Path, tmp_path: Path
) -> None:
    logs = [tmp_path / f"flow {number}.log" for number in range(3)]
    with process(prefect, logs[0], *flow(job_file, nodes)) as killed:
        wait_for(held.asked.is_set, killed)
        killed.kill()
        killed.wait()
    with ExitStack() as stack:
        two = [stack.enter_context(process(prefect, log, *flow(job_file, nodes))) for log in logs[1:]]
        for started, log in zip(two, logs[1:], strict=True):
            wait_for(lambda log=log: b"which is there already" in log.read_bytes(), started)  # type: ignore[misc]
        assert list(jobs.statuses().values()) == ["RUNNING"]
        held.released.set()
        assert [started.wait(200) for started in two] == [0, 0], logs[1].read_text()
    assert list(jobs.statuses().values()) == ["SUCCEEDED"]
    assert num_rows(tmp_path) == NUM_IMAGES
    for log in logs[1:]:
        assert f"{NUM_IMAGES} rows new, 0 replaced" in log.read_text()
    # Two said the same of one run, and what the job logged is in the log of either.
    runs = [run for run in prefect.runs("adhoc-job") if run["state_type"] == "COMPLETED"][:2]
    assert len({run["state"]["message"] for run in runs}) == 1
    assert set(runs[0]["tags"]) == {"vlmflow", "adhoc"}
    assert "which is there already" in prefect.log(runs[0]["id"])
    assert prefect.artifacts()["enrich"]["data"] == 100.0


@pytest.mark.slow
def test_two_that_begin_at_once_end_up_with_one_job(
    prefect: Prefect, nodes: RayNodes, jobs: Jobs, held: HeldImages, job_file: Path, tmp_path: Path
) -> None:
    logs = [tmp_path / f"flow {number}.log" for number in range(2)]
    with ExitStack() as stack:
        two = [stack.enter_context(process(prefect, log, *flow(job_file, nodes))) for log in logs]
        wait_for(held.asked.is_set)
        for started, log in zip(two, logs, strict=True):
            wait_for(lambda log=log: b"Ray job vlmflow-enrich" in log.read_bytes(), started)  # type: ignore[misc]
        held.released.set()
        assert [started.wait(200) for started in two] == [0, 0]
    assert list(jobs.statuses().values()) == ["SUCCEEDED"]
    assert num_rows(tmp_path) == NUM_IMAGES


@pytest.mark.slow
def test_a_completed_run_that_is_retried_does_its_job_anew(
    prefect: Prefect, nodes: RayNodes, jobs: Jobs, held: HeldImages, job_file: Path, tmp_path: Path
) -> None:
    held.released.set()
    with process(prefect, tmp_path / "flow.log", *flow(job_file, nodes)) as started:
        assert started.wait(200) == 0, (tmp_path / "flow.log").read_text()
    run_id = prefect.runs("adhoc-job")[0]["id"]
    assert prefect.run(run_id)["state"]["message"].startswith(f"{NUM_IMAGES} rows new")
    retried = prefect.command("flow-run", "retry", run_id, "--entrypoint", "pipelines/adhoc.py:adhoc_job")
    assert retried.returncode == 0, retried.stdout + retried.stderr
    assert prefect.run(run_id)["state"]["message"].startswith("Nothing was due")
    assert list(jobs.statuses().values()) == ["SUCCEEDED"] * 2


@pytest.mark.slow
def test_past_its_deadline_the_job_is_stopped(
    prefect: Prefect, nodes: RayNodes, jobs: Jobs, held: HeldImages, job_file: Path, tmp_path: Path
) -> None:
    log = tmp_path / "flow.log"
    with process(prefect, log, *flow(job_file, nodes), "--deadline-hours", "0.001") as started:
        assert started.wait(200) == 3, log.read_text()
    assert "ran for more than 0.06 minutes and was stopped" in log.read_text().splitlines()[-1]
    assert list(jobs.statuses().values()) == ["STOPPED"]


@pytest.mark.slow
def test_a_node_is_killed_and_the_run_completes(prefect: Prefect, make_job: Callable[..., Job], tmp_path: Path) -> None:
    write_pictures(tmp_path / "images", 96)
    pools = [{"tasks": ("embed", "moderate"), "cpus": 0.5, "batch_size": 8}]
    job = make_job(tmp_path / "images", tasks=("embed", "moderate"), pools=pools, commit={"max_rows": 16})
    log = tmp_path / "flow.log"
    with ray_nodes(tmp_path, dashboard=True) as nodes:
        with process(prefect, log, *flow(write_job(job, tmp_path / "job.yaml"), nodes)) as started:
            wait_for(lambda: Catalog.exists(job.catalog) and num_rows(tmp_path) > 0, started)
            before = num_rows(tmp_path)
            end_family(nodes.node)
            assert started.wait(280) == 0, log.read_text()
        assert nodes.head.poll() is None
    assert before < 96
    assert num_rows(tmp_path) == 96
    assert "96 rows new, 0 replaced" in log.read_text()
