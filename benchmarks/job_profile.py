"""What a GPU and the threads that feed it do inside a job: kernels, gaps between them, and who was late.

``benchmarks.gpu_pool`` profiles an actor by itself. Here one is profiled for some seconds while Ray, the driver and
what decodes are at work beside it. Its process writes the trace of torch's profiler (kernels, and the calls that
launched them), where its Python threads stood every few milliseconds, and for how long its threads ran and waited for a
core; :func:`summary` reads all three.
"""

from __future__ import annotations

import bisect
import json
import math
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[1]
_OURS, _POOL = "vlmflow/", "vlmflow/engine/pools.py:"
_TRACE, _THREADS = "trace.json", "threads.json"
_SAMPLE_S = 0.004
_MAX_FRAMES = 40
_NUM_LONGEST = 15
# A gap that someone could have filled; below it is how the device goes from one kernel to the next.
_LONG_GAP_US = 50.0
_NAME_CHARS = 110
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")


def profile_for(seconds: float, folder: Path) -> None:
    """Profiles this process, and writes to a folder what :func:`summaries` reads."""
    from torch.profiler import ProfilerActivity, profile, supported_activities

    device = ProfilerActivity.CUDA if ProfilerActivity.CUDA in supported_activities() else ProfilerActivity.CPU
    profiler = profile(activities=[device])
    before = _cores()
    profiler.start()
    begun = time.time_ns()
    samples = list(_stacks(seconds))
    ended, after = time.time_ns(), _cores()
    profiler.stop()
    profiler.export_chrome_trace(str(folder / f"{os.getpid()}-{_TRACE}"))
    found = {"begun_ns": begun, "ended_ns": ended, "before": before, "after": after, "samples": samples}
    (folder / f"{os.getpid()}-{_THREADS}").write_text(json.dumps(found), encoding="utf-8")


def _stacks(seconds: float) -> Iterator[tuple[int, list[list[str]]]]:
    """Time in ns, and the stacks of all other threads, the innermost frame first."""
    me, until = threading.get_ident(), time.monotonic() + seconds
    while time.monotonic() < until:
        now = time.time_ns()
        yield now, [_frames(frame) for thread, frame in sys._current_frames().items() if thread != me]
        time.sleep(_SAMPLE_S)


def _frames(frame: Any) -> list[str]:
    found: list[str] = []
    while frame is not None and len(found) < _MAX_FRAMES:
        code = frame.f_code
        path = Path(code.co_filename)
        name = str(path.relative_to(_ROOT)) if path.is_relative_to(_ROOT) else path.name
        found.append(f"{name}:{code.co_name}:{frame.f_lineno}")
        frame = frame.f_back
    return found


