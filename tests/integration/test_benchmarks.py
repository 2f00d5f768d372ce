"""The scripts behind the README's figures, each at its smallest: they run, and say what they were measured on."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Self

import pyarrow as pa
import pytest
import torch
from PIL import Image

from benchmarks import (
    blip_caption,
    clip_embed,
    crowded_cores,
    decode,
    dual_embed,
    evaluation,
    gpu_attention,
    gpu_enrich,
    gpu_pool,
    interpreter_lock,
    opennsfw,
    random_models,
    rates,
    scaling,
    vilt_answer,
)
from benchmarks.machine import RESULTS
from benchmarks.photographs import write_jpegs
from vlmflow.config import TaskName
from vlmflow.engine import RunReport
from vlmflow.engine.report import CommitReport
from vlmflow.imaging.jpeg import is_plain


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


@pytest.mark.parametrize("script", [evaluation, opennsfw])
def test_a_script_without_options_measures_nothing_where_it_is_given_one(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("it was to write results")

    monkeypatch.setattr(script, "save_result", fail)
    for option, code in (("--help", 0), ("--count", 2)):
        monkeypatch.setattr(sys, "argv", [script.__name__, option])
        with pytest.raises(SystemExit) as ended:
            script.main()
        assert ended.value.code == code
    assert str(script.__doc__).splitlines()[0] in capsys.readouterr().out


def test_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "SIZES", decode.SIZES[:1])
    runs = run(decode, tmp_path, monkeypatch, "--repeats", "1")["runs"]
    assert len(runs) == 10 + 7 + 7 + 5
    assert all(run["images_per_core_second"] > 0 for run in runs)
    assert max(run["mean_error"] for run in runs if run["side"].startswith("ours")) < 1


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


def test_packed_layers_of_dual_encoders_beside_those_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
    for name in ("SIGLIP", "CLIP"):
        monkeypatch.setitem(vars(dual_embed), name, tiny | {"image_size": 224, "patch_size": 56})
    options = ("--device", "cpu", "--batch", "2", "--repeats", "1", "--threads", "1")
    found = run(dual_embed, tmp_path, monkeypatch, *options)
    sides = {"ours", "transformers", "ours_clip", "transformers_clip"}
    assert {(one["side"], one["dtype"]) for one in found["runs"]} == {
        (side, dtype) for side in sides for dtype in ("float32", "bfloat16")
    }
    assert all(one["images_equal_on_both_sides"] == 1 for one in found["runs"] if one["dtype"] == "float32")


@pytest.mark.slow
def test_a_pool_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--device", "cpu", "--tiny", "--calls", "1", "--calls", "3", "--batches", "6", "--sizes", "5")
    runs = run(gpu_pool, tmp_path, monkeypatch, *options)["runs"]
    assert [(one["calls_at_once"], one["errors"]) for one in runs] == [(1, 0), (3, 0)]
    assert all(0 < one["images_per_s"] < math.inf for one in runs)


def test_attention_by_itself() -> None:
    found = gpu_attention.measure("cpu", tiny=True)
    assert found["decoding_ms"]["as_it_is"] > 0
    assert [one["tokens"] for one in found["cross_attention_ms"]] == [8, 16, 24, 32, 64]
    assert all(one[way] > 0 for one in found["cross_attention_ms"] for way in ("by_features", "by_keys"))
    (tower,) = found["towers_ms"]
    assert tower["flash"] > 0
    assert tower["flash_first_with_one_row_less"] > 0
    assert "No viable backend" in tower["cudnn"], "what does not run here says why, and ends nothing"


def test_intervals_of_the_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = sys.getswitchinterval()
    results = run(interpreter_lock, tmp_path, monkeypatch, "--repeats", "1", "--captions", "1")["results"]
    assert sys.getswitchinterval() == usual
    assert len(results) == 4 * len(interpreter_lock.INTERVALS_S)
    assert all(result["twenty_steps_ms"] >= 20 for result in results)
    assert all((result["rows_per_s"] > 0) == (result["threads_beside"] > 0) for result in results)


def test_crowded_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "nice", lambda _: 15)  # of this process, which goes on to other tests
    results = run(crowded_cores, tmp_path, monkeypatch, "--repeats", "1", "--captions", "1")["results"]
    assert [result["waits"] for result in results] == ["asleep", "asking"] * 3
    assert all(result["twenty_steps_ms"] >= 20 for result in results)
    assert [result["their_niceness"] for result in results] == [15] * 4 + [19] * 2
    assert [result["decoding_processes"] > 0 for result in results] == [False] * 2 + [True] * 4


def test_the_threads_of_a_profile_have_run_before(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, is_profiled, seen = torch.autograd.DeviceType.CUDA, threading.Event(), Counter[tuple[bool, int]]()
    kernel = SimpleNamespace(time_range=SimpleNamespace(start=0.0, end=1.0), device_type=cuda, name="a")
    together = threading.Barrier(5)

    class Profile:
        def __enter__(self) -> Self:
            is_profiled.set()
            return self

        def __exit__(self, *_: object) -> None: ...

        def events(self) -> list[object]:
            return [kernel]

    def work(batch: pa.Table) -> pa.Table:
        together.wait(20.0)  # each thread has one
        seen[is_profiled.is_set(), threading.get_ident()] += 1
        return batch

    monkeypatch.setattr(torch.profiler, "profile", lambda **_: Profile())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    batches = 5 * [pa.table({"errors": pa.nulls(1, pa.list_(pa.string()))})]
    gpu_pool.profile(work, batches, batches)  # type: ignore[arg-type]
    before, during = ({thread for when, thread in seen if when is profiled} for profiled in (False, True))
    assert before == during
    assert len(during) == 5


def report(seconds: float, startup_s: float) -> RunReport:
    values = {"run_id": "a", "status": "done", "source": "b", "catalog": "c", "profile": "starter", "tasks": ()}
    times = {"date": "2026-11-26", "started_at": "2026-11-26T00:00:00Z", "seconds": seconds, "startup_s": startup_s}
    return RunReport.model_validate(values | times)


def test_a_rate_is_of_what_the_larger_run_has_more_and_none_where_it_took_no_longer() -> None:
    assert rates.job_rate(100, report(30.0, 20.0), 400, report(36.0, 21.0)) == 60.0
    with pytest.raises(SystemExit, match=r"no rate: .* 400 images took 10\.00 s, and 100 of them 10\.00 s"):
        rates.job_rate(100, report(30.0, 20.0), 400, report(36.0, 26.0))


@pytest.mark.parametrize("num_images", [2_400, 16_000])  # the sizes that are documented
def test_less_is_read_ahead_than_the_smaller_run_has_by_more_than_a_block(num_images: int) -> None:
    few, read_ahead = rates.smaller_run(num_images)
    assert read_ahead + num_images // 16 <= few <= num_images // 2


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_gpu_enrich(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--device", "cpu", "--tiny", "--images", "96", "--warm", "16", "--different", "40")
    found = run(gpu_enrich, tmp_path, monkeypatch, *options)
    ours, other = found["ours"], found["straightforward"]
    assert ours["statuses"] == {"ok": 96}, "copies of other bytes are images of their own"
    assert all(0 < side["images_per_s"] < math.inf for side in (ours, other))
    assert found["ratio"] == pytest.approx(ours["images_per_s"] / other["images_per_s"], abs=0.006)
    assert ours["images_per_s_with_startup"] < ours["images_per_s"]
    assert ours["warmed_up_by"]["images"] == 16
    assert len(ours["warmed_up_by"]["seconds"]) == 1


@pytest.mark.slow
def test_gpu_enrich_in_turn(tmp_path: Path) -> None:
    """In a process of its own: its workers must be those of a cluster that it starts."""
    options = (
        "--device",
        "cpu",
        "--tiny",
        "--images",
        "960",
        "--warm",
        "0",
        "--different",
        "40",
        "--other-images",
        "16",
    )
    folders = ("--in-turn", tmp_path / "traces", "--results", tmp_path / "results")
    command = map(str, (sys.executable, "-m", "benchmarks.gpu_enrich", *options, *folders))
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    found = json.loads((tmp_path / "results" / "gpu_enrich-cpu-tiny.json").read_text(encoding="utf-8"))["in_turn"]
    assert found["statuses"] == {"ok": 960}
    assert found["settings"]["as_it_is"]["images_per_s"] > 0


def test_a_rate_between_commits_leaves_out_the_first_and_the_last() -> None:
    commits = [
        {"rows": rows, "at_s": at_s, "seconds": 0.1} for rows, at_s in ((500, 7.0), (400, 9.0), (600, 11.0), (9, 12))
    ]
    told = report(30.0, 10.0).model_copy(
        update={"commits": tuple(CommitReport.model_validate(each) for each in commits)}
    )
    assert gpu_enrich.rate_between_commits(told) == 250.0
    for few in ((), told.commits[:1], told.commits[:2]):
        assert gpu_enrich.rate_between_commits(told.model_copy(update={"commits": few})) is None


def test_copies_of_photographs_have_bytes_of_their_own_and_the_same_pixels(tmp_path: Path) -> None:
    mean = write_jpegs(tmp_path, 7, 96, 64, num_different=3)
    files = sorted(tmp_path.iterdir())
    assert len({path.read_bytes() for path in files}) == len(files) == 7
    assert mean == sum(path.stat().st_size for path in files) // 7
    pixels = [Image.open(path).tobytes() for path in files]
    assert pixels[3] == pixels[0] == pixels[6]
    assert len(set(pixels)) == 3
    assert all(is_plain(path.read_bytes()) for path in files)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_scaling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of its five runs; the figures of the others are made up of that one's."""
    cores, runs, measure = os.sched_getaffinity(0), list[dict[str, Any]](), scaling.measure

    def measured(root: Path, few: int, num_images: int, tasks: tuple[TaskName, ...], workers: int) -> dict[str, Any]:
        runs.append(
            {**runs[0], "images": num_images, "wall_s": 10.0 * len(runs)}
            if runs
            else measure(root, few, num_images, tasks, workers)
        )
        return runs[-1]

    monkeypatch.setattr(scaling, "measure", measured)
    found = run(scaling, tmp_path, monkeypatch, "--images", "1")
    assert "smaller than the benchmark's own" in found["workload"]
    assert (runs[0]["tasks"], runs[0]["images"]) == (list(scaling.ALL), 1)
    assert runs[0]["peak_anonymous_mib"] > 0
    assert [one["images"] for one in found["embed"]["runs"]] == [10, 100]
    assert os.sched_getaffinity(0) == cores
