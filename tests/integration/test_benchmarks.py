"""The scripts behind the README's figures, each at its smallest: they run, and say what they were measured on."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks import blip_caption, clip_embed, decode, gpu_enrich, random_models, scaling, vilt_answer
from benchmarks.machine import RESULTS
from vlmflow.config import TaskName


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """The threads, and the results that the README quotes."""
    threads, written = torch.get_num_threads(), {path: path.stat().st_mtime_ns for path in RESULTS.iterdir()}
    yield
    torch.set_num_threads(threads)
    assert {path: path.stat().st_mtime_ns for path in RESULTS.iterdir()} == written


def run(script: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> dict[str, Any]:
    """What the script writes."""
    monkeypatch.setattr(sys, "argv", [script.__name__, *options, "--results", str(folder)])
    script.main()
    (path,) = folder.iterdir()
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    assert {"processor", "cores", "versions", "measured_at"} <= found["machine"].keys()
    return found


def test_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "SIZES", decode.SIZES[:1])
    runs = run(decode, tmp_path, monkeypatch, "--repeats", "1")["runs"]
    assert len(runs) == 7 + 4 + 4
    assert all(run["images_per_core_second"] > 0 for run in runs)
    assert max(run["mean_error"] for run in runs if run["side"] == "ours") < 1


@pytest.mark.parametrize("script", [blip_caption, vilt_answer])
def test_ours_beside_transformers(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "LAYERS", 1)
    options = ("--device", "cpu", "--dtype", "float32", "--batch", "1", "--repeats", "1", "--threads", "1")
    found = run(script, tmp_path, monkeypatch, *options)
    assert {"ours", "transformers"} <= {one["side"] for one in found["runs"]}
    (unit,) = {key for one in found["runs"] for key in one if key.endswith("_equal_on_both_sides")}
    assert all(one[unit] == 1 for one in found["runs"])


def test_ours_beside_open_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_embed, "ARCHITECTURE", random_models.TINY_CLIP)
    options = ("--device", "cpu", "--batch", "2", "--repeats", "1", "--threads", "1")
    found = run(clip_embed, tmp_path, monkeypatch, *options)
    sides = {"ours", "open_clip", "ours_quick_gelu", "open_clip_quick_gelu"}
    assert {(one["side"], one["dtype"]) for one in found["runs"]} == {
        (side, dtype) for side in sides for dtype in ("float32", "bfloat16")
    }
    assert all(one["images_equal_on_both_sides"] == 1 for one in found["runs"] if one["dtype"] == "float32")
    assert {one["dtype"] for one in found["ours_over_open_clip"]} == {"float32", "bfloat16"}


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_gpu_enrich(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(gpu_enrich, tmp_path, monkeypatch, "--device", "cpu", "--tiny", "--images", "16")
    assert found["ratio"] == pytest.approx(
        found["ours"]["images_per_s"] / found["straightforward"]["images_per_s"], 0.1
    )


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_scaling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of its five runs; the figures of the others are made up of that one's."""
    cores, runs, measure = os.sched_getaffinity(0), list[dict[str, Any]](), scaling.measure

    def measured(root: Path, folder: str, num_images: int, tasks: tuple[TaskName, ...], workers: int) -> dict[str, Any]:
        runs.append(
            {**runs[0], "images": num_images, "wall_s": 10.0 * len(runs)}
            if runs
            else measure(root, folder, num_images, tasks, workers)
        )
        return runs[-1]

    monkeypatch.setattr(scaling, "measure", measured)
    found = run(scaling, tmp_path, monkeypatch, "--images", "1")
    assert "smaller than the benchmark's own" in found["workload"]
    assert (runs[0]["tasks"], runs[0]["images"]) == (list(scaling.ALL), 1)
    assert runs[0]["peak_anonymous_mib"] > 0
    assert [one["images"] for one in found["embed"]["runs"]] == [10, 100]
    assert os.sched_getaffinity(0) == cores
