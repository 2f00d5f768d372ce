"""What Ray is told before it starts."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import pytest

from vlmflow.config import RayConfig
from vlmflow.engine import cluster


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
