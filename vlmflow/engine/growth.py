"""What a cluster may grow to: the groups of nodes that its autoscaler starts and ends."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

# KubeRay takes 2,147,483,647 for the most that a group may have where nobody says how many.
_MAX_NODES = 1_000
_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")

logger = logging.getLogger("vlmflow")


@dataclass(frozen=True)
class NodeGroup:
    """Equal nodes, of which there may be none now.

    Attributes:
        cpus: of each, like ``gpus`` and ``memory``.
        memory: bytes that Ray leaves to workers; inf: not known.
        max_nodes: so many at most.
    """

    cpus: float
    gpus: float
    memory: float
    max_nodes: int


def node_groups() -> tuple[NodeGroup, ...]:
    """The groups of the cluster that this process is connected to; none: it does not grow, or nobody tells.

    Open-source Ray 2.60 has a place where an autoscaler may tell, which Ray Data reads, but neither of its autoscalers
    does. KubeRay's are in the resource that the cluster was made of.
    """
    return tuple(_told_by_autoscaler()) or tuple(_of_kuberay())


def _told_by_autoscaler() -> Iterator[NodeGroup]:
    config = ray._private.state.state.get_cluster_config()
    for group in config.node_group_configs if config else ():
        num_nodes = _MAX_NODES if group.max_count < 0 else group.max_count
        yield from _group(group.resources, num_nodes)


def _of_kuberay() -> Iterator[NodeGroup]:
    """Of a driver in the head's pod, whose service account may read the resource, as the autoscaler beside it does."""
    name, namespace = os.environ.get("RAY_CLUSTER_NAME"), _SERVICE_ACCOUNT / "namespace"
    if name is None or not namespace.exists():
        return
    try:
        from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
        from ray.autoscaler._private.kuberay.node_provider import KubernetesHttpApiClient

        cluster = KubernetesHttpApiClient(namespace.read_text(encoding="utf-8")).get(f"rayclusters/{name}")
        grows = cluster["spec"].get("enableInTreeAutoscaling", False)
        kinds = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"] if grows else {}
    except Exception as error:  # noqa: BLE001  Kubernetes may refuse, Ray's own part have changed: it can be done without
        logger.info("what the cluster may grow to is not known: %s", str(error).partition("\n")[0])
        return
    for kind in kinds.values():
        yield from _group(kind["resources"], kind["max_workers"])


def _group(resources: Mapping[str, Any], num_nodes: int) -> Iterator[NodeGroup]:
    """None of a group that has no nodes, as KubeRay's of the head alone."""
    if num_nodes:
        cpus, gpus = float(resources.get("CPU", 0)), float(resources.get("GPU", 0))
        memory = float(resources.get("memory", 0)) or math.inf
        yield NodeGroup(cpus, gpus, memory, min(num_nodes, _MAX_NODES))
