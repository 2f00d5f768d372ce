"""Constants that benchmarks change: named, of the right type, and as they were afterwards."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentTypeError
from pathlib import Path
from typing import Any

import pytest
import ray

from benchmarks.changes import Change, change_worker, made
from vlmflow.engine import pipeline
from vlmflow.models.blip import BlipCaptioner

CALLS = "vlmflow.engine.pipeline:GPU_CALLS_AT_ONCE"
NOTHING = "benchmarks.changes:nothing"


def test_a_constant_is_another_for_a_while_also_in_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    before = pipeline.GPU_CALLS_AT_ONCE
    options: list[dict[str, Any]] = []
    monkeypatch.setattr(ray, "init", lambda **given: options.append(given))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with made(Change.parse(f"{CALLS}={before + 4}")):
        assert before + 4 == pipeline.GPU_CALLS_AT_ONCE
        ray.init(address="local")
    assert before == pipeline.GPU_CALLS_AT_ONCE
    (given,) = options
    assert given["address"] == "local"
    monkeypatch.setattr(pipeline, "GPU_CALLS_AT_ONCE", before)  # for the end of this test: the worker is this process
    in_worker(given["runtime_env"], monkeypatch)
    assert before + 4 == pipeline.GPU_CALLS_AT_ONCE


def test_no_change_is_made_beside_a_cluster_that_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="has a cluster of Ray already"), made(Change.parse(NOTHING)):
        pass


def in_worker(env: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a worker of Ray does with a runtime environment; its path has to lead to the module first."""
    for name, value in env["env_vars"].items():
        monkeypatch.setenv(name, value)
    path = Path(os.environ["PYTHONPATH"].split(os.pathsep)[0])
    assert str(path / "benchmarks") in sys.modules["benchmarks"].__path__
    assert env["worker_process_setup_hook"] == f"{change_worker.__module__}.{change_worker.__name__}"
    change_worker()


def test_of_a_class_and_by_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    change = Change.parse("vlmflow.models.blip:BlipCaptioner.batches_at_once=1")
    assert (change.owner, change.name, change.value) == (BlipCaptioner, "batches_at_once", 1)
    called: list[str] = []
    monkeypatch.setattr("benchmarks.changes.nothing", lambda: called.append("nothing"))
    monkeypatch.setenv("VLMFLOW_BENCHMARK_CHANGE", NOTHING)
    change_worker()
    assert called == ["nothing"]


@pytest.mark.parametrize(
    "text",
    [
        f"{CALLS}=1.5",
        CALLS,
        f"{CALLS}=",
        f"{CALLS}=x",
        "vlmflow.nowhere:X=1",
        f"{CALLS}S=1",
        "benchmarks.changes:nothing=1",
    ],
)
def test_what_is_no_such_change_is_refused(text: str) -> None:
    with pytest.raises(ArgumentTypeError, match=f"^'{text}': "):
        Change.parse(text)
