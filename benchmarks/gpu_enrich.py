"""The whole job on one GPU, from JPEG files to committed tables, beside the straightforward way on the same files.

Files: made-up photographs of 1600 x 1200 on the local disk; so many differ to the eye, and the others are copies of
them with other bytes, of which every one is decoded and computed anew. Models: BLIP-base captions of 20 tokens,
BLIP-base matching of the caption (ITM and ITC), CLIP ViT-L/14 for moderation and embedding; real sizes, random weights,
bfloat16; one view of each image. Ours runs `enrich` through Ray Data to two Delta tables, as a job does that sets no
sizes but the batch: first over a few images, which makes what a machine makes once (kernels that are compiled), then
over all. Its rate is that of the images behind the first block, to the last commit: what a worker does in its first
batches counts, loading models does not, and nor do the blocks that were read and checked meanwhile (`read_ahead`).
Beside it the rate from the first commit to the last full one, and that of the whole run, start-up and all. The
straightforward way: Pillow in as many threads as cores, transformers and open_clip, batch 64, one process, one Parquet
file at the end; warmed up by a batch. What has been measured is printed and saved at once.

With `--in-turn` the job runs once more, and its actor is profiled and then takes turns between settings: what each is
worth on this machine, see `benchmarks.in_turn`. With `--change` it runs again for each change of the code, and before
and behind them without. With `--actors` more than once it runs for each number. Each run has workers of its own.

    python -m benchmarks.gpu_enrich --device cuda                # by estimate 6 minutes and 16 GB of disk
    python -m benchmarks.gpu_enrich --device cuda --images 65536 --in-turn traces --actors 1 --actors 2
    python -m benchmarks.gpu_enrich --device cuda --change vlmflow.engine.pipeline:GPU_CALLS_AT_ONCE=6
    python -m benchmarks.gpu_enrich --device cpu --tiny          # the same with tiny models: a test of the script
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import in_turn, job_profile, straightforward
from benchmarks.changes import Change, made
from benchmarks.machine import add_gpu_options, parse_gpu_options, save_result, watched_gpu
from benchmarks.photographs import write_jpegs
from benchmarks.random_models import write_models
from vlmflow.config import CatalogConfig, Job, ModelConfig, PoolConfig, RayConfig, SourceConfig
from vlmflow.engine import RunReport, enrich
from vlmflow.engine.cluster import ray_cluster
from vlmflow.engine.limits import what_limited
from vlmflow.errors import VlmflowError

NUM_TOKENS = 20
TASKS = ("embed", "moderate", "caption", "match")


def job_of(
    root: Path, catalog: str, models: dict[str, ModelConfig], options: argparse.Namespace, num_images: int, count: int
) -> Job:
    """``count``: actors that share the GPU."""
    pool = PoolConfig(tasks=TASKS, gpus=1 / count, cpus=2, min_actors=count, max_actors=count, batch_size=options.batch)
    return Job(
        source=SourceConfig(uri=str(root / "images")),
        catalog=CatalogConfig(uri=catalog),
        profile="base",
        models=models,
        policy="marketplace",
        accept_unbound=True,  # random weights have no thresholds; all that is computed is computed
        views=("squash",),
        max_caption_tokens=NUM_TOKENS,
        limit=num_images,
        pools=(pool,) if options.device == "cuda" else (),
        decode=options.decode,
    )


def measure_ours(
    root: Path, models: dict[str, ModelConfig], options: argparse.Namespace, actors: int | None = None
) -> dict[str, Any]:
    """One run over all images, behind one over few; the catalogs are removed afterwards."""
    count = actors or options.actors[0]
    with tempfile.TemporaryDirectory(dir=root) as folder, ray_cluster(RayConfig()), watched_gpu() as gpu:
        sizes = [options.warm, options.images] if options.warm else [options.images]
        jobs = [job_of(root, f"{folder}/{size}", models, options, size, count) for size in sizes]
        *warm, every = (_told(enrich(job)) for job in jobs)
    return {
        "statuses": every.statuses,
        "errors": every.errors,
        "images_per_s": every.images_per_s,
        "images_per_s_between_commits": rate_between_commits(every),
        "images_per_s_with_startup": round(options.images / every.seconds, 2),
        "limited_by": what_limited(every),
        "gpu": gpu,
        "tflops_per_s": round(_tflop(every) / (every.seconds - every.startup_s), 3),
        "report": every.model_dump(mode="json", include={"seconds", "startup_s", "stages", "pools", "commits"}),
        "warmed_up_by": {"images": options.warm, "seconds": [round(run.seconds, 1) for run in warm]},
    }


def measure_in_turn(root: Path, models: dict[str, ModelConfig], options: argparse.Namespace) -> dict[str, Any]:
    """The rates of one actor by setting, and what it and the GPU were at before the first turn."""
    folder: Path = options.in_turn
    turns = in_turn.Options(tuple(in_turn.SETTINGS))
    if options.tiny:
        turns = replace(turns, first=2, batches=3, passed_over=1, profile_s=1.0)
    with in_turn.taking_turns(folder, turns):
        run = measure_ours(root, models, options)
    rates = in_turn.rates(folder)
    rate = rates[in_turn.AS_IT_IS]["images_per_s"] if in_turn.AS_IT_IS in rates else None
    profiles = job_profile.summaries(folder, rate, options.batch)
    return {"statuses": run["statuses"], "gpu": run["gpu"], "settings": rates, "profiles": profiles}


def measure_changes(
    root: Path, models: dict[str, ModelConfig], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The rates of the same run with each change, and with none at first and at last."""
    none = Change.parse("benchmarks.changes:nothing")
    for change in [none, *options.change, none] if options.change else []:
        print(f"with the change {change.text}:", flush=True)
        try:
            with made(change):
                run = measure_ours(root, models, options)
        except VlmflowError as error:  # those that follow are measured all the same
            print(f"it ended: {error}", flush=True)
            yield {"change": change.text, "error": str(error)}
            continue
        yield {"change": change.text} | _rates(run)


