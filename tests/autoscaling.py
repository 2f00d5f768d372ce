"""A Ray cluster whose autoscaler starts and ends nodes, all on this machine."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FAKE_HEAD_NODE_TYPE
from ray.autoscaler._private.kuberay.autoscaling_config import _generate_legacy_autoscaling_config_fields
from ray.util import get_node_ip_address

from tests.processes import ROOT, free_port, num_nodes, started, wait_for

_STORE_BYTES = 150 * 1024 * 1024


@contextmanager
def autoscaling_ray(folder: Path, groups: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The cluster, with autoscaler v2 and no processor on its head; gives its address.

    Ray's own ``AutoscalingCluster`` would stop all other clusters of the machine, and wants a file that Ray's package
    lacks.

    Args:
        groups: by name what a node of each has (``resources``), with ``min_workers`` and ``max_workers``.
    """
    port = free_port()
    address = f"{get_node_ip_address()}:{port}"
    config = folder / "autoscaler.json"
    config.write_text(json.dumps(_config(address, groups)), encoding="utf-8")
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled", "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }  # fmt: skip
    short = Path("/tmp") / f"ray-{os.getpid()}-{port}"  # sockets have short names only
    head = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus", "0",
        "--port", str(port), "--dashboard-agent-listen-port", str(free_port()), "--include-dashboard", "false",
        "--object-store-memory", str(_STORE_BYTES), "--disable-usage-stats", "--temp-dir", str(short),
        "--autoscaling-config", str(config),
    ]  # fmt: skip
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, short, ignore_errors=True)
        process = stack.enter_context(started(head, folder / "ray.log", environment=environment))
        least = 1 + sum(group["min_workers"] for group in groups.values())
        wait_for(lambda: num_nodes(address) >= least, process)
        yield address


def _config(address: str, groups: dict[str, dict[str, Any]]) -> dict[str, Any]:
    kinds = {FAKE_HEAD_NODE_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}}
    for name, group in groups.items():
        resources = group["resources"] | {"object_store_memory": _STORE_BYTES}
        kinds[name] = group | {"resources": resources, "node_config": {}}
    return {
        "cluster_name": "test",
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": address,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
        },
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "available_node_types": kinds,
        "max_workers": sum(group["max_workers"] for group in groups.values()),
        "idle_timeout_minutes": 10,
        **_generate_legacy_autoscaling_config_fields(),
    }
