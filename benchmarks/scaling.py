"""How time and memory grow: 1 against 2 workers, and few against many images, with the starter models.

Made-up photographs of 320 x 240, no two equal. Workers: the same 10 N images with one actor on a cluster of one
processor and with two actors on one of two, after the start-up. Images: all four tasks over N and 10 N, `embed` alone
over 10 N and 100 N; for each images a second in each quarter of the run, and the most anonymous memory that this
process and its workers held (the object store is of fixed size; how much of a mapped library is a process's own depends
on who else has it open). Where time is linear, the last quarter is as fast as the second (the first is the fastest:
its first blocks were decoded while the models loaded), and the images between the smaller and the larger run take as
long as the others of the larger: no run reads further ahead than the smallest has images. A run of few blocks has no
rate of its own: they finish at nearly the same time. What is not measured but follows from a rate is marked as
extrapolated.

    python -m benchmarks.scaling                       # N = 1,000: a quarter of an hour on two cores
    python -m benchmarks.scaling --images 600          # smaller, and said so in the result
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.machine import add_results_option, save_result
from benchmarks.photographs import write_jpegs
from vlmflow.config import CatalogConfig, Job, PoolConfig, RayConfig, SourceConfig, TaskName
from vlmflow.engine import enrich
from vlmflow.engine.progress import SilentProgress, Tally

ALL: tuple[TaskName, ...] = ("embed", "moderate", "caption", "match")
_BETWEEN_SAMPLES_S = 1.0
# Of the smallest run: what is decoded while the models load is as much in all. From 600 images on it is more than a
# block of the larger runs; were it less, one worker would always wait for the other.
_READ_AHEAD = 0.9


class Times(SilentProgress):
    """When how many images were done."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, int]] = []

    def update(self, tally: Tally) -> None:
        self.seen.append((time.monotonic(), tally.done))

    def by_quarter(self, num_images: int) -> list[float]:
        """Images a second in each quarter of the run behind its first block; empty: it has too few blocks to tell."""
        (_, first), *_ = self.seen
        marks = np.linspace(first, num_images, 5)
        at = np.interp(marks, [done for _, done in self.seen], [moment for moment, _ in self.seen])
        if len({done for _, done in self.seen}) < 12:
            return []
        return [round(float(rate), 2) for rate in np.diff(marks) / np.diff(at)]


class PeakMemory:
    """The most that this process and those that it started held, while the block runs."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(_BETWEEN_SAMPLES_S):
            here = psutil.Process()
            self.num_bytes = max(self.num_bytes, sum(map(_held, [here, *here.children(recursive=True)])))


def _held(process: psutil.Process) -> int:
    try:
        rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii")
    except OSError:
        return 0  # it has ended meanwhile
    return sum(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss_Anon"))


def measure(root: Path, few: int, num_images: int, tasks: tuple[TaskName, ...], num_workers: int) -> dict[str, Any]:
    """One run with its own cluster of as many processors as workers, and as many cores.

    Args:
        few: images of the smallest run.
    """
    name = f"{'-'.join(tasks)}-{num_images}-{num_workers}"
    job = Job(
        source=SourceConfig(uri=str(root / "images")),
        catalog=CatalogConfig(uri=str(root / f"catalog-{name}")),
        profile="starter",
        policy="demo" if "moderate" in tasks else None,
        views=("squash",),
        tasks=tasks,
        limit=num_images,
        read_ahead=max(1, int(_READ_AHEAD * few)),
        pools=(PoolConfig(tasks=tasks, cpus=0.5, min_actors=num_workers, max_actors=num_workers),),
        ray=RayConfig(num_cpus=num_workers, object_store_bytes=512 * 1024 * 1024),
    )
    started = time.monotonic()
    times, all_cores = Times(), os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(all_cores)[:num_workers])  # Ray's processors are a promise, not a limit
    try:
        with PeakMemory() as memory:
            report = enrich(job, progress=times)
    finally:
        os.sched_setaffinity(0, all_cores)
    assert report.statuses == {"ok": num_images}, report.statuses
    result = {
        "tasks": list(tasks),
        "images": num_images,
        "workers": num_workers,
        "seconds": round(report.seconds - report.startup_s, 2),
        "startup_s": round(report.startup_s, 2),
        "wall_s": round(time.monotonic() - started, 2),
        "images_per_s_by_quarter": times.by_quarter(num_images),
        "peak_anonymous_mib": round(memory.num_bytes / 1024**2),
    }
    print(result, flush=True)
    return result


def growth(small: dict[str, Any], large: dict[str, Any]) -> dict[str, float | None]:
    """What the larger run took, and held, beside the smaller."""
    quarters = large["images_per_s_by_quarter"]
    return {
        "images": ratio(large["images"], small["images"]),
        "seconds_per_image_last_quarter_over_second": ratio(quarters[1], quarters[-1]) if quarters else None,
        "images_per_s_between_the_two": between(small, large),
        "peak_memory": ratio(large["peak_anonymous_mib"], small["peak_anonymous_mib"]),
    }


def ratio(value: float, other: float) -> float | None:
    return round(value / other, 3) if value and other else None


def between(small: dict[str, Any], large: dict[str, Any]) -> float | None:
    """Images a second, of those that the larger run has more; start-up is in both."""
    return ratio(large["images"] - small["images"], large["wall_s"] - small["wall_s"])


def summary(few: int, runs: list[dict[str, Any]]) -> dict[str, object]:
    """What the five runs say, in their order."""
    two, larger, alone, embed_many, embed_most = runs
    hours = ratio(1e6 / 3600, between(two, larger) or 0)
    return {
        "workload": f"JPEGs of 320 x 240, starter models, one view; N = {few:,}"
        + ("" if few == 1_000 else " (smaller than the benchmark's own 1,000)"),
        "workers": {"runs": [alone, larger], "speed_up": ratio(alone["seconds"], larger["seconds"])},
        "all_tasks": {"runs": [two, larger], "growth": growth(two, larger)},
        "embed": {"runs": [embed_many, embed_most], "growth": growth(embed_many, embed_most)},
        "extrapolated": {"hours_for_a_million_images_all_tasks_2_workers": hours},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000, help="N; default: 1000")
    add_results_option(parser)
    options = parser.parse_args()
    few, many, most = options.images, 10 * options.images, 100 * options.images
    load_before = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_jpegs(root / "images", most, 320, 240)
        runs = [measure(root, few, count, ALL, 2) for count in (few, many)]
        runs += [measure(root, few, many, ALL, 1)]
        runs += [measure(root, few, count, ("embed",), 2) for count in (many, most)]
    loads = [[round(value, 2) for value in load] for load in (load_before, os.getloadavg())]
    print(save_result("scaling", summary(few, runs) | {"load_before_and_after": loads}, options.results))


if __name__ == "__main__":
    main()