def _cores() -> dict[str, Any]:
    """Seconds that this process ran, and its threads waited for a core; those of all cores, and of those that idled.

    ``/proc/PID/task/TID/schedstat`` and ``/proc/stat`` (man 5 proc). A thread that ends takes what it waited along.
    """
    waited = 0
    for thread in Path("/proc/self/task").iterdir():
        try:
            one = (thread / "schedstat").read_text(encoding="ascii").split()
        except OSError:  # it has ended
            continue
        waited += int(one[1])
    ticks = [int(value) for value in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
    hertz = os.sysconf("SC_CLK_TCK")
    return {
        "ran_s": time.process_time(),
        "waited_s": waited / 1e9,
        "all_s": sum(ticks) / hertz,
        "idle_s": ticks[3] / hertz,
    }


@dataclass(frozen=True)
class _Work:
    """A kernel or a copy.

    Attributes:
        begin_us, end_us: on the trace's clock.
        launched_us: when a thread asked for it; None: not known.
    """

    name: str
    is_kernel: bool
    begin_us: float
    end_us: float
    launched_us: float | None


@dataclass(frozen=True)
class _Gap:
    """The device idles until ``ended_by``."""

    begin_us: float
    end_us: float
    ended_by: _Work

    @property
    def late_us(self) -> float:
        """How much of it went by before anybody had asked for what ended it."""
        launched = self.ended_by.launched_us
        return 0.0 if launched is None else max(0.0, min(launched, self.end_us) - self.begin_us)


def summaries(folder: Path, images_per_s: float | None, batch: int) -> list[dict[str, Any]]:
    """:func:`summary` of each actor that was profiled."""
    found = []
    for path in sorted(folder.glob(f"*-{_THREADS}")):
        trace = json.loads(path.with_name(path.name.replace(_THREADS, _TRACE)).read_text(encoding="utf-8"))
        found.append(summary(trace, json.loads(path.read_text(encoding="utf-8")), images_per_s, batch))
    return found


def summary(
    trace: Mapping[str, Any], threads: Mapping[str, Any], images_per_s: float | None, batch: int
) -> dict[str, Any]:
    """Shares of the time from the first kernel to the last, and milliseconds per batch at the rate of the actor.

    Args:
        trace: of torch's profiler, as JSON.
        threads: what was written beside it.
        images_per_s: of the actor when it was not profiled; None: nothing is said per batch.
        batch: images of one.
    """
    base_ns = int(trace.get("baseTimeNanoseconds", 0))
    begin, end = ((threads[key] - base_ns) / 1000 for key in ("begun_ns", "ended_ns"))
    work = [one for one in _work(trace["traceEvents"]) if begin <= one.begin_us <= end]
    gaps = list(_gaps(work))
    whole = max(one.end_us for one in work) - work[0].begin_us if work else end - begin
    batches = None if not images_per_s else whole / 1e6 * images_per_s / batch

    def share(amount_us: float) -> float:
        return round(amount_us / whole, 4)

    def per_batch(amount_us: float) -> float | None:
        return None if not batches else round(amount_us / 1000 / batches, 2)

    by_name, late_by_name, counts = Counter[str](), Counter[str](), Counter[str]()
    for one in work:
        if one.is_kernel:
            by_name[one.name] += one.end_us - one.begin_us
            counts[one.name] += 1
    for gap in gaps:
        late_by_name[gap.ended_by.name] += gap.late_us
    cores = {key: threads["after"][key] - threads["before"][key] for key in threads["before"]}
    watched_s = (threads["ended_ns"] - threads["begun_ns"]) / 1e9
    return {
        "seconds": round(whole / 1e6, 3),
        "gpu_busy_share": share(whole - sum(gap.end_us - gap.begin_us for gap in gaps)) if work else None,
        "kernels_ms_per_batch": per_batch(sum(by_name.values())),
        "idle_share": {
            "nothing_was_asked_for": share(sum(gap.late_us for gap in gaps)),
            "in_gaps_of_50_us_and_more": share(sum(gap.end_us - gap.begin_us for gap in gaps if _is_long(gap))),
            "in_gaps_of_1_ms_and_more": share(
                sum(gap.end_us - gap.begin_us for gap in gaps if gap.end_us - gap.begin_us >= 1000)
            ),
        },
        "late": [
            {"ended_by": name[:_NAME_CHARS], "ms_per_batch": per_batch(spent), "share": share(spent)}
            for name, spent in late_by_name.most_common(_NUM_LONGEST)
        ],
        "threads_in_long_gaps": _standing(threads["samples"], base_ns, [gap for gap in gaps if _is_long(gap)]),
        "longest_kernels": [
            {"name": name[:_NAME_CHARS], "ms_per_batch": per_batch(spent), "share": share(spent), "count": counts[name]}
            for name, spent in by_name.most_common(2 * _NUM_LONGEST)
        ],
        "cores": {
            "of_the_actor": round(cores["ran_s"] / watched_s, 2),
            "its_threads_waited_for_one": round(max(0.0, cores["waited_s"]) / watched_s, 2),
            "idle_share_of_all": round(cores["idle_s"] / max(cores["all_s"], 1e-9), 3),
        },
    }


def _is_long(gap: _Gap) -> bool:
    return gap.end_us - gap.begin_us >= _LONG_GAP_US


def _work(events: Iterable[Mapping[str, Any]]) -> list[_Work]:
    """What the device did, by its begin."""
    launched: dict[int, float] = {}
    found: list[tuple[Mapping[str, Any], int | None]] = []
    for event in events:
        correlation = event.get("args", {}).get("correlation")
        if event.get("cat") in _LAUNCHES and correlation is not None:
            launched[correlation] = float(event["ts"])
        elif event.get("cat") in _ON_DEVICE:
            found.append((event, correlation))
    work = [
        _Work(
            str(event["name"]),
            event["cat"] == "kernel",
            float(event["ts"]),
            float(event["ts"]) + float(event["dur"]),
            None if correlation is None else launched.get(correlation),
        )
        for event, correlation in found
    ]
    return sorted(work, key=lambda one: one.begin_us)


def _gaps(work: Sequence[_Work]) -> Iterator[_Gap]:
    reached = math.inf
    for one in work:
        if one.begin_us > reached:
            yield _Gap(reached, one.begin_us, one)
        reached = one.end_us if math.isinf(reached) else max(reached, one.end_us)


def _standing(samples: Sequence[Sequence[Any]], base_ns: int, gaps: Sequence[_Gap]) -> list[dict[str, Any]]:
    """Where threads that were at a batch stood in such gaps, and at any time: mean threads, the most common first."""
    begins = [gap.begin_us for gap in gaps]
    inside, always = Counter[str](), Counter[str]()
    num_inside = 0
    for at_ns, stacks in samples:
        at = (at_ns - base_ns) / 1000
        index = bisect.bisect_right(begins, at) - 1
        is_inside = index >= 0 and at < gaps[index].end_us
        num_inside += is_inside
        for stack in stacks:
            if not any(frame.startswith(_POOL) for frame in stack):
                continue
            place = " < ".join(dict.fromkeys((stack[0], next(frame for frame in stack if frame.startswith(_OURS)))))
            always[place] += 1
            inside[place] += is_inside
    ranked = (inside if num_inside else always).most_common(_NUM_LONGEST)
    return [
        {
            "at": place,
            "in_gaps": round(inside[place] / num_inside, 2) if num_inside else None,
            "always": round(always[place] / len(samples), 2),
        }
        for place, _ in ranked
    ]
