"""What decoding beside it costs the thread that feeds a GPU: a model of a worker's machine, on processors alone.

As many processes decode as Ray starts beside an actor, which is more than there are cores, with the niceness of Ray's
workers (15), or with more. Beside them one thread takes the steps of captions: twenty, each two calls of torch, then a
wait of a millisecond, which stands for the device: asleep, or asking again and again, as CUDA does unless told
otherwise. All of it is measured in turn, in one run.

    python -m benchmarks.crowded_cores
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.sharedctypes import Synchronized

import numpy as np
from PIL import Image

# Torch and Ray are imported where they are used: every process that decodes imports this module.

_NICENESS = 15  # of Ray's workers
_STEPS, _STEP_S = 20, 0.001
_START_S = 120


def main() -> None:
    """Measures, prints and saves."""
    import torch

    from benchmarks.machine import add_results_option, save_result
    from vlmflow.engine.pipeline import DECODE_CPUS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="rounds of all cases")
    parser.add_argument("--captions", type=int, default=40, help="times that twenty steps are taken in a round")
    add_results_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.nice(max(0, _NICENESS - os.nice(0)))
    count = round((os.cpu_count() or 1) / DECODE_CPUS)
    cases = [(number, niceness) for number, niceness in ((0, 15), (count, 15), (count, 19))]
    taken: dict[tuple[int, int, bool], list[tuple[float, float]]] = {}
    for _ in range(options.repeats):
        for number, niceness in cases:
            with _decoding(number, niceness) as done:
                for sleeps in (True, False):
                    key = number, niceness, sleeps
                    taken.setdefault(key, []).append(measure(options.captions, done, sleeps=sleeps))
    found = []
    for (number, niceness, sleeps), rounds in taken.items():
        steps_ms, images_per_s = (round(statistics.median(column), 1) for column in zip(*rounds, strict=True))
        found.append(
            {
                "decoding_processes": number,
                "their_niceness": niceness,
                "waits": "asleep" if sleeps else "asking",
                "twenty_steps_ms": steps_ms,
                "decoded_per_s": images_per_s,
            }
        )
        print(found[-1], flush=True)
    print(save_result("crowded_cores", {"repeats": options.repeats, "results": found}, options.results))


def measure(captions: int, done: Synchronized[int], *, sleeps: bool) -> tuple[float, float]:
    """Mean milliseconds of twenty steps, and images a second that are decoded meanwhile."""
    import torch

    token = torch.ones(8)
    before, started = done.value, time.perf_counter()
    for _ in range(captions * _STEPS):
        token.add(1)
        token.add(1)
        begun = time.perf_counter()
        if sleeps:
            time.sleep(_STEP_S)
        while time.perf_counter() - begun < _STEP_S:
            continue
    seconds = time.perf_counter() - started
    return 1000 * seconds / captions, (done.value - before) / seconds


@contextmanager
def _decoding(number: int, niceness: int) -> Iterator[Synchronized[int]]:
    """Processes that decode while the block runs; how many images they have."""
    context = multiprocessing.get_context("spawn")
    done: Synchronized[int] = context.Value("q", 0)
    ready = context.Semaphore(0)
    processes = [context.Process(target=_decode, args=(niceness, done, ready), daemon=True) for _ in range(number)]
    for process in processes:
        process.start()
    try:
        for _ in processes:
            if not ready.acquire(timeout=_START_S):
                raise RuntimeError(f"a process that decodes did not start within {_START_S} s")
        yield done
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _decode(niceness: int, done: Synchronized[int], ready: multiprocessing.synchronize.Semaphore) -> None:
    os.nice(niceness - os.nice(0))
    encoded = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    Image.fromarray(noise).resize((800, 600), Image.Resampling.BICUBIC).save(encoded, "JPEG")
    ready.release()
    while True:
        Image.open(io.BytesIO(encoded.getvalue())).load()
        with done.get_lock():
            done.value += 1


if __name__ == "__main__":
    main()
