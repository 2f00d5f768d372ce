"""What an embedded Ray may use of a machine where somebody limits this process: Slurm, systemd, ``taskset``.

Ray sees the limits of a container, at the root of its file system of cgroups. Of a process below that root it does not,
and counts all CPUs and all memory of the machine: then every CPU has the work of many, and an object store sized by
memory that is not there has the kernel kill workers.
"""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ray._common.utils import get_system_memory
from ray._private.utils import get_num_cpus

from vlmflow.config import RayConfig
from vlmflow.errors import ClusterError
from vlmflow.storage import MORE_OPEN_FILES

_CGROUPS = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")
_OBJECT_STORE = 0.3  # of the memory, as Ray's default is
_FEWEST_FILES, _MANY_FILES = 256, 65_536  # with fewer a raylet dies; with more nothing is gained
_SMALLEST_STORE = 80_000_000  # bytes; Ray takes no smaller one


def allowance(config: RayConfig) -> dict[str, Any]:
    """The options of :func:`ray.init` for what the embedded Ray may use: the job's word, else the limits of this
    process where they are lower than what Ray counts, else none. Its processes inherit the limit of open files.

    Raises:
        ClusterError: as :func:`allow_open_files`.
    """
    allow_open_files()
    options: dict[str, Any] = {"num_cpus": config.num_cpus, "object_store_memory": config.object_store_bytes}
    cpus = allowed_cpus()
    if config.num_cpus is None and cpus < get_num_cpus(override_docker_cpu_warning=True):
        options["num_cpus"] = cpus
    memory = allowed_memory()
    if memory < get_system_memory():
        store = config.object_store_bytes or max(_SMALLEST_STORE, int(_OBJECT_STORE * memory))
        options |= {"object_store_memory": store, "_memory": max(0, int(memory) - store)}
    return options


def allow_open_files() -> None:
    """Lets the embedded Ray have as many files open as it may; a limit for people's programs may be a few hundred.

    Raises:
        ClusterError: it may have so few that its processes would end.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < _FEWEST_FILES:
        what = f"an embedded Ray does not start: no more than {hard} files may be open at once"
        raise ClusterError(what, remedy=MORE_OPEN_FILES)
    wanted = _MANY_FILES if hard == resource.RLIM_INFINITY else min(hard, _MANY_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def allowed_cpus() -> int:
    """CPUs that this process may run on, or the time of so many that it is given; one at least."""
    cpus = float(len(os.sched_getaffinity(0)))
    for folder in _own_folders("cpu"):
        if (quota := _numbers(folder / "cpu.max")) is None:  # of cgroups v2: quota and period, in microseconds
            quota = (_numbers(folder / "cpu.cfs_quota_us") or []) + (_numbers(folder / "cpu.cfs_period_us") or [])
        if len(quota) == 2 and quota[0] > 0 and quota[1] > 0:
            cpus = min(cpus, quota[0] / quota[1])
    return max(1, math.floor(cpus))


def allowed_memory() -> float:
    """Bytes that this process and its children may have together; inf: no limit is known."""
    found = (_numbers(folder / name) for folder in _own_folders("memory") for name in _MEMORY_FILES)
    return min((numbers[0] for numbers in found if numbers), default=math.inf)


_MEMORY_FILES = ("memory.max", "memory.limit_in_bytes")  # of cgroups v2 and v1


def _own_folders(controller: str) -> Iterator[Path]:
    """The folders of this process's cgroups that limit what a controller gives, from its own up to the root."""
    try:
        lines = _OWN.read_text().splitlines()
    except OSError:
        return
    for line in lines:  # such as 5:cpu,cpuacct:/user.slice, and of cgroups v2 0::/user.slice
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        root = _CGROUPS / controller if controllers else _CGROUPS
        own = root / path.lstrip("/")
        yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(root) and folder.is_dir())


def _numbers(file: Path) -> list[float] | None:
    """The numbers in a file; None: there is none. Without a limit it says ``max``, or -1, or more than there is."""
    try:
        return [float(word) if word != "max" else math.inf for word in file.read_text().split()]
    except (OSError, ValueError):
        return None
