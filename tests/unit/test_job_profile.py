"""What benchmarks say of an actor inside a job: its turns between settings, its GPU's gaps, its card."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from benchmarks import gpu_enrich, in_turn, job_profile
from benchmarks.machine import watched_gpu
from tests.processes import wait_for


def work(name: str, begin: float, end: float, launched: float | None, category: str = "kernel") -> list[dict[str, Any]]:
    """A kernel of the trace, and the call that launched it, in microseconds."""
    correlation = hash((name, begin)) % 10**9
    kernel = {"cat": category, "name": name, "ts": begin, "dur": end - begin, "args": {"correlation": correlation}}
    if launched is None:
        return [kernel]
    call = {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": launched, "dur": 5.0}
    return [call | {"args": {"correlation": correlation}}, kernel]


CORES = {"ran_s": 0.0, "waited_s": 0.0, "all_s": 0.0, "idle_s": 0.0}
POOL = "vlmflow/engine/pools.py:_process:115"


def test_gaps_of_a_gpu_are_of_whoever_asked_too_late() -> None:
    events = [
        *work("matmul", 0, 400, None),
        *work("norm", 100, 300, None),  # beside it, on another stream
        *work("step", 600, 700, launched=550),  # 200 us of nothing, for 150 of which nobody had asked for it
        *work("copy", 720, 800, launched=10, category="gpu_memcpy"),  # it had to wait for what was before it
        *work("matmul", 800, 1000, launched=850),  # of a clock that is a little off
        {"ph": "M", "name": "process_name"},
    ]
    standing = [
        (1_000_000 + 450_000, [["threading.py:wait:1", "vlmflow/engine/turns.py:task:84", POOL], ["loop.py:run:1"]]),
        (1_000_000 + 650_000, [["vlmflow/models/blip.py:caption:80", POOL]]),
    ]
    threads = {
        "begun_ns": 1_000_000,  # the clocks of trace and threads are one
        "ended_ns": 1_000_000 + 1_000_000,
        "before": CORES,
        "after": {"ran_s": 0.002, "waited_s": 0.0005, "all_s": 16.0, "idle_s": 4.0},
        "samples": standing,
    }
    trace = {"traceEvents": events, "baseTimeNanoseconds": 1_000_000}
    found = job_profile.summary(trace, threads, images_per_s=2000.0, batch=2)
    assert found["gpu_busy_share"] == 0.78
    assert found["kernels_ms_per_batch"] == pytest.approx((400 + 200 + 100 + 200) / 1000)
    assert found["idle_share"] == {
        "nothing_was_asked_for": 0.15,
        "in_gaps_of_50_us_and_more": 0.2,
        "in_gaps_of_1_ms_and_more": 0.0,
    }
    assert next((late["ended_by"], late["share"]) for late in found["late"]) == ("step", 0.15)
    assert [(one["name"], one["count"]) for one in found["longest_kernels"]] == [
        ("matmul", 2),
        ("norm", 1),
        ("step", 1),
    ]
    assert sum(late["share"] for late in found["late"]) == 0.15
    assert found["cores"] == {"of_the_actor": 2.0, "its_threads_waited_for_one": 0.5, "idle_share_of_all": 0.25}
    waits, *others = found["threads_in_long_gaps"]
    assert waits == {"at": "threading.py:wait:1 < vlmflow/engine/turns.py:task:84", "in_gaps": 1.0, "always": 0.5}
    assert [(one["in_gaps"], one["always"]) for one in others] == [(0.0, 0.5)]


def test_nothing_is_said_of_a_gpu_that_did_nothing() -> None:
    threads = {"begun_ns": 0, "ended_ns": 10**9, "before": CORES, "after": CORES, "samples": [(0, [[POOL]])]}
    found = job_profile.summary({"traceEvents": []}, threads, None, 2)
    assert found["gpu_busy_share"] is None
    assert found["kernels_ms_per_batch"] is None
    assert found["threads_in_long_gaps"] == [{"at": POOL, "in_gaps": None, "always": 1.0}]


def test_a_process_profiles_itself(tmp_path: Path) -> None:
    job_profile.profile_for(0.05, tmp_path)
    (found,) = job_profile.summaries(tmp_path, 100.0, 16)
    assert found["seconds"] >= 0.05
    assert found["cores"]["of_the_actor"] > 0


class Pool:
    """Stands for a pool. What it finds: the most batches at once, by Python's switch interval and captions at once."""

    def __init__(self) -> None:
        self._turns = SimpleNamespace(_slots={"caption": threading.BoundedSemaphore(2)})
        self.most: Counter[tuple[float, int]] = Counter()
        self._at_work = 0
        self._lock = threading.Lock()

    def __call__(self, batch: Any) -> Any:
        with self._lock:
            self._at_work += 1
            now = round(sys.getswitchinterval(), 4), self._turns._slots["caption"]._value
            self.most[now] = max(self.most[now], self._at_work)
        time.sleep(0.002)
        with self._lock:
            self._at_work -= 1
        return batch


