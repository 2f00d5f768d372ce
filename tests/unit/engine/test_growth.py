"""What a cluster may grow to, and what is planned for that."""

from __future__ import annotations

import datetime as dt
import logging
import math
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.kuberay.node_provider import KubernetesHttpApiClient
from ray.core.generated.autoscaler_pb2 import ClusterConfig

from tests.processes import ROOT
from vlmflow.config import CommitConfig, Job, ModelConfig, PoolConfig
from vlmflow.engine import growth, pipeline, waiting
from vlmflow.engine.cluster import Cluster
from vlmflow.engine.growth import NodeGroup, node_groups
from vlmflow.engine.pipeline import block_rows, check_pools, default_pools, fit_to_plan
from vlmflow.engine.prepare import Prepared
from vlmflow.engine.progress import SilentProgress
from vlmflow.engine.quarantine import Stages
from vlmflow.engine.waiting import Nodes, Waiting
from vlmflow.errors import ClusterError

GIB = 1 << 30
CPU, GPU = NodeGroup(8.0, 0.0, 24.0 * GIB, 16), NodeGroup(8.0, 1.0, 28.0 * GIB, 8)


def cluster(*groups: NodeGroup) -> Cluster:
    """As it is before a run: a head without processors and a node."""
    nodes = ((0.0, 0.0), (8.0, 0.0))
    return Cluster(cpus=8.0, gpus=0.0, num_nodes=2, embedded=False, memory=32.0 * GIB, nodes=nodes, groups=groups)


def prepared(*tasks: str) -> Prepared:
    setup = SimpleNamespace(models={"embed": ModelConfig(family="open_clip", path="a")}, detectors=(), num_beams=1)
    return Prepared(Job.model_construct(pools=(), tasks=tasks), dt.date(2026, 1, 1), setup, {})  # type: ignore[arg-type]


def no_config() -> None:
    """What Ray's own autoscalers tell."""


