"""What a run tells Prometheus while it goes on. Ray exports it: every node serves what its processes counted.

Names stand here as they are given to Ray, which puts ``ray_`` before them and the node and the worker among the labels.
``deploy/`` has the dashboard. Metrics never fail a run: what goes wrong with them is logged once.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ray
from ray.util.metrics import Counter, Gauge, Histogram, Metric

from vlmflow.config import PoolConfig
from vlmflow.engine.stages import stage_reports

if TYPE_CHECKING:  # a worker of a pool needs neither, nor what they import
    from vlmflow.engine.collect import Collected
    from vlmflow.engine.progress import Tally

logger = logging.getLogger("vlmflow")

_BATCH_SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]

# Name -> what it says, and its labels.
COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "vlmflow_images_total": ("Image rows committed.", ("catalog", "status")),
    "vlmflow_decisions_total": ("Image rows that a run decided on, by decision.", ("catalog", "decision")),
    "vlmflow_errors_total": ("Errors that rows record.", ("catalog", "error_class")),
    "vlmflow_read_bytes_total": ("Encoded bytes read from the source.", ("catalog",)),
    "vlmflow_stage_images_total": ("Images that a stage worked on.", ("catalog", "stage")),
    "vlmflow_stage_busy_seconds_total": ("Seconds of work of a stage, all workers together.", ("catalog", "stage")),
    "vlmflow_retries_total": ("Batches tried again in halves, images run alone, commits made anew.", ("kind",)),
    "vlmflow_pool_busy_seconds_total": ("Seconds that actors spent in tasks.", ("pool", "device")),
    "vlmflow_pool_waiting_seconds_total": ("Seconds that actors spent without a batch.", ("pool", "device")),
}
GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "vlmflow_queue_images": ("Images that wait: for workers, for a commit.", ("catalog", "waiting_for")),
    "vlmflow_queue_blocks": ("Finished blocks of images that the driver has not taken yet.", ("catalog",)),
}
HISTOGRAMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "vlmflow_batch_images": ("Images in a batch of a pool.", ("pool",)),
}


class Metrics:
    """The metrics of this process, each made when it is first used: Ray forgets those made before it runs."""

    def __init__(self) -> None:
        self._is_on = ray.is_initialized()
        self._made: dict[str, Any] = {}
        self._told: dict[tuple[str, ...], float] = {}

    def raise_to(self, name: str, total: float, **labels: str) -> None:
        """Brings a counter up to a total that the caller keeps."""
        key = (name, *labels.values())
        told = self._told.get(key, 0.0)
        if total > told:
            self._record(name, "inc", total - told, labels)
            self._told[key] = total

    def set(self, name: str, value: float, **labels: str) -> None:
        """Sets a gauge."""
        self._record(name, "set", value, labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Has a histogram count a value."""
        self._record(name, "observe", value, labels)

    def _record(self, name: str, how: str, value: float, labels: Mapping[str, str]) -> None:
        if not self._is_on:
            return
        try:
            if name not in self._made:
                self._made[name] = _make(name)
            getattr(self._made[name], how)(value, tags=labels)
        except Exception as error:  # noqa: BLE001 - whatever an exporter raises, the run is what matters
            self._is_on = False
            logger.warning("no more metrics from this process: %s: %s", name, error)


def _make(name: str) -> Metric:
    if name in HISTOGRAMS:
        about, labels = HISTOGRAMS[name]
        return Histogram(name, about, boundaries=_BATCH_SIZES, tag_keys=labels)
    kind, (about, labels) = (Counter, COUNTERS[name]) if name in COUNTERS else (Gauge, GAUGES[name])
    return kind(name, about, tag_keys=labels)


class RunMetrics:
    """The driver's metrics of one run: totals as they come together, several times a second.

    Args:
        catalog: its uri, without credentials.
        tasks: those of the run.
    """

    def __init__(self, catalog: str, tasks: tuple[str, ...]) -> None:
        self._catalog, self._tasks = catalog, tasks
        self._metrics = Metrics()

    def update(self, tally: Tally, collected: Collected, *, num_blocks: int = 0, num_alone: int = 0) -> None:
        """Tells what has changed.

        Args:
            num_blocks: finished blocks that wait for the driver.
            num_alone: images that were run alone after their worker had died.
        """
        metrics, catalog = self._metrics, self._catalog
        for status, count in collected.statuses.items():
            metrics.raise_to("vlmflow_images_total", count, catalog=catalog, status=status)
        for decision, count in collected.decisions.items():
            metrics.raise_to("vlmflow_decisions_total", count, catalog=catalog, decision=decision)
        for error_class, count in collected.errors.items():
            metrics.raise_to("vlmflow_errors_total", count, catalog=catalog, error_class=error_class)
        metrics.raise_to("vlmflow_read_bytes_total", collected.sums["bytes_read"], catalog=catalog)
        for report in stage_reports(self._tasks, collected, cpu_s=0.0):
            stage = report.stage
            metrics.raise_to("vlmflow_stage_images_total", report.images, catalog=catalog, stage=stage)
            metrics.raise_to("vlmflow_stage_busy_seconds_total", report.busy_s, catalog=catalog, stage=stage)
        metrics.raise_to("vlmflow_retries_total", collected.num_conflicts, kind="commit")
        metrics.raise_to("vlmflow_retries_total", num_alone, kind="image_alone")
        metrics.set("vlmflow_queue_images", tally.total - tally.done, catalog=catalog, waiting_for="workers")
        metrics.set("vlmflow_queue_images", tally.done - collected.num_rows, catalog=catalog, waiting_for="commit")
        metrics.set("vlmflow_queue_blocks", num_blocks, catalog=catalog)


class PoolMetrics:
    """The metrics of one actor of a pool."""

    def __init__(self, pool: PoolConfig) -> None:
        self._pool, self._device = "+".join(pool.tasks), "cuda" if pool.gpus else "cpu"
        self._metrics = Metrics()
        self._busy_s = self._waiting_s = 0.0
        self._lock = threading.Lock()

    def count_batch(self, num_images: int, busy_s: float, waited_s: float, num_retries: int) -> None:
        """Counts a batch, in whichever thread.

        Args:
            num_retries: batches that this actor tried again in halves, since it started.
        """
        labels = {"pool": self._pool, "device": self._device}
        with self._lock:
            self._busy_s += busy_s
            self._waiting_s += waited_s
            self._metrics.observe("vlmflow_batch_images", num_images, pool=self._pool)
            self._metrics.raise_to("vlmflow_pool_busy_seconds_total", self._busy_s, **labels)
            self._metrics.raise_to("vlmflow_pool_waiting_seconds_total", self._waiting_s, **labels)
            self._metrics.raise_to("vlmflow_retries_total", num_retries, kind="batch_in_halves")
