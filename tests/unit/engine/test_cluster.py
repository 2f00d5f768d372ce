"""What Ray is told before it starts."""

from __future__ import annotations

import os
import re
import signal
import sys
from typing import Any

import pytest
from ray.exceptions import NodeDiedError, ObjectStoreFullError, OutOfDiskError, RayError, RayTaskError

from vlmflow.config import RayConfig
from vlmflow.engine import cluster
from vlmflow.errors import ClusterError, VlmflowError, WeightsError


@pytest.mark.parametrize(("given", "told"), [(None, "6"), ("1", "1")])
def test_what_takes_too_much_memory_is_not_retried_for_ever(
    given: str | None, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment: dict[str, str] = {}

    def start(**_: Any) -> None:
        environment.update(os.environ)

    monkeypatch.setattr(os, "environ", {**os.environ, **({"RAY_task_oom_retries": given} if given else {})})
    monkeypatch.setattr(cluster.ray, "init", start)
    cluster._connect(RayConfig())
    assert environment["RAY_task_oom_retries"] == told


def test_a_signal_while_ray_starts_is_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(**_: Any) -> None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # as Ray does
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(cluster.ray, "init", start)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            cluster._connect(RayConfig())
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    "error", [Exception("The current node timed out during startup.\nLogs"), FileNotFoundError(2, "No such", "/gone")]
)
@pytest.mark.parametrize(("address", "words"), [(None, "RAY_TMPDIR"), ("head:6379", "RAY_AUTH_MODE")])
def test_whatever_keeps_ray_from_starting_is_an_error_of_ours(
    monkeypatch: pytest.MonkeyPatch, error: Exception, address: str | None, words: str
) -> None:
    def start(**_: Any) -> None:
        raise error

    monkeypatch.setattr(cluster.ray, "init", start)
    with pytest.raises(ClusterError, match=re.escape(str(error).splitlines()[0]) + "$") as caught:
        cluster._connect(RayConfig(address=address))
    assert words in caught.value.remedy


@pytest.mark.parametrize(
    ("error", "expected", "words"),
    [
        (OutOfDiskError("Local disk is full"), ClusterError, "RAY_TMPDIR"),
        (ObjectStoreFullError("full"), ClusterError, "RAY_TMPDIR"),
        (NodeDiedError("node is gone"), ClusterError, "What was committed stays"),
        (RayTaskError("f", "trace", WeightsError("absent", remedy="Fetch them.")), WeightsError, "Fetch them."),
    ],
)
def test_whatever_ray_raises_during_a_run_is_told_in_our_words(
    monkeypatch: pytest.MonkeyPatch, error: RayError, expected: type[VlmflowError], words: str
) -> None:
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(cluster.ray, "cluster_resources", dict)
    monkeypatch.setattr(cluster.ray, "nodes", list)
    with pytest.raises(expected) as caught, cluster.ray_cluster(RayConfig()):
        raise error
    assert words in caught.value.remedy
