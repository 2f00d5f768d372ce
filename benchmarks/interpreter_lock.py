"""What Python's switch interval costs the thread that feeds a GPU: a model of a pool's actor, on a processor alone.

One thread takes the steps of captions: twenty, each two calls of torch, then a wait of a millisecond, which stands for
the device. It wants the interpreter for every call. Beside it other threads make rows in Python, as those do whose
batches are read, fed and finished: one or two without a pause, or four that are at it for 34 of 300 ms each, which is
what a batch of 256 takes of a processor and of an H100. All intervals are measured in turn, in one process.

    python -m benchmarks.interpreter_lock
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from benchmarks.machine import add_results_option, save_result

INTERVALS_S = (0.005, 0.001, 0.0005, 0.0002)  # the first is Python's own
_STEPS, _STEP_S = 20, 0.001
_ROWS_S, _BATCH_S = 0.034, 0.3


def main() -> None:
    """Measures, prints and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="rounds of all intervals")
    parser.add_argument("--captions", type=int, default=20, help="times that twenty steps are taken in a round")
    add_results_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for num_threads, pauses in ((0, False), (1, False), (2, False), (4, True)):
        rounds: dict[float, list[tuple[float, float]]] = {interval: [] for interval in INTERVALS_S}
        for _ in range(options.repeats):
            for interval, taken in rounds.items():
                taken.append(measure(interval, num_threads, options.captions, pauses=pauses))
        for interval, taken in rounds.items():
            steps_ms, rows_per_s = (round(statistics.median(column), 1) for column in zip(*taken, strict=True))
            found.append(
                {
                    "threads_beside": num_threads,
                    "busy_share": round(_ROWS_S / _BATCH_S, 3) if pauses else 1,
                    "interval_ms": interval * 1000,
                    "twenty_steps_ms": steps_ms,
                    "rows_per_s": rows_per_s,
                }
            )
            print(found[-1], flush=True)
    print(save_result("interpreter_lock", {"repeats": options.repeats, "results": found}, options.results))


def measure(interval_s: float, num_threads: int, captions: int, *, pauses: bool) -> tuple[float, float]:
    """Mean milliseconds of twenty steps, and rows a second that the other threads make meanwhile."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(interval_s)
    token = torch.ones(8)
    try:
        with _making_rows(num_threads, pauses=pauses) as made:
            started = time.perf_counter()
            for _ in range(captions * _STEPS):
                token.add(1)
                token.add(1)
                time.sleep(_STEP_S)
            seconds = time.perf_counter() - started
            num_rows = sum(made)
    finally:
        sys.setswitchinterval(before)
    return 1000 * seconds / captions, num_rows / seconds


@contextmanager
def _making_rows(num_threads: int, *, pauses: bool) -> Iterator[list[int]]:
    """Threads that make rows while the block runs; how many each has made."""
    made, is_over = [0] * num_threads, threading.Event()

    def work(number: int) -> None:
        is_over.wait(_BATCH_S * number / num_threads if pauses else 0)  # not all at once
        while not is_over.is_set():
            begun = time.perf_counter()
            while not is_over.is_set() and time.perf_counter() - begun < _ROWS_S:
                rows = [{"uri": f"s3://bucket/{row}.jpg", "caption": "a" * 40} for row in range(64)]
                made[number] += len([row["uri"].encode() for row in rows])
            if pauses:
                is_over.wait(_BATCH_S - _ROWS_S)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(num_threads)]
    for thread in threads:
        thread.start()
    try:
        yield made
    finally:
        is_over.set()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()
