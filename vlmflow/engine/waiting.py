"""The nodes that a cluster has in the course of a run, and what the run waits for on one that has yet to grow."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import threading
from types import TracebackType
from typing import Self

from vlmflow.config import PoolConfig
from vlmflow.engine.cluster import Cluster, nodes_now
from vlmflow.engine.pipeline import DECODE_CPUS
from vlmflow.engine.progress import ProgressDisplay

_LOOK_S = 5.0
_JOIN_S = 2.0


class Nodes:
    """Looks at the nodes every few seconds while the block runs.

    In a thread: whoever asks Ray while the head of the cluster is gone waits until Ray ends the process.

    Attributes:
        there: CPUs and GPUs of each node at the last look.
    """

    def __init__(self) -> None:
        self.there: tuple[tuple[float, float], ...] = ()
        self._cpus: list[float] = []  # of all nodes, at each look
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="vlmflow-nodes", daemon=True)

    def __enter__(self) -> Self:
        self._look()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=_JOIN_S)

    def restart(self) -> None:
        """Leaves what was before out of the mean."""
        self._cpus = self._cpus[-1:]

    def mean_cpus(self) -> float:
        """CPUs of the cluster, which may have grown; 0 before the first look."""
        return statistics.fmean(self._cpus) if self._cpus else 0.0

    def _watch(self) -> None:
        while not self._stop.wait(_LOOK_S):
            with contextlib.suppress(Exception):  # of a cluster that is lost, of which the run itself is told
                self._look()

    def _look(self) -> None:
        self.there = nodes_now()
        self._cpus.append(sum(cpus for cpus, _ in self.there))


class Waiting:
    """Tells of a node that a run needs while the cluster has none like it: a node takes minutes to start."""

    def __init__(self, pools: tuple[PoolConfig, ...], cluster: Cluster, nodes: Nodes, display: ProgressDisplay) -> None:
        self._needs = [(DECODE_CPUS, 0.0), *((pool.cpus, pool.gpus) for pool in pools)]
        self._cluster, self._nodes, self._display = cluster, nodes, display
        self._told: str | None = None

    def tell(self, stage: str) -> None:
        """Shows what is waited for in the place of the stage, and the stage again when it has come."""
        awaited = self._awaited()
        if awaited != self._told:
            self._told = awaited
            self._display.stage(awaited or stage)

    def _awaited(self) -> str | None:
        now = dataclasses.replace(self._cluster, nodes=self._nodes.there)
        for cpus, gpus in self._needs:
            if not now.has_node_for(cpus, gpus):
                return _sentence(cpus, gpus, self._cluster)
        return None


def _sentence(cpus: float, gpus: float, cluster: Cluster) -> str:
    needed = _counted(cpus, "CPU") + (f" and {_counted(gpus, 'GPU')}" if gpus else "")
    if not cluster.groups:
        return f"waiting for a node with {needed}"
    most = _counted(cluster.grown.gpus, "GPU") if gpus else _counted(cluster.grown.cpus, "CPU")
    return f"waiting for a node with {needed}; the cluster may grow to {most}"


def _counted(number: float, what: str) -> str:
    whole = math.ceil(number)
    return f"{whole:,} {what}" if whole == 1 else f"{whole:,} {what}s"
