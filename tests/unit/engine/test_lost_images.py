"""Images that came back from no worker: run alone in a process that may not start."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError, RayError

from vlmflow.engine import quarantine
from vlmflow.engine.quarantine import Quarantine
from vlmflow.errors import ClusterError


@pytest.mark.parametrize("error", [ActorDiedError(), GetTimeoutError("not ready"), RayError("gone")])
def test_a_process_that_does_not_start_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch, error: RayError) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    actor = SimpleNamespace(ready=SimpleNamespace(remote=lambda: None))
    alone = Quarantine.__new__(Quarantine)
    alone.__dict__ |= {
        "_stages": None,
        "_config": SimpleNamespace(max_memory_bytes=1),
        "_remote": SimpleNamespace(remote=lambda *_: actor),
        "_actor": None,
    }
    monkeypatch.setattr(quarantine.ray, "get", fail)
    with pytest.raises(ClusterError, match=r"not ready within 600 s|the cluster gave up") as raised:
        alone.run(pa.table({"uri": ["a"]}))
    assert "What was committed stays" in raised.value.remedy
