"""Planning at scale: what is due of N references against a catalog of N rows.

``python -m benchmarks.planning --rows 50_000_000`` makes a catalog and a listing of as many synthetic keys (real
Parquet files and a real Delta log on the local disk; ids, versions and fingerprints as long as real ones), of which 1%
of the references are new, 1% changed and 0.1% failed before, plans in a process of its own, checks the counts against
what was made, and prints seconds per phase, peak memory and the bytes put aside on disk. ``--columns`` plans once more,
with a listing that has a price, a title and a category of each image, of which the price of 1% is another than in its
row; then these rows are updated.

On a billion images, by the figures of 50 million in ``results/planning.json``: time and disk grow with the number of
rows, memory with the rows of one bucket, of which there are 64. A billion in one process would take twenty times as
long, some hundred gigabytes of local disk, and buckets of 16 million rows, which is where memory asks for more buckets
before anything else does. What does not shrink with more cores is the listing: a store gives about a thousand names a
request, so a billion are a million requests one after the other for each prefix. Sources of that size are better given
as a manifest, or as prefixes that are run one by one: the plan of one has nothing to do with that of another.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from benchmarks.machine import save_result
from tests.catalog_samples import DATE, config_of, fingerprints, request
from vlmflow import schema
from vlmflow.catalog import Catalog, plan
from vlmflow.catalog.columns import conform
from vlmflow.catalog.commit import Change, CommitRequest, commit
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.log import TableLog
from vlmflow.catalog.rows import attempt_digest
from vlmflow.catalog.writer import write_file
from vlmflow.engine.planning import OnCluster

CHUNK = 500_000
NEW, CHANGED, FAILED, OUTDATED = 0.01, 0.01, 0.001, 0.01
COLUMNS = pa.schema([("price", pa.float64()), ("title", pa.string()), ("category", pa.string())])


def hexadecimal(seed: tuple[int, int], count: int) -> pa.Array:
    """Random ids of 32 digits, equal for equal seeds."""
    data = np.random.default_rng(seed).bytes(16 * count).hex().encode()
    return pa.StringArray.from_buffers(
        count, pa.py_buffer(np.arange(0, 32 * (count + 1), 32, dtype=np.int32)), pa.py_buffer(data)
    )


def mixed(ours: pa.Array, others: pa.Array, share: float, at: float) -> pa.Array:
    """``share`` of the values taken from the others, from position ``at`` on."""
    start, stop = int(len(ours) * at), int(len(ours) * at) + round(len(ours) * share)
    return pa.concat_arrays([ours.slice(0, start), others.slice(start, stop - start), ours.slice(stop)])


def columns_of(number: int, count: int, *, new_prices: bool) -> pa.StructArray:
    """The caller's columns of a chunk of images."""
    prices = pa.array(np.random.default_rng((number, 2)).uniform(1, 100, count).round(2))
    if new_prices:
        prices = mixed(prices, pc.add(prices, 1.0), OUTDATED, 0.2)
    titles = pc.binary_join_element_wise("A title of fifty characters,", hexadecimal((number, 3), count), " ")
    categories = pa.array([f"category {code}" for code in range(40)]).take(pa.array(np.arange(count) % 40))
    return pa.StructArray.from_arrays(
        [prices, pc.utf8_slice_codeunits(titles, 0, 50), categories], fields=list(COLUMNS)
    )


def listing(num_rows: int, *, with_columns: bool = False) -> Iterator[pa.RecordBatch]:
    """The references; no row becomes a Python object."""
    for number, start in enumerate(range(0, num_rows, CHUNK)):
        count = min(CHUNK, num_rows - start)
        ids = mixed(hexadecimal((number, 0), count), hexadecimal((number, 9), count), NEW, 0.0)
        version = mixed(hexadecimal((number, 1), count), hexadecimal((number, 8), count), CHANGED, 0.5)
        uri = pc.binary_join_element_wise("s3://shop-images/2026/products/", ids, ".jpg", "")
        columns = {"image_id": ids, "uri": uri, "object_version": version, "locator": uri}
        columns["size_bytes"] = pa.repeat(pa.scalar(250_000, pa.int64()), count)
        rows = conform(pa.table(columns), schema.REFERENCE)
        if with_columns:
            rows = rows.append_column("source", columns_of(number, count, new_prices=True))
        yield from rows.to_batches(max_chunksize=50_000)


def make_catalog(root: Path, num_rows: int, *, with_columns: bool) -> None:
    """The rows, in files of half a million."""
    config = config_of(root)
    held = schema.with_source(schema.IMAGES, COLUMNS) if with_columns else schema.IMAGES
    Catalog.open_or_create(config, COLUMNS if with_columns else pa.schema([]))
    folder, log = Folder(config), TableLog.open(Folder(config), "images")
    error = [{"stage": "read", "class": "read_failed", "message": "the store failed, after all retries"}]
    files = []
    for number, start in enumerate(range(0, num_rows, CHUNK)):
        count = min(CHUNK, num_rows - start)
        failed = np.zeros(count, np.bool_)
        failed[int(count * 0.8) : int(count * 0.8) + round(count * FAILED)] = True
        ids, version = hexadecimal((number, 0), count), hexadecimal((number, 1), count)
        columns: dict[str, Any] = {"image_id": ids, "uri": ids, "seen_version": version, "object_version": version}
        given = {"decision": "allow", "decoder": "decoder-1", "run_id": "r", "policy_digest": "policy-1"}
        given["attempt_digest"] = attempt_digest(fingerprints())
        given |= {schema.fingerprint_column(task): value for task, value in fingerprints().items()}
        columns |= {name: pa.repeat(value, count) for name, value in given.items()}
        columns["status"] = pc.if_else(pa.array(failed), "failed", "ok")
        columns["attempts"] = pa.repeat(pa.scalar(1, pa.int32()), count)
        columns["read_at"] = pa.repeat(pa.scalar(dt.datetime.now(dt.UTC), schema.TIMESTAMP), count)
        columns["errors"] = pa.array([error], schema.ERRORS).take(pa.array(np.where(failed, 0, None), pa.int64()))
        columns["ingest_date"] = pa.repeat(pa.scalar(DATE, pa.date32()), count)
        if with_columns:
            columns["source"] = columns_of(number, count, new_prices=False)
        files.append(write_file(folder, "images", conform(pa.table(columns), held), DATE, "r"))
    commit(log, CommitRequest("c", "r", "benchmark", 0), lambda _: Change(add=tuple(files)))


