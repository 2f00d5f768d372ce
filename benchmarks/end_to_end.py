"""Images per second of the whole job with the starter models, beside plain loops over the same decode and models.

Workload: drawings of the demo catalog, re-encoded as JPEG, PNG and WebP of 400 to 1600 pixels so that no two files are
equal; tasks embed, moderate, caption, match with one view (`squash`). The loops are one process, torch at its default
threads, batch 1 and batch 32, over the first quarter of them: read, decode, then the same task objects; they write
nothing. The job commits its tables.
Start-up (processes, imports, weights) is left out on both sides: the loops warm up on one batch; the job runs over some
of the images and over all, and its rate is the difference of the images by the difference of the times behind the first
block: thousands of images, beside which the second or two that runs differ by is little. What is ready by then is as
much in both: neither may read as far ahead as the smaller has images (at most 900, about the default on two cores), and
their blocks are equal, for which they commit more often than by default. A run over few images before them reads models
and libraries from the disk, and is not counted.

    python -m benchmarks.end_to_end [--images 9600]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from benchmarks.machine import add_results_option, save_result
from benchmarks.rates import job_rate, smaller_run
from vlmflow.config import CatalogConfig, CommitConfig, Job, RayConfig, SourceConfig
from vlmflow.demo import demo_job
from vlmflow.engine import enrich
from vlmflow.engine.cluster import ray_cluster
from vlmflow.engine.decoding import ReadAndDecode
from vlmflow.engine.prepare import prepare
from vlmflow.imaging import merge_requests
from vlmflow.sources import open_source
from vlmflow.tasks import add_columns
from vlmflow.tasks.setup import load_task, prepare_prompts

BATCH_SIZES = (1, 32)
FORMATS = (("jpg", "JPEG"), ("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"))
SIDES = (400, 800, 1200, 1600)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=9600)
    add_results_option(parser)
    options = parser.parse_args()
    few, read_ahead = smaller_run(options.images)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        num_bytes = write_images(root / "images", options.images)
        job = _job(root, few, read_ahead)
        loops = {f"loop_batch_{size}": measure_loop(job, options.images // 4, size) for size in BATCH_SIZES}
        with ray_cluster(RayConfig()):
            _, small, large = (enrich(_over(job, count)) for count in (max(1, few // 8), few, options.images))
    rates = {
        "job": job_rate(few, small, options.images, large),
        **{name: loop["images_per_s"] for name, loop in loops.items()},
    }
    result: dict[str, object] = {
        "workload": f"{options.images} images, {num_bytes / options.images / 1024:.0f} KB on average, starter models",
        "images_per_s": rates,
        "ratio_to_loop_batch_32": round(rates["job"] / rates["loop_batch_32"], 2),
        "ratio_to_loop_batch_1": round(rates["job"] / rates["loop_batch_1"], 2),
        "loops": loops,
        "job": large.model_dump(mode="json", include={"seconds", "startup_s", "stages", "pools", "commits"}),
        "smaller_job": {"images": few} | small.model_dump(include={"seconds", "startup_s"}),
    }
    path = save_result("end_to_end", result, options.results)
    for name, rate in rates.items():
        print(f"{name:>14}: {rate:7.1f} images/s")
    print(f"job / loop_batch_32 = {result['ratio_to_loop_batch_32']}  ({path})")


def _job(root: Path, few: int, read_ahead: int) -> Job:
    per_core = few // (4 * (os.cpu_count() or 1))
    return Job(
        source=SourceConfig(uri=str(root / "images")),
        catalog=CatalogConfig(uri=str(root / "catalog")),
        profile="starter",
        policy="demo",
        views=("squash",),
        read_ahead=min(read_ahead, 900),
        # The larger run would have larger blocks, and more of it would be done when the first is.
        commit=CommitConfig(max_rows=max(32, per_core)),
    )


def _over(job: Job, num_images: int) -> Job:
    """The job over so many of its images, into a catalog of its own."""
    catalog = CatalogConfig(uri=f"{job.catalog.uri}-{num_images}")
    return job.model_copy(update={"limit": num_images, "catalog": catalog})


def write_images(folder: Path, num_images: int) -> int:
    """Writes the workload; returns its size in bytes."""
    folder.mkdir(parents=True)
    demo = Path(demo_job("unused").source.uri).parent
    drawings = [path for path in sorted(demo.iterdir()) if path.suffix in {".png", ".jpg", ".webp"}]
    pictures = [picture for path in drawings if (picture := _open(path)) is not None]
    random = np.random.default_rng(0)
    total = 0
    for index in range(num_images):
        picture = pictures[index % len(pictures)]
        suffix, pillow_format = FORMATS[index % len(FORMATS)]
        side = int(SIDES[int(random.integers(len(SIDES)))])
        resized = picture.resize((side, max(1, side * picture.height // picture.width)))
        resized.putpixel((0, 0), tuple(int(value) for value in random.integers(0, 256, 3)))
        path = folder / f"{index:06d}.{suffix}"
        resized.save(path, pillow_format)
        total += path.stat().st_size
    return total


def measure_loop(job: Job, num_images: int, batch_size: int) -> dict[str, float]:
    """Runs the plain loop once over the job's first images, after one batch of warm-up."""
    setup = prepare(job).setup
    prompts = prepare_prompts(setup)
    source = open_source(job.source)
    decode = ReadAndDecode(source.reader(job.limits), tuple(merge_requests(list(setup.requests.values()))), job.limits)
    tasks = [load_task(name, setup, prompts, "cpu") for name in job.tasks]
    batches = list(islice(_batches(source.list(), batch_size), max(1, num_images // batch_size)))
    for measured in (batches[:1], batches):
        started = time.perf_counter()
        decode_s = 0.0
        for references in measured:
            before = time.perf_counter()
            batch = decode(references)
            decode_s += time.perf_counter() - before
            for task in tasks:
                batch = add_columns(batch, task.writes, task(batch))
        seconds = time.perf_counter() - started
    num_images = sum(batch.num_rows for batch in batches)
    return {
        "images_per_s": round(num_images / seconds, 2),
        "decode_share": round(decode_s / seconds, 3),
        "seconds": round(seconds, 2),
    }


def _batches(listed: Iterator[pa.RecordBatch], size: int) -> Iterator[pa.Table]:
    for references in listed:
        rows = pa.Table.from_batches([references])
        planned = {
            "due": pa.array([["embed", "moderate", "caption", "match"]] * len(rows), pa.list_(pa.string())),
            "due_if_same": pa.nulls(len(rows), pa.list_(pa.string())),
            "previous_hash": pa.nulls(len(rows), pa.string()),
            "previous_caption": pa.nulls(len(rows), pa.string()),
        }
        for name, values in planned.items():
            rows = rows.append_column(name, values)
        for start in range(0, len(rows), size):
            yield rows.slice(start, size)


def _open(path: Path) -> Image.Image | None:
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except OSError:
        return None  # the demo's broken files


if __name__ == "__main__":
    main()
