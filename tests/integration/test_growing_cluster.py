"""A cluster that Ray's autoscaler grows: a run without pools takes the nodes that may come for those that are there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ray._raylet import GcsClient
from ray.core.generated.autoscaler_pb2 import ClusterConfig

from tests.autoscaling import autoscaling_ray
from tests.processes import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU of its node is a name alone"),
]

GROUPS: dict[str, dict[str, Any]] = {
    "cpu": {"resources": {"CPU": 2}, "min_workers": 1, "max_workers": 3},
    "gpu": {"resources": {"CPU": 1, "GPU": 1}, "min_workers": 0, "max_workers": 2},
}


def tell_of(address: str, groups: dict[str, dict[str, Any]]) -> None:
    """What the cluster may grow to, in the place of an autoscaler that tells; that of open-source Ray does not."""
    config = ClusterConfig()
    for group in groups.values():
        told = config.node_group_configs.add(max_count=group["max_workers"])
        for resource, amount in group["resources"].items():
            told.resources[resource] = amount
    GcsClient(address=address).report_cluster_config(config.SerializeToString())


def test_models_wait_for_the_node_with_a_gpu_that_the_cluster_may_start(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vlmflow", "enrich", str(ROOT / "vlmflow/starter/demo"), str(tmp_path / "catalog")]
    command += ["--profile", "starter", "--tasks", "embed", "--json", "--ray-address"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    with autoscaling_ray(tmp_path, GROUPS) as address:
        tell_of(address, GROUPS)
        done = subprocess.run([*command, address], env=environment, capture_output=True, text=True, check=False)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    waiting = "waiting for a node with 1 CPU and 1 GPU; the cluster may grow to 2 GPUs"
    assert [event["stage"] for event in events if event["event"] == "stage"][-2:] == [waiting, "loading models"]
    assert done.returncode == 2, "it came, and torch finds no GPU there"
    assert "pool embed asks for 1 GPU, but torch" in done.stdout + done.stderr
