"""What a run waits for on a cluster that has yet to grow."""

from __future__ import annotations

import dataclasses
import math
import time

from vlmflow.config import PoolConfig
from vlmflow.engine.cluster import Cluster, nodes_now
from vlmflow.engine.pipeline import DECODE_CPUS
from vlmflow.engine.progress import ProgressDisplay

_LOOK_S = 5.0


class Waiting:
    """Tells of a node that a run needs while the cluster has none like it: a node takes minutes to start."""

    def __init__(self, pools: tuple[PoolConfig, ...], cluster: Cluster, display: ProgressDisplay) -> None:
        self._needs = [(DECODE_CPUS, 0.0), *((pool.cpus, pool.gpus) for pool in pools)]
        self._cluster, self._display = cluster, display
        self._told: str | None = None
        self._looked_at = -math.inf

    def tell(self, stage: str) -> None:
        """Shows what is waited for in the place of the stage, and the stage again when it has come.

        May be called all the time: the cluster is looked at every few seconds.
        """
        now = time.monotonic()
        if now - self._looked_at < _LOOK_S:
            return
        self._looked_at = now
        awaited = self._awaited()
        if awaited != self._told:
            self._told = awaited
            self._display.stage(awaited or stage)

    def _awaited(self) -> str | None:
        there = dataclasses.replace(self._cluster, nodes=nodes_now())
        for cpus, gpus in self._needs:
            if not there.has_node_for(cpus, gpus):
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