def _rates(run: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in run.items() if key.startswith(("images_per_s", "statuses"))}


def rate_between_commits(report: RunReport) -> float | None:
    """Images per second from the first commit on to the last but one, which is of a full buffer; None: too few."""
    first, *behind = report.commits[:-1] or [None]
    if first is None or not behind:
        return None
    return round(sum(commit.rows for commit in behind) / (behind[-1].at_s - first.at_s), 2)


def _told(report: RunReport) -> RunReport:
    rate = f"{report.images_per_s} images/s behind the first block"
    print(f"{report.statuses} in {report.seconds:.1f} s, {report.startup_s:.1f} s of start-up, {rate}", flush=True)
    return report


def _tflop(report: RunReport) -> float:
    return sum((stage.tflops_per_s or 0.0) * stage.busy_s for stage in report.stages)


def measure_other(root: Path, models: dict[str, ModelConfig], options: argparse.Namespace) -> dict[str, Any]:
    loaded = straightforward.Models.load(models, options.device)
    files = sorted((root / "images").iterdir())[: options.other_images]
    straightforward.run(files[: options.other_batch], loaded, options.other_batch, root / "warm.parquet", NUM_TOKENS)
    seconds = straightforward.run(files, loaded, options.other_batch, root / "other.parquet", NUM_TOKENS)
    return {
        "images": len(files),
        "batch": options.other_batch,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "images_per_s": round(len(files) / seconds, 2),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, help="default: 32000; with --tiny 1000")
    parser.add_argument("--different", type=int, help="photographs that differ to the eye; default: an eighth of them")
    parser.add_argument("--warm", type=int, help="images of the run before; 0: none. Default: 2048; with --tiny 100")
    parser.add_argument("--other-images", type=int, help="of the straightforward way; default: 2000; with --tiny 120")
    parser.add_argument("--batch", type=int, default=256, help="of our pool, with CUDA; default: 256")
    parser.add_argument(
        "--actors", type=int, action="append", help="that share the GPU, with CUDA; again: another run. Default: 1"
    )
    parser.add_argument(
        "--in-turn", type=Path, metavar="FOLDER", help="run once more, in turn between settings; the traces are kept"
    )
    parser.add_argument(
        "--change",
        type=Change.parse,
        action="append",
        default=[],
        metavar="MODULE:NAME=VALUE",
        help="run once more with this constant changed; again for another",
    )
    parser.add_argument("--decode", choices=["auto", "cpu", "pool"], default="auto", help="as in a job; default: auto")
    add_gpu_options(parser)
    options = parse_gpu_options(parser)
    if options.in_turn and options.in_turn.is_dir() and any(options.in_turn.iterdir()):
        parser.error(f"--in-turn {options.in_turn}: it holds files, which would be taken for this run's")
    options.actors = options.actors or [1]
    options.images = options.images or (1_000 if options.tiny else 32_000)
    options.different = options.different or max(1, options.images // 8)
    options.warm = (100 if options.tiny else 2_048) if options.warm is None else options.warm
    options.other_images = min(options.images, options.other_images or (120 if options.tiny else 2_000))
    options.other_batch = 16 if options.tiny else 64
    return options


def main() -> None:
    options = parse()
    load_before = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        mean_bytes = write_jpegs(root / "images", options.images, *options.size, num_different=options.different)
        models = write_models(root / "models", tiny=options.tiny)
        width, height = options.size
        result: dict[str, object] = {
            "workload": f"{options.images} JPEGs of {width} x {height}, {mean_bytes / 1024:.0f} KB on average, "
            f"{options.different} different to the eye; "
            f"{'tiny' if options.tiny else 'real'} model sizes, {NUM_TOKENS} caption tokens, decode={options.decode}"
            + (f", {options.actors[0]} actors" if options.actors[0] > 1 else ""),
            "device": options.device,
        }
        name = f"gpu_enrich-{options.device}{'-tiny' if options.tiny else ''}"
        ours = measure_ours(root, models, options)
        print(f"ours {ours['images_per_s']} images/s; {ours['limited_by']}", flush=True)
        save_result(name, result | {"ours": ours}, options.results)
        other = measure_other(root, models, options)
        ratio = round(ours["images_per_s"] / other["images_per_s"], 2)
        loads = [[round(value, 2) for value in load] for load in (load_before, os.getloadavg())]
        print(f"straightforward {other['images_per_s']} images/s; ratio {ratio}", flush=True)
        result |= {"ours": ours, "straightforward": other, "ratio": ratio, "load_before_and_after": loads}
        print(save_result(name, result, options.results), flush=True)
        if options.in_turn:
            result["in_turn"] = measure_in_turn(root, models, options)
            save_result(name, result, options.results)
        for count in options.actors[1:]:
            result[f"{count}_actors"] = _rates(measure_ours(root, models, options, count))
            save_result(name, result, options.results)
        changes: list[dict[str, Any]] = []
        for found in measure_changes(root, models, options):
            changes.append(found)
            save_result(name, result | {"changes": changes}, options.results)
    if ours["statuses"] != {"ok": options.images}:
        sys.exit(f"not every image was enriched: {ours['statuses']} {ours['errors']}")


if __name__ == "__main__":
    main()
