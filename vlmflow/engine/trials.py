"""A pool tried out in a worker of its own: images a second and memory by batch size, in a minute at most."""

from __future__ import annotations

import itertools
import resource
import time
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import closing

import numpy as np
import pyarrow as pa
from ray._common.utils import get_system_memory  # psutil knows no limits of containers

from vlmflow.config import Frozen, PoolConfig
from vlmflow.engine import columns
from vlmflow.engine.pipeline import GPU_CALLS_AT_ONCE
from vlmflow.engine.pools import PoolWorker
from vlmflow.engine.quarantine import Stages

_GPU_SIZES = (16, 32, 64, 128, 256, 512)
_CPU_SIZES = (4, 8, 16, 32, 64)
_MAX_S = 60.0  # of one pool
_ENOUGH_S = 0.5  # of one size
# A larger batch is taken only for so much more speed: it takes memory, and its images are lost together.
_GAIN = 1.05


class Trial(Frozen):
    """One batch size.

    Attributes:
        images_per_s: of the worker, where it has a GPU with the next batch being fed meanwhile, as in a run.
        memory_bytes: the most that the worker held so far. Where it has a GPU, of the GPU's memory, and with all that
            other libraries and processes hold there.
        fits: False: memory ran out.
        tasks: images a second by task, alone.
    """

    batch_size: int
    images_per_s: float
    memory_bytes: int
    fits: bool
    tasks: dict[str, float]


class TriedPool:
    """An actor with a pool's models; to be created with the pool's resources."""

    def __init__(self, stages: Stages, number: int) -> None:
        self._pool = stages.pools[number]
        later = tuple(task for pool in stages.pools[number + 1 :] for task in pool.tasks)
        decoding = stages.decoding if stages.decode.leaves_jpegs and number == 0 else None
        self._worker = PoolWorker(self._pool, stages.setup, stages.prompts, later=later, decoding=decoding)
        # On processors calls are timed one by one: what one hides behind another would take another core.
        self._calls_at_once = GPU_CALLS_AT_ONCE if self._pool.gpus else 1
        self._threads = ThreadPoolExecutor(self._calls_at_once)
        self._call_numbers = itertools.count()

    def run(self, sample: pa.Table, sizes: tuple[int, ...] | None) -> tuple[list[Trial], int]:
        """Tries batch sizes upward until more brings nothing, memory runs out, or the minute is over.

        Args:
            sample: decoded images; of those a batch is made up, however large.
            sizes: to try; None: the usual ones.

        Returns:
            The trials, at least one; and the bytes of memory there are.
        """
        deadline = time.monotonic() + _MAX_S
        sizes = sizes or (_GPU_SIZES if self._pool.gpus else _CPU_SIZES)
        self._threads.submit(self._call, sample, sizes[0]).result()  # libraries set themselves up
        trials: list[Trial] = []
        num_calls = 3 * self._calls_at_once - 1  # of a trial, at least: before, while and after time is taken
        for size in sizes:
            if trials and time.monotonic() + num_calls * size / max(trials[-1].images_per_s, 1e-9) > deadline:
                break
            trials.append(self._try(sample, size))
            best = max(trial.images_per_s for trial in trials)
            if not trials[-1].fits or (len(trials) > 2 and max(_rates(trials[-2:])) < best):
                break
        return trials, _memory_total(is_gpu=self._pool.gpus > 0)

    def finished(self, sample: pa.Table) -> pa.Table:
        """The sample as the next pool gets it."""
        return self._worker(sample)

    def _try(self, sample: pa.Table, size: int) -> Trial:
        with closing(self._outputs(sample, size)) as outputs:
            if self._calls_at_once > 1:
                # CUDA graphs are captured by batch size, and the first batch is fed while there is none to compute.
                self._round(outputs)
            started, num_images, fits = time.perf_counter(), 0, True
            seconds = dict.fromkeys(self._pool.tasks, 0.0)
            while num_images == 0 or (fits and time.perf_counter() - started < _ENOUGH_S):
                for out in self._round(outputs):
                    num_images += size
                    least = pa.compute.min(out[columns.AT_ONCE_PREFIX + "+".join(self._pool.tasks)]).as_py()
                    fits = fits and (least is None or least >= size)
                    for task in seconds:
                        seconds[task] += pa.compute.sum(out[columns.seconds_column(task)]).as_py() or 0.0
            rate = num_images / (time.perf_counter() - started)
        tasks = {task: round(num_images / spent, 2) for task, spent in seconds.items() if spent > 0}
        memory = _memory_used(is_gpu=self._pool.gpus > 0)
        return Trial(batch_size=size, images_per_s=round(rate, 4), memory_bytes=memory, fits=fits, tasks=tasks)

    def _outputs(self, sample: pa.Table, size: int) -> Generator[pa.Table, None, None]:
        """What the worker makes of batch after batch, with as many calls under way as a run has."""
        started = {self._threads.submit(self._call, sample, size) for _ in range(self._calls_at_once)}
        try:
            while True:
                done, started = wait(started, return_when=FIRST_COMPLETED)
                yield from (call.result() for call in done)
                started |= {self._threads.submit(self._call, sample, size) for _ in done}
        finally:
            wait(started)

    def _round(self, outputs: Iterator[pa.Table]) -> list[pa.Table]:
        """As many outputs as there are threads: these take turns, and not each turn is as long as the next."""
        return list(itertools.islice(outputs, self._calls_at_once))

    def _call(self, sample: pa.Table, size: int) -> pa.Table:
        rows = np.arange(size) % sample.num_rows
        number = next(self._call_numbers)
        # Equal bytes would be computed once.
        names = pa.array([f"{number}-{row}" for row in range(size)], pa.string())
        return self._worker(columns.set_column(sample.take(pa.array(rows)), "content_hash", names))


def choose(trials: Iterable[Trial]) -> Trial:
    """The smallest batch that is nearly as fast as the fastest of those that fit; of none the smallest."""
    tried = list(trials)
    fitting = [trial for trial in tried if trial.fits] or tried[:1]
    best = max(trial.images_per_s for trial in fitting)
    return next(trial for trial in fitting if trial.images_per_s * _GAIN >= best)


def resources(pool: PoolConfig) -> dict[str, float]:
    """What Ray must set aside for one actor of a pool."""
    return {"num_cpus": pool.cpus, "num_gpus": pool.gpus}


def _rates(trials: list[Trial]) -> list[float]:
    return [trial.images_per_s for trial in trials]


def _memory_used(*, is_gpu: bool) -> int:
    if not is_gpu:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    import torch

    # Not all is torch's: nvJPEG and the driver hold some, and keep it.
    free, total = torch.cuda.mem_get_info()
    return int(torch.cuda.max_memory_reserved() + total - free - torch.cuda.memory_reserved())


def _memory_total(*, is_gpu: bool) -> int:
    if not is_gpu:
        return int(get_system_memory())
    import torch

    return int(torch.cuda.mem_get_info()[1])
