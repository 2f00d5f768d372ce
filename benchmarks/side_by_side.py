"""What the benchmarks of models share: ours and others on the same weights, in one process, turn about."""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.machine import add_results_option, save_result
from vlmflow.engine.flops import matmul_ceiling

Run = Callable[[torch.Tensor], torch.Tensor]
Clock = Callable[[], float]  # seconds
Place = tuple[str, torch.dtype]


@dataclass(frozen=True)
class Workload:
    """A model, and the ways to run it. N: images."""

    name: str  # of the file of results, before the device
    unit: str  # what is counted, one an image
    text: str  # the module's docstring, whose second paragraph goes into the results
    size_px: int  # side of the pixels
    flops: float  # of one unit
    build: Callable[[str], Any]  # of a device
    # "ours", the other and more: (N, 3, S, S) uint8 -> (N, K) numbers, which should be the same for all.
    sides: Callable[[Any, Place], dict[str, Run]]
    other: str = "transformers"  # what ours is set against


@dataclass(frozen=True)
class Plan:
    batches: list[int]
    repeats: int
    clock: Clock


def seconds_of(call: Callable[[], object], device: str, clock: Clock) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    started = clock()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - started


def measure(workload: Workload, place: Place, plan: Plan) -> list[dict[str, object]]:
    """All sides at one dtype, for every batch size."""
    device, dtype = place
    by_side = workload.sides(workload.build(device).to(dtype), place)
    results: list[dict[str, object]] = []
    for batch in plan.batches:
        generator = torch.Generator().manual_seed(batch)
        size = (batch, 3, workload.size_px, workload.size_px)
        pixels = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator).to(device)
        seconds, ceilings, equal = take_turns(by_side, workload.other, pixels, place, plan)
        ceiling = max(ceilings)
        for side, times in seconds.items():
            # What other work on the machine takes away only ever makes a call longer.
            rate = batch / min(times)
            flops = rate * workload.flops
            results.append(
                {
                    "side": side,
                    "dtype": str(dtype).removeprefix("torch."),
                    "batch": batch,
                    f"{workload.unit}s_per_s": round(rate, 3),
                    f"{workload.unit}s_per_s_of_median": round(batch / statistics.median(times), 3),
                    "seconds": [round(value, 4) for value in times],
                    "tflops_per_s": round(flops / 1e12, 3),
                    "matmul_ceiling_tflops_per_s": round(ceiling / 1e12, 3),
                    "share_of_matmul_ceiling": round(flops / ceiling, 3),
                    f"{workload.unit}s_equal_on_both_sides": round(equal, 4),
                }
            )
            print(results[-1], flush=True)
    return results


def take_turns(
    by_side: dict[str, Run], other: str, pixels: torch.Tensor, place: Place, plan: Plan
) -> tuple[dict[str, list[float]], list[float], float]:
    """All sides and the plain product, in turn.

    Returns:
        Seconds of each repeat by side, the first call left out; FLOP/s of the product; the share of images for which
        ours and the other gave the same.
    """
    seconds: dict[str, list[float]] = {side: [] for side in by_side}
    ceilings: list[float] = []
    given = {side: run(pixels) for side, run in by_side.items()}
    for _ in range(plan.repeats):
        ceilings.append(matmul_ceiling(*place))
        for side, run in by_side.items():
            seconds[side].append(seconds_of(partial(run, pixels), place[0], plan.clock))
    return seconds, ceilings, (given["ours"] == given[other]).all(dim=1).float().mean().item()


def ratios(results: list[dict[str, Any]], unit: str, other: str) -> list[dict[str, object]]:
    """Ours over the other at equal dtype, and over its float32."""
    rates = {(row["side"], row["dtype"], row["batch"]): row[f"{unit}s_per_s"] for row in results}
    found: list[dict[str, object]] = []
    for (side, dtype, batch), rate in rates.items():
        if side != "ours":
            continue
        ratio: dict[str, object] = {"dtype": dtype, "batch": batch}
        for name, of_other in (("over_equal_dtype", dtype), ("over_float32", "float32")):
            if (other, of_other, batch) in rates:
                ratio[name] = round(rate / rates[other, of_other, batch], 2)
        found.append(ratio)
    return found


def compare(workload: Workload) -> None:
    """The command line of a benchmark: measures, and saves the results."""
    parser = argparse.ArgumentParser(description=workload.text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cpu")
    parser.add_argument("--batch", type=int, action="append", help="default: 1 and 8; with CUDA 64 and 256 too")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], action="append", help="default: both")
    parser.add_argument("--repeats", type=int, help="default: 3, with CUDA 10")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of a processor; default: all cores")
    shared = "on a machine with other work, one thread: count the time that the process was given, not what passed"
    parser.add_argument("--shared", action="store_true", help=shared)
    add_results_option(parser)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} finds no GPU")
    if options.shared and (options.device == "cuda" or options.threads != 1):
        parser.error("--shared: on a processor, with --threads 1")
    torch.set_num_threads(options.threads)
    is_cuda = options.device == "cuda"
    plan = Plan(
        options.batch or ([1, 8, 64, 256] if is_cuda else [1, 8]),
        options.repeats or (10 if is_cuda else 3),
        time.process_time if options.shared else time.perf_counter,
    )
    load_before = os.getloadavg()
    results: list[dict[str, object]] = []
    with torch.inference_mode():
        for name in options.dtype or ["float32", "bfloat16"]:
            results += measure(workload, (options.device, getattr(torch, name)), plan)
            gc.collect()
            if is_cuda:
                torch.cuda.empty_cache()
            loads = [[round(value, 2) for value in load] for load in (load_before, os.getloadavg())]
            result: dict[str, object] = {
                "workload": " ".join(workload.text.split("\n\n")[1].split()),
                "device": options.device,
                "threads": options.threads,
                "clock": plan.clock.__name__,
                "load_before_and_after": loads,
                f"gflops_per_{workload.unit}": round(workload.flops / 1e9, 1),
                f"ours_over_{workload.other}": ratios(results, workload.unit, workload.other),
                "runs": results,
            }
            path = save_result(f"{workload.name}-{options.device}", result, options.results)  # what is measured is kept
    print(path)
