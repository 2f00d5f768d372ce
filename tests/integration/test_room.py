"""Runs in processes of their own that share a Ray cluster of four cores, and work in folders of their own."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest
import yaml

from tests.flows import held_images
from tests.pictures import write_pictures
from tests.processes import ROOT, RayNodes, end_family, started, wait_for
from vlmflow.catalog import Catalog
from vlmflow.config import CatalogConfig

# Two actors each: of four cores, two runs leave none for decoding.
POOLS = [{"tasks": [task], "cpus": 1, "batch_size": 4} for task in ("embed", "caption")]


@contextmanager
def run(folder: Path, source: str, nodes: RayNodes, job: dict[str, Any]) -> Iterator[tuple[Popen[bytes], Path]]:
    """A run that names its files from the folder that it works in, and what it says."""
    folder.mkdir(exist_ok=True)
    models = {role: {**model, "path": os.path.relpath(model["path"], folder)} for role, model in job["models"].items()}
    (folder / "job.yaml").write_text(yaml.safe_dump({**job, "models": models}))
    command = [sys.executable, "-m", "vlmflow", "enrich", source, "catalog", "--config", "job.yaml"]
    command += ["--ray-address", nodes.address]
    log = folder / "run.log"
    # What a driver has set, its workers have: where they look for modules, but not the folder that it works in.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    with started(command, log, environment=environment, folder=folder) as process:
        yield process, log


def num_rows(folder: Path) -> int:
    return len(Catalog.open(CatalogConfig(uri=str(folder / "catalog"))).images(["image_id", "caption"]).drop_null())


@pytest.mark.parametrize("end", [pytest.param("it ends", marks=pytest.mark.slow), "it is killed"])
def test_a_run_that_would_leave_another_no_core_waits_for_its_end(
    nodes: RayNodes, models: dict[str, dict[str, Any]], tmp_path: Path, end: str
) -> None:
    job = {"profile": "starter", "models": models, "tasks": ["embed", "caption"], "pools": POOLS}
    job["source"] = {"http": {"allow_private_addresses": True, "timeout_s": 250}}
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    (second / "images").mkdir(parents=True)
    write_pictures(second / "images", 6)
    with held_images() as held:
        held.manifest(first / "images.csv", 6)
        with run(first, "images.csv", nodes, job) as (holder, said):
            wait_for(held.asked.is_set, holder)
            with run(second, "images", nodes, job) as (waiting, log):
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