@pytest.fixture
def resource(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What the shipped cluster is made of, as a driver in its head's pod reads it."""
    (tmp_path / "namespace").write_text("shop", encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load((ROOT / "deploy/kubernetes/raycluster.yaml").read_text(encoding="utf-8"))
    found["metadata"]["namespace"] = "shop"

    def get(client: KubernetesHttpApiClient, path: str) -> dict[str, Any]:
        return {("shop", "rayclusters/vlmflow"): found}[client._namespace, path]

    monkeypatch.setattr(growth, "_SERVICE_ACCOUNT", tmp_path)
    monkeypatch.setattr(growth.ray._private.state.state, "get_cluster_config", no_config)
    monkeypatch.setenv("RAY_CLUSTER_NAME", "vlmflow")
    monkeypatch.setattr(KubernetesHttpApiClient, "get", get)
    return found


def test_kuberays_groups_are_those_of_the_resource(resource: dict[str, Any]) -> None:
    assert node_groups() == (CPU, GPU)
    resource["spec"]["workerGroupSpecs"][1]["maxReplicas"] = 2_147_483_647
    assert node_groups()[1].max_nodes == 1_000, "nobody has said how many"
    resource["spec"]["enableInTreeAutoscaling"] = False
    assert node_groups() == ()


def test_what_may_not_be_read_is_not_known(
    resource: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vlmflow")
    monkeypatch.setenv("RAY_CLUSTER_NAME", "another")
    assert node_groups() == ()
    assert "what the cluster may grow to is not known" in caplog.text
    monkeypatch.delenv("RAY_CLUSTER_NAME")
    assert node_groups() == ()
    assert len(caplog.messages) == 1, "of no pod of KubeRay's there is nothing to tell"


def test_what_an_autoscaler_tells_ray_comes_first(resource: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = ClusterConfig()
    for resources, num_nodes in (({"CPU": 4}, 0), ({"CPU": 4, "memory": GIB}, 3), ({"CPU": 2, "GPU": 1}, -1)):
        group = config.node_group_configs.add(max_count=num_nodes)
        for name, amount in resources.items():
            group.resources[name] = amount
    monkeypatch.setattr(growth.ray._private.state.state, "get_cluster_config", lambda: config)
    assert node_groups() == (NodeGroup(4.0, 0.0, float(GIB), 3), NodeGroup(2.0, 1.0, math.inf, 1_000))


def test_a_grown_cluster_has_all_nodes_that_it_may_have() -> None:
    grown = cluster(CPU, GPU).grown
    assert (grown.cpus, grown.gpus, grown.num_nodes, grown.memory) == (192.0, 8.0, 24, (16 * 24.0 + 8 * 28.0) * GIB)
    assert grown.has_node_for(8, 1)
    assert not grown.has_node_for(9)
    assert grown.grown is grown
    fixed = cluster()
    assert fixed.grown is fixed
    few = cluster(NodeGroup(2.0, 0.0, math.inf, 1)).grown
    assert (few.cpus, few.num_nodes) == (8.0, 2), "nodes of no group stay"


def test_pools_are_for_the_nodes_that_come() -> None:
    (pool,) = default_pools(prepared("embed"), cluster(CPU, GPU))
    assert (pool.gpus, pool.min_actors, pool.max_actors) == (1, 1, 8)
    (pool,) = default_pools(prepared("embed"), cluster(CPU))
    assert (pool.gpus, pool.cpus, pool.min_actors, pool.max_actors) == (0, 3, 1, 32)
    (pool,) = default_pools(prepared("embed"), cluster())
    assert (pool.gpus, pool.cpus, pool.max_actors) == (0, 3, 2), "nothing is known of others"


def test_blocks_keep_the_cores_busy_that_come() -> None:
    assert block_rows(16_384, cluster(), 5_000, 32, 1e5) == 512
    assert block_rows(16_384, cluster(CPU), 5_000, 32, 1e5) == 32


@pytest.mark.parametrize(("num_images", "expected"), [(100, 1), (16_384, 1), (16_385, 2), (10_000_000, 8)])
def test_no_node_is_started_for_minutes_to_work_for_seconds(
    num_images: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "planned_block_rows", lambda *_: 32)
    pools = default_pools(prepared("embed"), cluster(CPU, GPU))
    stages = Stages(None, pools, None, None)  # type: ignore[arg-type]
    job = Job.model_construct(pools=(), commit=CommitConfig())
    planned: Any = SimpleNamespace(num_planned=num_images)
    assert fit_to_plan(stages, job, planned, cluster(CPU, GPU))[0].pools[0].max_actors == expected


def test_room_that_is_there_is_used_for_few_images_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "planned_block_rows", lambda *_: 32)
    (pool,) = default_pools(prepared("embed"), cluster(CPU))
    stages = Stages(None, (pool,), None, None)  # type: ignore[arg-type]
    job = Job.model_construct(pools=(), commit=CommitConfig())
    planned: Any = SimpleNamespace(num_planned=1_000)
    assert fit_to_plan(stages, job, planned, cluster(CPU))[0].pools[0].max_actors == 2


def test_pools_that_no_node_will_ever_hold_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    check_pools((PoolConfig(tasks=("embed",), gpus=1, cpus=8, max_actors=8),), cluster(CPU, GPU))
    assert caplog.messages == [], "it is shown while it is waited for"
    with pytest.raises(ClusterError, match="no node that the cluster has or may start has the 9 CPUs and 1 GPUs"):
        check_pools((PoolConfig(tasks=("embed",), gpus=1, cpus=9),), cluster(CPU, GPU))
    check_pools((PoolConfig(tasks=("embed",), gpus=1, min_actors=9, max_actors=9),), cluster(CPU, GPU))
    assert "pools ask for 9 GPUs, decoding included, and the cluster offers 8" in caplog.text


class Shown(SilentProgress):
    """The stages that a user sees."""

    def __init__(self) -> None:
        self.stages: list[str] = []

    def stage(self, text: str) -> None:
        self.stages.append(text)


@pytest.mark.parametrize(
    ("groups", "pool", "nodes", "told"),
    [
        ((CPU, GPU), {"gpus": 0.5}, ((8.0, 0.0),), "1 CPU and 1 GPU; the cluster may grow to 8 GPUs"),
        ((CPU,), {"cpus": 3.0}, ((2.0, 0.0),), "3 CPUs; the cluster may grow to 128 CPUs"),
        ((), {"gpus": 1.0}, ((8.0, 0.0),), "1 CPU and 1 GPU"),
        ((CPU, GPU), {"gpus": 1.0}, ((0.0, 0.0),), "1 CPU; the cluster may grow to 192 CPUs"),
    ],
)
def test_a_node_that_is_waited_for_is_told_until_it_comes(
    groups: tuple[NodeGroup, ...],
    pool: dict[str, float],
    nodes: tuple[tuple[float, float], ...],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown, seen = Shown(), Nodes()
    pools = (PoolConfig(tasks=("embed",), **pool),)  # type: ignore[arg-type]
    found = Waiting(pools, cluster(*groups), seen, shown)
    seen.there = nodes
    for _ in range(3):
        found.tell("loading models")
    assert shown.stages == [f"waiting for a node with {told}"]
    seen.there = ((8.0, 1.0),)
    for _ in range(3):
        found.tell("loading models")
    assert shown.stages[1:] == ["loading models"]


def test_a_run_that_waits_for_no_node_shows_its_stage_once() -> None:
    shown, seen = Shown(), Nodes()
    seen.there = ((2.0, 0.0),)
    Waiting((PoolConfig(tasks=("embed",)),), cluster(), seen, shown).tell("loading models")
    assert shown.stages == []


def test_the_share_of_processors_is_of_those_that_were_there_while_images_came(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there = iter([((8.0, 0.0),), ((8.0, 0.0),), ((8.0, 0.0),) * 2, ((8.0, 0.0), (8.0, 1.0), (8.0, 1.0))])
    monkeypatch.setattr(waiting, "nodes_now", lambda: next(there))
    nodes = Nodes()
    assert nodes.mean_cpus() == 0.0
    for _ in range(2):
        nodes._look()
    nodes.restart()
    for _ in range(2):
        nodes._look()
    assert (nodes.mean_cpus(), nodes.there[-1]) == (16.0, (8.0, 1.0))


def test_a_head_that_is_gone_holds_nobody_up_but_the_thread_that_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    gone, asked = threading.Event(), threading.Event()

    def nodes_now() -> tuple[tuple[float, float], ...]:
        if asked.is_set():
            gone.wait(30)
        asked.set()
        return ((8.0, 0.0),)

    monkeypatch.setattr(waiting, "nodes_now", nodes_now)
    monkeypatch.setattr(waiting, "_LOOK_S", 0.01)
    monkeypatch.setattr(waiting, "_JOIN_S", 0.01)
    with Nodes() as nodes:
        assert (nodes.there, nodes.mean_cpus()) == (((8.0, 0.0),), 8.0)
    gone.set()


def test_a_look_that_fails_says_nothing_and_is_followed_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    looks, failed, seen = [0], threading.Event(), threading.Event()

    def nodes_now() -> tuple[tuple[float, float], ...]:
        looks[0] += 1
        if looks[0] == 2:
            failed.set()
            raise RuntimeError("the head does not answer")
        if looks[0] == 4:  # what the third has found is there by now
            seen.set()
        return ((float(looks[0]), 0.0),)

    monkeypatch.setattr(waiting, "nodes_now", nodes_now)
    monkeypatch.setattr(waiting, "_LOOK_S", 0.01)
    told: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    with Nodes() as nodes:
        assert nodes.there == ((1.0, 0.0),)
        assert seen.wait(60)
        assert failed.is_set()
    assert nodes.there[0][0] >= 3
    assert told == []
