"""A policy change over stored embeddings: from tables to committed tables.

Workload: a catalog of N synthetic images (real Parquet files and Delta logs on the local disk, files of 25,000 rows),
one random unit vector each, 512 or 768 wide; 40 labels with 8 prompts and 24 neutral prompts. Moderated once to have
labels to replace, then twice on the clock, each time as ``vlmflow remoderate`` does it: with other prompts (every
vector is scored), and with other thresholds alone (decided from the stored margins). A tiny model with random weights
stands for the text tower: encoding 344 prompts is counted, and takes a real one some seconds more. Memory is the
proportional set size of all processes, Ray's included, sampled five times a second.

    python -m benchmarks.remoderate [--rows 1_000_000] [--dim 512]
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import yaml

from benchmarks.machine import RESULTS, save_result
from tests.models import WORDS, make_clip
from vlmflow import schema
from vlmflow.catalog import Catalog
from vlmflow.catalog.columns import conform
from vlmflow.catalog.commit import Change, CommitRequest, commit
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.log import TableLog, TableName
from vlmflow.catalog.writer import write_file
from vlmflow.config import CatalogConfig, Job, ModelConfig, SourceConfig
from vlmflow.engine.prepare import prepare
from vlmflow.engine.remoderate import remoderate
from vlmflow.models import identify
from vlmflow.moderation.policy import bind, load_policy, write_binding

NUM_LABELS, NUM_PROMPTS, NUM_NEUTRAL = 40, 8, 24
FILE_ROWS = 25_000
DATE = dt.date(2026, 11, 1)


def write_policy(path: Path, model: ModelConfig, seed: int, version: int, review: float) -> str:
    rng = np.random.default_rng(seed)

    def prompt() -> str:
        return " ".join(rng.choice(WORDS, 6))

    labels = [
        {"name": f"label-{n}", "prompts": [prompt() for _ in range(NUM_PROMPTS)], "review": review, "block": 0.9}
        for n in range(NUM_LABELS)
    ]
    content = {
        "name": "benchmark",
        "version": str(version),
        "neutral": [prompt() for _ in range(NUM_NEUTRAL)],
        "categories": [{"name": "all", "labels": labels}],
        "logistic": {"scale": 20.0, "offset": 0.1},
        "bindings": [],
    }
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    write_binding(path, bind(load_policy(str(path)), identify("embed", model)))
    return str(path)


def job_of(root: Path, policy: str) -> Job:
    return Job(
        source=SourceConfig(uri="unused"),
        catalog=CatalogConfig(uri=str(root / "catalog")),
        profile="starter",
        models={"embed": ModelConfig(family="open_clip", path=str(root / "clip"))},
        policy=policy,
        tasks=("embed", "moderate"),
    )


def make_catalog(job: Job, num_rows: int, dim: int) -> None:
    fingerprints = prepare(job).fingerprints
    config = job.catalog
    Catalog.open_or_create(config, pa.schema([]))
    folder = Folder(config)
    files: dict[TableName, list[Any]] = {"images": [], "embeddings": []}
    for start in range(0, num_rows, FILE_ROWS):
        count = min(FILE_ROWS, num_rows - start)
        rng = np.random.default_rng(start)
        ids = pa.array([row.tobytes().hex() for row in rng.integers(0, 256, (count, 16), np.uint8)])
        vectors = rng.standard_normal((count, dim), dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        same = {"embed_run_id": "r", "embed_fingerprint": fingerprints["embed"], "ingest_date": DATE}
        columns: dict[str, Any] = {
            "image_id": ids,
            "uri": pa.compute.binary_join_element_wise("s3://shop/products/", ids, ".jpg", ""),
            "content_hash": pa.compute.binary_join_element_wise(ids, ids, ""),
            "object_version": ids,
            "seen_version": ids,
        }
        given = {**same, "status": "ok", "decision": "review", "run_id": "r", "attempts": 1, "format": "jpeg"}
        files["images"].append(_written(folder, "images", columns | _repeated(given, count), schema.IMAGES))
        offsets = pa.array(np.arange(count + 1) * dim, pa.int32())
        columns = {"image_id": ids, "object_version": ids}
        columns["vector"] = pa.ListArray.from_arrays(offsets, pa.array(vectors.ravel()))
        columns |= _repeated({**same, "view": "squash"}, count)
        files["embeddings"].append(_written(folder, "embeddings", columns, schema.EMBEDDINGS))
    for table, written in files.items():
        log = TableLog.open(folder, table)
        commit(log, CommitRequest(f"c-{table}", "r", "benchmark", 0), lambda _, w=written: Change(add=tuple(w)))


def _repeated(values: dict[str, Any], count: int) -> dict[str, pa.Array]:
    return {name: pa.repeat(pa.scalar(value), count) for name, value in values.items()}


def _written(folder: Folder, table: TableName, columns: dict[str, Any], wanted: pa.Schema) -> Any:
    return write_file(folder, table, conform(pa.table(columns), wanted), DATE, "r")


class Memory:
    """The most that this process and those below it take, in MiB."""

    def __init__(self) -> None:
        self.peak = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.2):
            total = 0
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
            self.peak = max(self.peak, total / 2**20)


def timed(root: Path, policy: str) -> dict[str, Any]:
    """One remoderation, with its own Ray: what the command does."""
    with Memory() as memory:
        started = time.perf_counter()
        report = remoderate(job_of(root, policy))
        seconds = time.perf_counter() - started
    return {
        "seconds": round(seconds, 1),
        "peak_mib": round(memory.peak),
        "rows": report.num_moved,
        "from_margins": report.num_from_margins,
        "commits": report.num_commits,
    }


def in_process_of_its_own(root: Path, policy: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.remoderate", "--child", str(root), policy]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(num_rows: int, dim: int) -> dict[str, Any]:
    root = Path(tempfile.mkdtemp(prefix="vlmflow-remoderate-"))
    try:
        model = ModelConfig(family="open_clip", path=str(make_clip(root / "clip", embed_dim=dim)))
        first = write_policy(root / "first.yaml", model, 1, 1, 0.5)
        prompts = write_policy(root / "prompts.yaml", model, 2, 2, 0.5)
        limits = write_policy(root / "limits.yaml", model, 2, 3, 0.6)
        make_catalog(job_of(root, first), num_rows, dim)
        print(f"{num_rows:,} x {dim} made", flush=True)
        print("first labels:", in_process_of_its_own(root, first), flush=True)
        result = {
            "rows": num_rows,
            "dim": dim,
            "other prompts": in_process_of_its_own(root, prompts),
            "thresholds alone": in_process_of_its_own(root, limits),
        }
        assert result["other prompts"]["rows"] == result["thresholds alone"]["from_margins"] == num_rows
        return result
    finally:
        shutil.rmtree(root)


def enriching_s(num_rows: int) -> dict[str, Any] | None:
    """What `benchmarks.end_to_end` says that enriching as many images takes, extrapolated."""
    path = RESULTS / "end_to_end.json"
    if not path.is_file():
        return None
    rate = json.loads(path.read_text(encoding="utf-8"))["images_per_s"]["job"]
    return {"images_per_s": rate, "seconds_extrapolated": round(num_rows / rate)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, action="append", help="default: 512 and 768")
    parser.add_argument("--shared", action="store_true", help="say that other work ran beside")
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "POLICY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(timed(Path(options.child[0]), options.child[1])))
        return
    runs = []
    for dim in options.dim or [512, 768]:
        runs.append(measure(options.rows, dim))
        print(json.dumps(runs[-1], indent=2), flush=True)
    enriching = enriching_s(options.rows)
    if enriching is not None:
        for run in runs:
            for name in ("other prompts", "thresholds alone"):
                run[name]["times_faster_than_enriching"] = round(
                    enriching["seconds_extrapolated"] / run[name]["seconds"]
                )
    workload = (__doc__ or "").split("\n\n")[1]
    save_result(
        "remoderate", {"workload": workload, "shared_machine": options.shared, "enriching": enriching, "runs": runs}
    )


if __name__ == "__main__":
    main()
