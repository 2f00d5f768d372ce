"""Runs that share a Ray cluster: of a process, and in processes and folders of their own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest
import ray
import yaml

from tests.autoscaling import autoscaling_ray
from tests.flows import held_images
from tests.pictures import write_pictures
from tests.processes import ROOT, RayNodes, end_family, ray_nodes, started, wait_for
from vlmflow.catalog import Catalog
from vlmflow.config import CatalogConfig, Job, PoolConfig, RayConfig
from vlmflow.engine import enrich
from vlmflow.engine.cluster import ray_cluster
from vlmflow.engine.progress import SilentProgress
from vlmflow.engine.room import Room

# Two actors each: of four cores, two runs leave none for decoding.
POOLS = [{"tasks": [task], "cpus": 1, "batch_size": 4} for task in ("embed", "caption")]


@pytest.fixture(scope="module")
def four_cores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    with ray_nodes(tmp_path_factory.mktemp("ray"), cpus=2) as started:
        yield started


@contextmanager
def run(folder: Path, source: str, address: str, job: dict[str, Any]) -> Iterator[tuple[Popen[bytes], Path]]:
    """A run that names its files from the folder that it works in, and what it says."""
    folder.mkdir(exist_ok=True)
    models = {role: {**model, "path": os.path.relpath(model["path"], folder)} for role, model in job["models"].items()}
    (folder / "job.yaml").write_text(yaml.safe_dump({**job, "models": models}))
    command = [sys.executable, "-m", "vlmflow", "enrich", source, "catalog", "--config", "job.yaml"]
    command += ["--ray-address", address]
    log = folder / "run.log"
    # What a driver has set, its workers have: where they look for modules, but not the folder that it works in.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    with started(command, log, environment=environment, folder=folder) as process:
        yield process, log


def job_of(models: dict[str, dict[str, Any]], pools: list[dict[str, Any]]) -> dict[str, Any]:
    http = {"allow_private_addresses": True, "timeout_s": 250}
    tasks = [task for pool in pools for task in pool["tasks"]]
    return {"profile": "starter", "models": models, "tasks": tasks, "pools": pools, "source": {"http": http}}


def num_rows(folder: Path) -> int:
    return Catalog.open(CatalogConfig(uri=str(folder / "catalog"))).images(["status"])["status"].to_pylist().count("ok")


class Stages(SilentProgress):
    """What a run shows."""

    def __init__(self) -> None:
        self.shown: list[str] = []

    def stage(self, text: str) -> None:
        self.shown.append(text)


@pytest.mark.parametrize("work", [pytest.param("of its own", marks=pytest.mark.slow), "of the other"])
def test_of_two_runs_of_a_process_the_later_waits(
    ray_session: None, make_job_in: Callable[..., Job], tmp_path: Path, work: str
) -> None:
    """And does not do again what the other has done meanwhile."""
    pools = [{"tasks": [task], "cpus": 0.5, "batch_size": 4} for task in ("embed", "caption")]
    http = {"allow_private_addresses": True, "timeout_s": 250}
    write_pictures(tmp_path / "images", 4)
    first, second = tmp_path / "first", tmp_path / "second"
    with held_images() as held, ThreadPoolExecutor(2) as threads:
        sources = [held.manifest(tmp_path / "images.csv", 4), tmp_path / "images"]
        if work == "of the other":
            sources[1], second = sources[0], first
        jobs = [
            make_job_in(folder, source, tasks=("embed", "caption"), pools=pools, source_options={"http": http})
            for folder, source in zip((first, second), sources, strict=True)
        ]
        shows = Stages()
        holder = threads.submit(enrich, jobs[0])
        wait_for(held.asked.is_set)
        waiting = threads.submit(enrich, jobs[1], progress=shows)
        wait_for(lambda: "waiting for room" in shows.shown[-1] if shows.shown else False)
        assert f"of {first / 'catalog'} has" in shows.shown[-1]
        held.released.set()
        assert holder.result().waited_s == 0 < waiting.result().waited_s
    assert waiting.result().status == ("nothing_due" if first == second else "done")
    assert waiting.result().num_by_others == 0
    assert num_rows(first) == num_rows(second) == 4


@pytest.mark.slow
@pytest.mark.parametrize("end", ["it ends", "it is killed"])
def test_a_run_that_would_leave_another_no_core_waits_for_its_end(
    four_cores: RayNodes, models: dict[str, dict[str, Any]], tmp_path: Path, end: str
) -> None:
    job = job_of(models, POOLS)
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    write_pictures(second / "images", 6)
    with held_images() as held:
        held.manifest(first / "images.csv", 6)
        with run(first, "images.csv", four_cores.address, job) as (holder, said):
            wait_for(held.asked.is_set, holder)
            with run(second, "images", four_cores.address, job) as (waiting, log):
                wait_for(lambda: "waiting for room" in log.read_text(), waiting)
                assert f"of {first / 'catalog'} has" in log.read_text()
                if end == "it is killed":
                    end_family(holder)
                else:
                    held.released.set()
                    assert holder.wait(200) == 0, said.read_text()
                    assert num_rows(first) == 6
                assert waiting.wait(200) == 0, log.read_text()
                assert num_rows(second) == 6
                assert "of waiting for other runs" in log.read_text()


@ray.remote(num_cpus=1.5)
class Actor:
    """What a pool begins with."""

    def is_there(self) -> bool:
        return True


@pytest.mark.slow
def test_who_waits_has_a_cluster_grow_of_which_nobody_says_that_it_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    pools, shown = [PoolConfig(tasks=("embed",), cpus=1.5)], list[str]()
    groups = {"cpu": {"resources": {"CPU": 2}, "min_workers": 1, "max_workers": 2}}
    with autoscaling_ray(tmp_path, groups) as address, ray_cluster(RayConfig(address=address)) as cluster:
        assert not cluster.groups
        first, second = (Room(name, f"catalog of {name}", shown.append) for name in ("first", "second"))
        with first.taken(pools, cluster):
            actors = [Actor.remote()]
            assert ray.get(actors[0].is_there.remote())
            with second.taken(pools, cluster):
                assert shown == ["waiting for room on the cluster, which run first of catalog of first has"]
                actors.append(Actor.remote())
                assert ray.get(actors[1].is_there.remote())
    assert first.waited_s == 0 < second.waited_s
