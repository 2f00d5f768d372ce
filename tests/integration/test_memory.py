"""Memory does not grow with the number of images: the anonymous memory of driver and workers is compared."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.flows import HeldImages, held_images
from tests.processes import started

OBJECT_STORE_BYTES = 200 * 1024 * 1024


def peaks(command: list[str], catalog: Path, held: HeldImages) -> tuple[int, int]:
    """Runs a command; the most anonymous memory that it and its children had together, in bytes.

    The first of the two is that until the first commit, after which the images that were held are released; the
    second that of the whole run.

    Left out are the object store, which is of fixed size and fills up with time, and mapped files: how much of a
    library is a process's own depends on who else has it open.
    """
    commits, out, errors = catalog / "images" / "_delta_log", catalog.parent / "out", catalog.parent / "errors"
    early, peak = 0, 0
    with started(command, out, errors) as process:
        parent = psutil.Process(process.pid)
        while process.poll() is None:
            committed = len(list(commits.glob("*.json"))) > 1  # the first makes the table
            peak = max(peak, sum(map(_anonymous, [parent, *_children(parent)])))
            if committed and not held.released.is_set():
                early = peak
                held.released.set()
            time.sleep(0.5)
    assert process.returncode == 0, errors.read_text()
    assert json.loads(out.read_text().splitlines()[-1])["status"] == "done"
    assert early, "the images that were held were waited for before the first commit"
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


def embed_command(folder: Path, models: dict[str, dict[str, Any]], manifest: Path, max_rows: int) -> list[str]:
    config = folder / "job.yaml"
    job = {
        "models": models,
        "ray": {"num_cpus": 2, "object_store_bytes": OBJECT_STORE_BYTES},
        "source": {"uri": str(manifest), "http": {"allow_private_addresses": True, "timeout_s": 250}},
        "catalog": {"uri": str(folder / "catalog")},
        "tasks": ["embed"],
        # One actor: of two, the second may come too late for few images, and is no growth.
        "pools": [{"tasks": ["embed"], "cpus": 0.5}],
        "commit": {"max_rows": max_rows},
        "max_error_fraction": 1.0,  # else the first commit would wait for a thousand rows
    }
    config.write_text(yaml.safe_dump(job))
    return [sys.executable, "-m", "vlmflow", "enrich", "--profile", "starter", "--config", str(config), "--json"]


def compare(folder: Path, models: dict[str, dict[str, Any]], few: int, many: int) -> float:
    """What a run of many images needs at most, to what it has needed when the first few are committed."""
    with held_images(2 * few) as held:  # reading ahead must not have to wait for the first commit
        command = embed_command(folder, models, held.manifest(folder / "images.csv", many), few)
        early, peak = peaks(command, folder / "catalog", held)
    print(f"peak anonymous memory: {early / 2**20:.0f} MiB at {few}, {peak / 2**20:.0f} MiB at {many}")
    return peak / early


@pytest.mark.slow
def test_memory_is_flat(tmp_path: Path, models: dict[str, dict[str, Any]]) -> None:
    assert compare(tmp_path, models, 400, 2_000) <= 1.15


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_is_flat_over_fifty_thousand_images(tmp_path: Path, models: dict[str, dict[str, Any]]) -> None:
    assert compare(tmp_path, models, 5_000, 50_000) <= 1.15
