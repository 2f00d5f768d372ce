"""What an embedded Ray may use: of the machine, or of what Slurm, systemd or taskset leave of it."""

from __future__ import annotations

import math
import os
import resource
from pathlib import Path

import pytest

from vlmflow.config import RayConfig
from vlmflow.engine import allowance as module
from vlmflow.engine.allowance import allow_open_files, allowance, allowed_cpus, allowed_memory
from vlmflow.errors import ClusterError

GIB = 1 << 30
V1 = {
    "memory/slurm/job/memory.limit_in_bytes": f"{4 * GIB}",
    "memory/slurm/memory.limit_in_bytes": f"{64 * GIB}",
    "memory/memory.limit_in_bytes": "9223372036854771712",
    "cpu/slurm/job/cpu.cfs_quota_us": "250000",
    "cpu/slurm/job/cpu.cfs_period_us": "100000",
    "cpu/cpu.cfs_quota_us": "-1",
    "cpu/cpu.cfs_period_us": "100000",
}
V2 = {
    "slurm/job/memory.max": "max",
    "slurm/memory.max": f"{4 * GIB}",
    "slurm/job/cpu.max": "max 100000",
    "slurm/cpu.max": "250000 100000",
}


def limit(folder: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], own: str) -> None:
    """This process, in cgroups below a folder."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{text}\n")
    (folder / "own").write_text(own)
    monkeypatch.setattr(module, "_CGROUPS", folder)
    monkeypatch.setattr(module, "_OWN", folder / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(module, "get_num_cpus", lambda **_: 16)
    monkeypatch.setattr(module, "get_system_memory", lambda: 128 * GIB)


@pytest.mark.parametrize(
    ("files", "own"),
    [(V1, "7:memory:/slurm/job\n3:cpu,cpuacct:/slurm/job\n1:name=systemd:/x\n"), (V2, "0::/slurm/job\n")],
    ids=["v1", "v2"],
)
def test_a_limit_of_a_scheduler_is_what_ray_is_told(
    files: dict[str, str], own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(tmp_path, monkeypatch, files, own)
    assert (allowed_cpus(), allowed_memory()) == (2, 4 * GIB)
    told = allowance(RayConfig())
    assert told["num_cpus"] == 2
    assert told["object_store_memory"] + told["_memory"] == 4 * GIB
    assert 1 * GIB < told["object_store_memory"] < 2 * GIB
    told = allowance(RayConfig(num_cpus=5, object_store_bytes=GIB))
    assert told == {"num_cpus": 5, "object_store_memory": GIB, "_memory": 3 * GIB}, "the job's word counts"
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {7})
    assert allowance(RayConfig())["num_cpus"] == 1


@pytest.mark.parametrize("own", ["", "0::/\n", "0::/docker/that-is-not-seen-here\n", "nonsense"])
def test_where_nobody_limits_it_ray_counts_itself(own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(tmp_path, monkeypatch, {}, own)
    assert (allowed_cpus(), allowed_memory()) == (16, math.inf)
    assert allowance(RayConfig()) == {"num_cpus": None, "object_store_memory": None}


@pytest.mark.parametrize(
    ("limits", "wanted"),
    [
        ((256, 524_288), 65_536),
        ((256, 4096), 4096),
        ((1024, resource.RLIM_INFINITY), 65_536),
        ((100_000, 200_000), None),
        ((300, 300), None),
    ],
)
def test_ray_may_have_as_many_files_open_as_this_process_may_let_it(
    limits: tuple[int, int], wanted: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, soft_and_hard: given.append(soft_and_hard))
    allow_open_files()
    assert given == ([] if wanted is None else [(wanted, limits[1])])


def test_with_so_few_that_its_processes_would_end_it_is_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 64))
    with pytest.raises(ClusterError, match="no more than 64 files may be open at once") as caught:
        allowance(RayConfig())
    assert "ulimit -n" in caught.value.remedy
