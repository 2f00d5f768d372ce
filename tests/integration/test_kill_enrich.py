"""Whole runs of the command line, killed with SIGKILL: the driver, workers, a node, the head of the cluster.

What is killed is a process as a user starts it; what it is compared with, and what goes on after it, runs here.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests import kill
from tests.integration.test_kill_catalog import Rows, let_all_die, rows_of, vectors_of
from tests.pictures import write_pictures
from tests.processes import end_family, ray_nodes, started, wait_for
from vlmflow.catalog import Catalog
from vlmflow.config import CatalogConfig, SourceConfig, load_job
from vlmflow.engine import enrich
from vlmflow.engine.report import RunReport
from vlmflow.errors import ClusterError
from vlmflow.verification import verify

DATE = dt.date(2026, 11, 1)
NUM_IMAGES = 96
OPTIONS = "commit: {max_rows: 16}\npools: [{tasks: [embed, moderate], cpus: 0.5, batch_size: 8}]\n"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_pictures(folder, NUM_IMAGES)
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, models: dict[str, dict[str, Any]], policy: str) -> Path:
    path = tmp_path_factory.mktemp("config") / "job.yaml"
    head = {"models": models, "policy": policy, "profile": "starter", "tasks": ["embed", "moderate"]}
    path.write_text(yaml.safe_dump(head) + OPTIONS, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def undisturbed(images: Path, config: Path, ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """Its scores are equal to others that are near: batches are cut differently after a kill, and on a busy machine."""
    root = tmp_path_factory.mktemp("undisturbed") / "catalog"
    run_to_its_end(images, root, config)
    rows = comparable(root)
    for row in rows.values():
        for label in row["labels"]:
            # Each is twenty times a cosine in float32; rounded, two that are near could still differ.
            near = {name: pytest.approx(value, abs=1e-5) for name, value in label.items() if isinstance(value, float)}
            label.update(near)
    return rows


def command(images: Path, root: Path, config: Path, *options: str) -> list[str]:
    """For a run that is killed, a process of its own."""
    return ["enrich", str(images), str(root), "--config", str(config), "--date", str(DATE), "--json", *options]


def run_to_its_end(images: Path, root: Path, config: Path) -> RunReport:
    """The same run in this process, which no one kills."""
    places = {"source": {"uri": str(images)}, "catalog": {"uri": str(root)}}
    report = enrich(load_job(config, {**places, "date": DATE}))
    assert report.status in ("done", "nothing_due")  # the latter if it was killed behind its last commit
    return report


def comparable(root: Path) -> Rows:
    """The rows, each of which has its vectors."""
    catalog = Catalog.open(CatalogConfig(uri=str(root)))
    rows = rows_of(catalog)
    views = {(image, view) for image, view, _ in vectors_of(catalog)}
    assert len(views) == sum(vectors_of(catalog).values()), "a vector is there twice"
    assert {image for image, _ in views} == set(rows)
    return rows


def check_sound(images: Path, root: Path) -> None:
    """No error, and after a vacuum no leftovers either."""
    let_all_die(root)
    Catalog.open(CatalogConfig(uri=str(root))).vacuum()
    assert verify(SourceConfig(uri=str(images)), CatalogConfig(uri=str(root))).findings == {}


@pytest.mark.parametrize(
    ("point", "number"),
    [
        ("in the commit, after it is written", 5),
        pytest.param("between the tables' commits", 2, marks=pytest.mark.slow),
        pytest.param("in the commit, before it is written", 1, marks=pytest.mark.slow),
        pytest.param("between commits", 1, marks=pytest.mark.slow),
        pytest.param("in compaction, before its commit", 1, marks=pytest.mark.slow),
    ],
)
def test_the_driver_is_killed_at_a_chosen_point(
    images: Path, config: Path, undisturbed: Rows, tmp_path: Path, point: str, number: int
) -> None:
    root = tmp_path / "catalog"
    assert kill.run(point, number, *command(images, root, config)).returncode == -signal.SIGKILL
    run_to_its_end(images, root, config)
    assert comparable(root) == undisturbed
    check_sound(images, root)


@pytest.mark.slow
def test_the_driver_is_killed_while_images_are_under_way(
    images: Path, config: Path, undisturbed: Rows, tmp_path: Path
) -> None:
    root, log = tmp_path / "catalog", tmp_path / "log"
    with running(log, *command(images, root, config)) as driver:
        wait_for(lambda: num_rows(root) > 0, driver)
        family = psutil.Process(driver.pid).children(recursive=True)
        driver.kill()
        driver.wait()
        # The embedded cluster ends with its driver: raylet, head and workers, which hold memory and devices.
        _, alive = psutil.wait_procs([process for process in family if is_rays(process)], timeout=60)
        assert alive == []
    before = num_rows(root)
    report = run_to_its_end(images, root, config)
    assert (report.num_added, report.num_unchanged) == (NUM_IMAGES - before, before)
    assert comparable(root) == undisturbed
    check_sound(images, root)


@pytest.mark.slow
def test_two_runs_at_once(images: Path, config: Path, undisturbed: Rows, tmp_path: Path) -> None:
    root = tmp_path / "catalog"
    logs = [tmp_path / "one.log", tmp_path / "other.log"]
    with (
        running(logs[0], *command(images, root, config)) as one,
        running(logs[1], *command(images, root, config)) as other,
    ):
        assert [driver.wait(600) for driver in (one, other)] == [0, 0]
    reports = [report_of(log) for log in logs]
    assert [report["status"] for report in reports] == ["done", "done"]
    assert sum(report["num_added"] for report in reports) == NUM_IMAGES
    assert (
        sum(report["num_by_others"] for report in reports) == sum(report["num_due"] for report in reports) - NUM_IMAGES
    )
    assert comparable(root) == undisturbed
    check_sound(images, root)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["PoolWorker", "read_and_decode"])
def test_a_worker_is_killed(images: Path, config: Path, undisturbed: Rows, tmp_path: Path, victim: str) -> None:
    root, log = tmp_path / "catalog", tmp_path / "log"
    with running(log, *command(images, root, config)) as driver:
        wait_for(lambda: kill_one(psutil.Process(driver.pid), victim), driver)
        assert driver.wait(600) == 0, log.read_text()
    assert report_of(log)["status"] == "done"
    assert comparable(root) == undisturbed


@pytest.mark.slow
def test_a_node_is_killed(images: Path, config: Path, undisturbed: Rows, tmp_path: Path) -> None:
    root, log = tmp_path / "catalog", tmp_path / "log"
    with ray_nodes(tmp_path) as ray:
        with running(log, *command(images, root, config, "--ray-address", ray.address)) as driver:
            wait_for(lambda: num_rows(root) > 0, driver)
            end_family(ray.node)
            assert driver.wait(600) == 0, log.read_text()[-3000:]
        assert ray.head.poll() is None
    assert report_of(log)["status"] == "done"
    assert comparable(root) == undisturbed


@pytest.mark.slow
def test_the_head_is_killed(images: Path, config: Path, undisturbed: Rows, tmp_path: Path) -> None:
    root, log = tmp_path / "catalog", tmp_path / "log"
    with (
        ray_nodes(tmp_path) as ray,
        running(log, *command(images, root, config, "--ray-address", ray.address)) as driver,
    ):
        wait_for(lambda: num_rows(root) > 0, driver)
        end_family(ray.head)
        assert driver.wait(600) == ClusterError.exit_code, log.read_text()[-3000:]
    (record,) = Catalog.open(CatalogConfig(uri=str(root))).runs.list()
    assert (record.state, "has not answered" in record.record["message"]) == ("finished", True)
    run_to_its_end(images, root, config)
    assert comparable(root) == undisturbed
    check_sound(images, root)


@contextmanager
def running(log: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A run under way."""
    child = [sys.executable, "-m", "vlmflow", *arguments]
    # Set by Ray for the cluster of this process; those of ray_nodes have no tokens.
    environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
    with started(child, log, environment=environment) as driver:
        yield driver


def report_of(log: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(log.read_text().splitlines()[-1])
    return report


def is_rays(process: psutil.Process) -> bool:
    try:
        line = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return "ray" in line and "Agent" not in line  # two agents look for their dead raylet for a minute


def kill_one(driver: psutil.Process, victim: str) -> bool:
    """Kills one of the driver's workers by its title; False: there is none yet."""
    for process in driver.children(recursive=True):
        try:
            title = " ".join(process.cmdline())
            if title.startswith("ray::") and victim in title:
                process.kill()
                return True
        except psutil.Error:
            continue
    return False


def num_rows(root: Path) -> int:
    config = CatalogConfig(uri=str(root))
    if not (root / "images" / "_delta_log").exists() or not Catalog.exists(config):
        return 0
    return Catalog.open(config).images(["image_id"]).num_rows
