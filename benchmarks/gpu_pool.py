"""A GPU pool by itself: what its actor does at most, whatever Ray and the processors beside it do.

One process holds the pool of ``benchmarks.gpu_enrich`` (the same models, tasks, photographs and batches of 256) and is
called by 1, 3 and 5 threads, as Ray Data calls an actor. Batches are read and checked before, and come again under
other hashes, so that none takes another's results; nvJPEG decodes each anew. Counted are the batches behind the first
third of them. Then a profile of as many calls as a run has, by threads that have called before: the share of the time
in which the GPU was at work, the time of its kernels for a batch, which bounds the rate, and the longest of them by
name. Before all that attention by itself, see ``benchmarks/gpu_attention.py``: by estimate ten seconds.

    python -m benchmarks.gpu_pool --device cuda                 # by estimate two minutes
    python -m benchmarks.gpu_pool --device cuda --sizes 1024    # no two of one size, as catalogs may have them
    python -m benchmarks.gpu_pool --device cpu --tiny           # the same with tiny models: a test of the script
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from benchmarks.gpu_attention import measure
from benchmarks.gpu_enrich import NUM_TOKENS, TASKS
from benchmarks.machine import add_gpu_options, parse_gpu_options, save_result
from benchmarks.photographs import write_jpegs
from benchmarks.random_models import write_models
from vlmflow.config import CatalogConfig, Job, PoolConfig, SourceConfig
from vlmflow.engine.decoding import PoolDecoding, ReadAndDecode
from vlmflow.engine.pipeline import GPU_CALLS_AT_ONCE
from vlmflow.engine.pools import PoolWorker
from vlmflow.imaging import merge_requests
from vlmflow.sources import open_source
from vlmflow.tasks.setup import prepare_prompts, prepare_tasks

_NUM_KERNELS = 30


def batches_of(job: Job, requests: Sequence[Any], size: int) -> list[pa.Table]:
    """The images of the job, read and checked, all tasks due."""
    source = open_source(job.source)
    references = pa.Table.from_batches(list(source.list()))
    due = pa.array([list(TASKS)] * len(references), pa.list_(pa.string()))
    for name, values in {
        "due": due,
        "due_if_same": pa.nulls(len(references), due.type),
        "previous_hash": pa.nulls(len(references), pa.string()),
        "previous_caption": pa.nulls(len(references), pa.string()),
    }.items():
        references = references.append_column(name, values)
    read = ReadAndDecode(source.reader(job.limits), tuple(requests), job.limits, leaves_jpegs=True)
    return [read(references.slice(start, size)) for start in range(0, len(references), size)]


class Batches:
    """The same batches again and again, each time under other hashes."""

    def __init__(self, batches: Sequence[pa.Table]) -> None:
        self._batches = itertools.cycle(batches)
        self._numbers = itertools.count()

    def take(self, count: int) -> Iterator[pa.Table]:
        """The next so many."""
        for batch, number in zip(itertools.islice(self._batches, count), self._numbers, strict=False):
            hashes = [f"{number:08x}{value[8:]}" for value in batch["content_hash"].to_pylist()]
            at = batch.schema.get_field_index("content_hash")
            yield batch.set_column(at, "content_hash", pa.array(hashes, batch.schema.field(at).type))


def run(worker: PoolWorker, batches: Sequence[pa.Table], threads: ThreadPoolExecutor) -> dict[str, Any]:
    """Has the threads call the worker with all batches; the rate is that behind the first third of them."""
    ends: list[float] = []

    def call(batch: pa.Table) -> int:
        out = worker(batch)
        ends.append(time.perf_counter())
        return sum(len(errors or []) for errors in out["errors"].to_pylist())

    num_errors = sum(threads.map(call, batches))
    ends.sort()
    first = len(ends) // 3
    rows = sum(batch.num_rows for batch in batches) * (len(ends) - 1 - first) / len(ends)
    return {"images_per_s": round(rows / (ends[-1] - ends[first]), 1), "errors": num_errors}


def profile(worker: PoolWorker, first: Sequence[pa.Table], batches: Sequence[pa.Table]) -> dict[str, Any]:
    """What the GPU does while the worker is called as in a run; kernels alone, copies left out.

    Args:
        first: what the threads do before: each has streams of its own, and so memory and plans of cuDNN's.
    """
    with ThreadPoolExecutor(GPU_CALLS_AT_ONCE) as threads:
        run(worker, first, threads)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
            run(worker, batches, threads)
            torch.cuda.synchronize()
    kernels = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in found.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith("Mem")
    )
    # Of the middle of the time: at both ends there are fewer batches at work.
    begin, end = kernels[0][0], kernels[-1][1]
    begin, end = begin + 0.3 * (end - begin), end - 0.2 * (end - begin)
    busy = reached = 0.0
    for start, stop, _ in kernels:
        if begin <= start <= end and stop > reached:
            busy += stop - max(start, reached)
            reached = stop
    by_name, counts = Counter[str](), Counter[str]()
    for start, stop, name in kernels:
        by_name[name] += stop - start
        counts[name] += 1
    total = sum(by_name.values())
    return {
        "gpu_busy_share": round(busy / (end - begin), 3),
        "kernels_ms_per_batch": round(total / 1000 / len(batches), 1),
        "images_per_s_if_kernels_came_one_after_the_other": round(
            sum(batch.num_rows for batch in batches) / (total / 1e6), 1
        ),
        "longest_kernels": [
            {
                "name": name[:120],
                "ms_per_batch": round(spent / 1000 / len(batches), 2),
                "per_batch": round(counts[name] / len(batches), 1),
                "share": round(spent / total, 4),
            }
            for name, spent in by_name.most_common(_NUM_KERNELS)
        ],
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, action="append", help="batches at once; default: 1, 3 and 5")
    parser.add_argument("--sizes", type=int, default=1, help="different sizes of photographs; default: 1")
    parser.add_argument("--batches", type=int, default=24, help="of each measurement; default: 24")
    add_gpu_options(parser)
    options = parse_gpu_options(parser)
    options.calls = options.calls or [1, 3, GPU_CALLS_AT_ONCE]
    options.batch, options.images = (16, 48) if options.tiny else (256, 1024)
    return options


def main() -> None:
    options = parse()
    attention = measure(options.device, tiny=options.tiny)
    print(attention, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        mean_bytes = write_jpegs(root / "images", options.images, *options.size, num_sizes=options.sizes)
        job = Job(
            source=SourceConfig(uri=str(root / "images")),
            catalog=CatalogConfig(uri=str(root / "catalog")),
            profile="base",
            models=write_models(root / "models", tiny=options.tiny),
            policy="marketplace",
            accept_unbound=True,
            views=("squash",),
            max_caption_tokens=NUM_TOKENS,
        )
        setup = prepare_tasks(job)
        requests = tuple(merge_requests(setup.pixel_requests()))
        batches = Batches(batches_of(job, requests, options.batch))
        pool = PoolConfig(tasks=TASKS, gpus=int(options.device == "cuda"), cpus=2, batch_size=options.batch)
        worker = PoolWorker(pool, setup, prepare_prompts(setup), decoding=PoolDecoding(requests, job.limits))
    width, height = options.size
    result: dict[str, Any] = {
        "workload": f"batches of {options.batch} JPEGs of {width} x {height} and {options.sizes - 1} sizes below, "
        f"{mean_bytes / 1024:.0f} KB on average; {'tiny' if options.tiny else 'real'} model sizes, "
        f"{NUM_TOKENS} caption tokens",
        "device": options.device,
        "attention": attention,
        "runs": [],
    }
    with ThreadPoolExecutor(1) as threads:
        run(worker, list(batches.take(4)), threads)  # operations are counted, kernels made and graphs captured
    for num_calls in options.calls:
        with ThreadPoolExecutor(num_calls) as threads:
            found = run(worker, list(batches.take(options.batches)), threads)
        result["runs"].append({"calls_at_once": num_calls} | found)
        print(result["runs"][-1], flush=True)
    if options.device == "cuda":
        parts = (options.batches // 2, options.batches // 2)
        result |= profile(worker, *(list(batches.take(count)) for count in parts))
        print({name: value for name, value in result.items() if name.startswith(("gpu", "kernels", "images"))})
    sizes = f"-{options.sizes}-sizes" if options.sizes > 1 else ""
    name = f"gpu_pool-{options.device}{'-tiny' if options.tiny else ''}{sizes}"
    print(save_result(name, result, options.results))


if __name__ == "__main__":
    main()
