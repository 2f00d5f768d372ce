"""Memory does not grow with the number of images: the anonymous memory of driver and workers is compared."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.pictures import picture

OBJECT_STORE_BYTES = 200 * 1024 * 1024


def peaks(command: list[str], catalog: Path) -> tuple[int, int]:
    """Runs a command; the most anonymous memory that it and its children had together, in bytes.

    The first of the two is that until the first commit, the second that of the whole run.

    Left out are the object store, which is of fixed size and fills up with time, and mapped files: how much of a
    library is a process's own depends on who else has it open.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = catalog / "images" / "_delta_log"
    stop, early, peak, num_early = threading.Event(), 0, 0, 0

    def num_versions() -> int:
        return len(list(log.glob("*.json")))

    def watch() -> None:
        nonlocal early, peak, num_early
        parent = psutil.Process(process.pid)
        while not stop.wait(0.5):
            peak = max(peak, sum(map(_anonymous, [parent, *_children(parent)])))
            if num_early <= 1:  # the first makes the table
                early, num_early = peak, num_versions()

    thread = threading.Thread(target=watch)
    thread.start()
    out, errors = process.communicate(timeout=1500)
    stop.set()
    thread.join()
    assert process.returncode == 0, errors
    assert json.loads(out.splitlines()[-1])["status"] == "done"
    assert num_early < num_versions(), "nothing was left to commit when the first commit was seen"
    return early, peak


def _children(parent: psutil.Process) -> list[psutil.Process]:
    try:
        return [child for child in parent.children(recursive=True) if "raylet" not in child.name()]
    except psutil.NoSuchProcess:
        return []


def _anonymous(process: psutil.Process) -> int:
    try:
        rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii")
    except OSError:
        return 0  # ended meanwhile
    return sum(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss_Anon"))


def embed_command(folder: Path, models: dict[str, dict[str, Any]], num_images: int, max_rows: int) -> list[str]:
    images = folder / "images"
    images.mkdir()
    for index in range(num_images):
        picture(index, 48, 48).save(images / f"{index:06d}.png", "PNG")
    config = folder / "job.yaml"
    job = {
        "models": models,
        "ray": {"num_cpus": 2, "object_store_bytes": OBJECT_STORE_BYTES},
        "tasks": ["embed"],
        # One actor: of two, the second may come too late for few images, and is no growth.
        "pools": [{"tasks": ["embed"], "cpus": 0.5}],
        "commit": {"max_rows": max_rows},
        "max_error_fraction": 1.0,  # else the first commit would wait for a thousand rows
    }
    config.write_text(yaml.safe_dump(job))
    arguments = [images, folder / "catalog", "--profile", "starter", "--config", config, "--json"]
    return [sys.executable, "-m", "vlmflow", "enrich", *(str(argument) for argument in arguments)]


def compare(folder: Path, models: dict[str, dict[str, Any]], few: int, many: int) -> float:
    """What a run of many images needs at most, to what it has needed when the first few are committed."""
    early, peak = peaks(embed_command(folder, models, many, few), folder / "catalog")
    print(f"peak anonymous memory: {early / 2**20:.0f} MiB at {few}, {peak / 2**20:.0f} MiB at {many}")
    return peak / early


@pytest.mark.timeout(240)
def test_memory_is_flat(tmp_path: Path, models: dict[str, dict[str, Any]]) -> None:
    assert compare(tmp_path, models, 400, 2_000) <= 1.15


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_is_flat_over_fifty_thousand_images(tmp_path: Path, models: dict[str, dict[str, Any]]) -> None:
    assert compare(tmp_path, models, 5_000, 50_000) <= 1.15