def make_plan(root: Path, num_rows: int, *, on_cluster: bool, with_columns: bool) -> dict[str, object]:
    """Plans, and measures this process; the workers of a cluster are not in its memory."""
    catalog = Catalog.open(config_of(root))
    workers = None
    if on_cluster:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        workers = OnCluster(2)
    phases: dict[str, float] = {}
    spilled: list[int] = []

    def timed(name: str, phase: str) -> None:
        original: Callable[..., Any] = getattr(plan._Planner, name)

        def call(self: Any, *arguments: Any) -> Any:
            started = time.perf_counter()
            out = original(self, *arguments)
            phases[phase] = phases.get(phase, 0.0) + time.perf_counter() - started
            if name == "_spread_ledger":
                files = [path for path in self._workspace.rglob("*") if path.is_file()]
                spilled.append(sum(path.stat().st_size for path in files))
            return out

        setattr(plan._Planner, name, call)

    for name in ("_spread_references", "_spread_ledger", "_order"):
        timed(name, name.strip("_").replace("_", " "))
    listed_s = -time.perf_counter()
    for _ in listing(min(num_rows, 2_000_000), with_columns=with_columns):
        pass
    listed_s = (listed_s + time.perf_counter()) * num_rows / min(num_rows, 2_000_000)
    started = time.perf_counter()
    with catalog.plan(listing(num_rows, with_columns=with_columns), request(), workers) as made:
        seconds = time.perf_counter() - started
        expected = {
            "new": round(num_rows * NEW),
            "changed": round(num_rows * CHANGED),
            "retry": round(num_rows * FAILED),
        }
        found = {reason: count for (task, reason), count in made.counts.items() if task == "embed"}
        assert found == expected, (found, expected)
        assert (made.num_listed, made.num_planned) == (num_rows, sum(expected.values()))
        assert made.num_outdated == (round(num_rows * OUTDATED) if with_columns else 0)
        memory = peak_rss_mib()
        updated_s = -time.perf_counter()
        assert sum(count for _, count in catalog.update_columns("r2", made)) == made.num_outdated
        updated_s += time.perf_counter()
    phases["join"] = seconds - sum(phases.values())
    columns = {"seconds_of_updating_columns": round(updated_s, 1), "peak_rss_mib_with_it": peak_rss_mib()}
    return {
        "rows": num_rows,
        "where": "Ray tasks on 2 CPUs" if on_cluster else "one process",
        "columns": len(COLUMNS) if with_columns else 0,
        "seconds": round(seconds, 1),
        "seconds_of_making_the_listing": round(listed_s, 1),
        "seconds_by_phase": {phase: round(value, 1) for phase, value in phases.items()},
        "peak_rss_mib": memory,
        "spilled_mib": spilled[0] // 2**20 if spilled else None,
        "planned": found,
        **(columns if with_columns else {}),
    }


def peak_rss_mib() -> int:
    """Of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, action="append", help="default: 1, 10 and 50 million")
    parser.add_argument("--ray", action="store_true", help="plan on the workers of a Ray cluster too")
    parser.add_argument("--columns", action="store_true", help="plan with the caller's columns too")
    parser.add_argument("--shared", action="store_true", help="say that other work ran beside")
    parser.add_argument("--child", nargs=3, metavar=("FOLDER", "ROWS", "WHERE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        folder, rows, where = options.child
        done = make_plan(Path(folder), int(rows), on_cluster=where == "ray", with_columns=where == "columns")
        print(json.dumps(done))
        return
    results = []
    for num_rows in options.rows or [1_000_000, 10_000_000, 50_000_000]:
        root = Path(tempfile.mkdtemp(prefix="vlmflow-planning-"))
        try:
            started = time.perf_counter()
            make_catalog(root / "catalog", num_rows, with_columns=options.columns)
            print(f"{num_rows:,} rows made in {time.perf_counter() - started:.0f} s", flush=True)
            for where in ("process", *(["ray"] if options.ray else []), *(["columns"] if options.columns else [])):
                child = ["--child", str(root / "catalog"), str(num_rows), where]
                command = [sys.executable, "-m", "benchmarks.planning", *child]
                ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                results.append(json.loads(ended.stdout))
                print(json.dumps(results[-1], indent=2), flush=True)
        finally:
            shutil.rmtree(root)
    save_result("planning", {"workload": __doc__.split("\n\n")[1], "shared_machine": options.shared, "runs": results})


if __name__ == "__main__":
    main()