def test_turns_are_taken_in_the_worker_and_told_by_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # that of another test may be there
    monkeypatch.setattr(in_turn, "PoolWorker", Pool)
    monkeypatch.setattr(Pool, "__call__", Pool.__call__)  # as it was, behind this test
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.001)
    settings = ("more_at_once", "one_at_captions", "slow_switch")
    deadline = time.monotonic() + 200
    try:
        with in_turn.taking_turns(tmp_path, in_turn.Options(settings, first=2, batches=20, passed_over=1, profile_s=0)):
            in_turn.install()
            pool = Pool()

            def is_shown() -> bool:
                # A turn also counts batches that began in the one before.
                is_at_most = len(pool.most) == len(settings) and pool.most[0.001, 2] == in_turn.MORE_AT_ONCE
                return is_at_most and in_turn.rates(tmp_path).keys() == {in_turn.AS_IT_IS, *settings}

            def call() -> None:
                while not is_shown() and time.monotonic() < deadline:
                    pool(SimpleNamespace(num_rows=8))

            threads = [threading.Thread(target=call) for _ in range(in_turn.MORE_AT_ONCE)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(before)
    found = in_turn.rates(tmp_path)
    assert found.keys() == {in_turn.AS_IT_IS, *settings}
    assert all(one["images_per_s"] > 0 and one["by_turn"] for one in found.values())
    assert pool.most.keys() == {(0.001, 2), (0.001, 1), (0.005, 2)}
    assert pool.most[0.001, 2] == in_turn.MORE_AT_ONCE > max(pool.most[0.001, 1], pool.most[0.005, 2])


def test_a_setting_that_there_is_not_is_named() -> None:
    with pytest.raises(ValueError, match=r"^no settings: faster; known: as_it_is, one_at_captions, "):
        in_turn.Options(("faster",))


def test_traces_of_another_run_are_not_taken_for_those_of_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "1.jsonl").touch()
    command = ["gpu_enrich", "--device", "cpu", "--tiny", "--in-turn", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        gpu_enrich.main()
    assert f"--in-turn {tmp_path}: it holds files" in capsys.readouterr().err


def test_a_card_is_watched_while_it_is_at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "told"
    fake = tmp_path / "nvidia-smi"
    fake.write_text(
        f"#!/bin/sh\nprintf '0, 345, 70.5\\n90, 1700, 690.0\\n100, 1600, [N/A]\\n'\n: > {told}\nexec sleep 600\n"
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with watched_gpu() as found:
        wait_for(told.exists)
    assert found == {"busy_percent": 95.0, "sm_mhz": 1650.0, "power_w": 690.0, "looks": 2}


def test_where_there_is_no_card_nothing_is_told_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with watched_gpu() as found:
        pass
    assert found == {}
