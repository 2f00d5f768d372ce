"""Search at scale: the index over N vectors of 512 dimensions, against comparing them all.

``python -m benchmarks.search`` makes a catalog (real Parquet files, a real Delta log) of 1,000,000 synthetic vectors
that are clustered as embeddings of generated scenes are, and measures building the index, queries with and without a
filter, recall@10 against exact search, and an incremental update of 10,000.

The vectors: a scene is drawn from 40,000, which are themselves sums of parts, as the scenes of the starter are: one of
60 places, two of 400 things and one of 40 looks, each part a direction of its own whose energy falls as 1/rank over
the 512 dimensions (about 60 of them matter); scenes are drawn with Zipf's frequencies (exponent 0.7). An image is its
scene, plus a direction that all images share (their mean cosine is about 0.4), plus noise of the same spectrum that
leaves two images of one scene at a cosine of about 0.9. Queries are new images of the same scenes, and texts: sums of
one or two parts without the shared direction. The filter keeps 20% of the images at random; the rare one 0.1%.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from benchmarks.machine import save_result
from benchmarks.planning import hexadecimal
from tests.catalog_samples import DATE, config_of
from vlmflow import schema
from vlmflow.catalog import Catalog
from vlmflow.catalog.columns import conform
from vlmflow.catalog.commit import Change, CommitRequest, commit
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.log import TableLog
from vlmflow.catalog.writer import write_file

DIM = 512
FILE_ROWS = 50_000
SCENES, PLACES, THINGS, LOOKS = 40_000, 60, 400, 40
MODEL = "benchmark-model"
FILTERS = {"none": None, "20%": "size_bytes % 5 = 0", "0.1%": "size_bytes % 1000 = 0"}


class Scenes:
    """Draws vectors; equal for equal seeds."""

    def __init__(self) -> None:
        random = np.random.default_rng(1)
        spectrum = 1.0 / np.sqrt(np.arange(1, DIM + 1))
        rotation = np.linalg.qr(random.standard_normal((DIM, DIM)))[0]
        self._mix = (spectrum[:, None] * rotation / np.linalg.norm(spectrum)).astype(np.float32)
        self._shared = random.standard_normal(DIM).astype(np.float32)
        self._shared /= np.linalg.norm(self._shared)
        self._places, self._things, self._looks = (self._parts(random, count) for count in (PLACES, THINGS, LOOKS))
        first, second = random.integers(0, THINGS, (2, SCENES))
        place, look = random.integers(0, PLACES, SCENES), random.integers(0, LOOKS, SCENES)
        sums = self._places[place] + self._things[first] + 0.7 * self._things[second] + 0.6 * self._looks[look]
        self._scenes = sums / np.linalg.norm(sums, axis=1, keepdims=True)
        odds = 1.0 / np.arange(1, SCENES + 1) ** 0.7
        self._odds = odds / odds.sum()

    def images(self, seed: int, count: int) -> NDArray[np.float32]:
        """(count, 512) unit vectors."""
        random = np.random.default_rng((seed, 7))
        chosen = random.choice(SCENES, count, p=self._odds)
        vectors = self._scenes[chosen] + 0.8 * self._shared
        vectors += 0.4 * random.standard_normal((count, DIM), np.float32) @ self._mix
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def texts(self, seed: int, count: int) -> NDArray[np.float32]:
        random = np.random.default_rng((seed, 8))
        vectors = self._things[random.integers(0, THINGS, count)].copy()
        with_place = random.random(count) < 0.5
        vectors[with_place] += self._places[random.integers(0, PLACES, int(with_place.sum()))]
        vectors += 0.2 * random.standard_normal((count, DIM), np.float32) @ self._mix
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def _parts(self, random: np.random.Generator, count: int) -> NDArray[np.float32]:
        parts = random.standard_normal((count, DIM), np.float32) @ self._mix
        return np.asarray(parts / np.linalg.norm(parts, axis=1, keepdims=True), np.float32)


def add_images(root: Path, first: int, count: int, run: str) -> None:
    """Adds rows and their vectors in files of 50,000, which is the size that compaction aims at."""
    config, scenes = config_of(root), Scenes()
    Catalog.open_or_create(config, pa.schema([]))
    folder = Folder(config)
    images, embeddings = [], []
    for start in range(first, first + count, FILE_ROWS):
        rows = min(FILE_ROWS, first + count - start)
        ids = hexadecimal((start, 0), rows)
        given = {"decision": "allow", "status": "ok", "run_id": run, "embed_run_id": run, "embed_fingerprint": MODEL}
        columns: dict[str, Any] = {name: pa.repeat(value, rows) for name, value in given.items()}
        columns |= {"image_id": ids, "uri": pa.compute.binary_join_element_wise("s3://shop/", ids, ".jpg", "")}
        columns["size_bytes"] = pa.array(np.arange(start, start + rows))
        columns["ingest_date"] = pa.repeat(pa.scalar(DATE, pa.date32()), rows)
        images.append(write_file(folder, "images", conform(pa.table(columns), schema.IMAGES), DATE, run))
        flat = pa.array(scenes.images(start, rows).ravel())
        vectors = pa.ListArray.from_arrays(pa.array(np.arange(rows + 1) * DIM, pa.int32()), flat)
        columns = {name: columns[name] for name in ("image_id", "embed_run_id", "embed_fingerprint", "ingest_date")}
        columns |= {"view": pa.repeat("squash", rows), "vector": vectors}
        embeddings.append(write_file(folder, "embeddings", conform(pa.table(columns), schema.EMBEDDINGS), DATE, run))
    for log, files in ((TableLog.open(folder, "embeddings"), embeddings), (TableLog.open(folder, "images"), images)):
        request = CommitRequest(f"{run}-{log.name}", run, "benchmark", log.refresh().version)
        commit(log, request, lambda _, files=tuple(files): Change(add=files))  # type: ignore[misc]


def build(root: Path) -> dict[str, Any]:
    """Updates the index, and measures this process."""
    import faiss

    from vlmflow.search.build import update_index

    report = update_index(config_of(root))
    size = sum(file.stat().st_size for file in (root / "indexes").rglob("*") if file.is_file())
    return {
        "seconds": round(report.seconds, 1),
        "num_added": report.num_added,
        "num_covered": report.num_covered,
        "num_segments": report.num_segments,
        "peak_rss_mib": _peak_mib(),
        "index_mib": size // 2**20,
        "threads": faiss.omp_get_max_threads(),
    }


def ask(root: Path, num_queries: int) -> dict[str, Any]:
    """Asks, and holds the answers against exact ones."""
    import faiss

    from vlmflow.search.searcher import Searcher

    started = time.perf_counter()
    searcher = Searcher(config_of(root))
    live = searcher.refresh()
    rows = live.of_models([MODEL])
    scenes = Scenes()
    out: dict[str, Any] = {
        "seconds_to_open": round(time.perf_counter() - started, 2),
        "threads": faiss.omp_get_max_threads(),
    }
    queries = {"image": scenes.images(10**9, num_queries), "text": scenes.texts(10**9, num_queries)}
    answers: dict[tuple[str, str], list[NDArray[np.int64]]] = {}
    for name, where in FILTERS.items():
        started = time.perf_counter()
        matching = rows if where is None else rows & live.mask(where)
        first_s = time.perf_counter() - started
        for kind, vectors in queries.items():
            times: list[float] = []
            for vector in vectors:
                started = time.perf_counter()
                found, num_indexed = searcher.nearest(vector, (MODEL,), matching, 10)
                live.take(found.positions, ("uri", "decision", "caption"))
                times.append(time.perf_counter() - started)
                answers.setdefault((name, kind), []).append(found.positions)
            out[f"filter {name}, {kind}"] = {
                "num_matching": int(matching.sum()),
                "num_in_the_index": num_indexed,
                "evaluating_the_condition_s": round(first_s, 3),
                **_percentiles(times[5:]),
            }
    out["peak_rss_mib"] = _peak_mib()
    started = time.perf_counter()
    truth = exact_answers(searcher, {name: None if w is None else live.mask(w) for name, w in FILTERS.items()}, queries)
    out["exact"] = {
        "seconds_for_all_queries_at_once": round(time.perf_counter() - started, 1),
        **_exact_times(root, queries["image"][:3], rows),
    }
    for (name, kind), found_lists in answers.items():
        expected = truth[name, kind]
        shares = [len(set(a.tolist()) & set(b.tolist())) / 10 for a, b in zip(found_lists, expected, strict=True)]
        out[f"filter {name}, {kind}"]["recall_at_10"] = round(float(np.mean(shares)), 4)
    return out


def exact_answers(searcher: Any, masks: dict[str, Any], queries: dict[str, NDArray[np.float32]]) -> dict[Any, Any]:
    """The ten nearest of every query and filter, by one pass over all stored vectors."""
    from vlmflow.search.exact import vector_blocks

    live, rows = searcher.refresh(), searcher.refresh().of_models([MODEL])
    best: dict[Any, tuple[NDArray[np.int64], NDArray[np.float32]]] = {}
    for positions, vectors in vector_blocks(searcher._folder, searcher._snapshot, live, rows):
        for kind, asked in queries.items():
            scores = asked @ vectors.T
            for name, mask in masks.items():
                keep = np.ones(len(positions), bool) if mask is None else mask[positions]
                part, where = scores[:, keep], positions[keep]
                top = np.argpartition(-part, min(10, part.shape[1] - 1), axis=1)[:, :10]
                found = where[top], np.take_along_axis(part, top, 1)
                if (name, kind) in best:
                    found = tuple(np.concatenate(pair, axis=1) for pair in zip(best[name, kind], found, strict=True))
                order = np.argsort(-found[1], axis=1)[:, :10]
                best[name, kind] = tuple(np.take_along_axis(each, order, 1) for each in found)  # type: ignore[assignment]
    return {key: list(value[0]) for key, value in best.items()}


def _exact_times(root: Path, queries: NDArray[np.float32], rows: NDArray[np.bool_]) -> dict[str, Any]:
    from vlmflow.search.searcher import Searcher

    searcher = Searcher(config_of(root), exact=True)
    searcher.refresh()
    times = []
    for vector in queries:
        started = time.perf_counter()
        searcher.nearest(vector, (MODEL,), rows, 10)
        times.append(time.perf_counter() - started)
    return {"seconds_of_one_query": round(min(times), 2)}


def _percentiles(times: list[float]) -> dict[str, float]:
    return {f"p{p}_ms": round(float(np.percentile(times, p)) * 1e3, 2) for p in (50, 99)}


def _peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def _in_a_process(name: str, *arguments: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.search", "--child", name, *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(name, json.dumps(result, indent=2), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--added", type=int, default=10_000)
    parser.add_argument("--queries", type=int, default=500, help="of each kind")
    parser.add_argument("--folder", type=Path, help="keep the catalog here, and take it if it is there")
    parser.add_argument("--shared", action="store_true", help="say that other work ran beside")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, root, *rest = options.child
        children: dict[str, Callable[..., dict[str, Any]]] = {"build": build, "ask": ask}
        print(json.dumps(children[name](Path(root), *map(int, rest))))
        return
    import faiss

    root = (options.folder or Path(tempfile.mkdtemp(prefix="vlmflow-search-"))) / "catalog"
    try:
        if not root.exists():
            add_images(root, 0, options.vectors, "base")
            print("catalog made", flush=True)
        results = {"build": _in_a_process("build", root), "queries": _in_a_process("ask", root, options.queries)}
        add_images(root, options.vectors, options.added, f"added-{time.time_ns()}")
        results["queries_before_the_update"] = _in_a_process("ask", root, 20) if options.added else {}
        results["update"] = _in_a_process("build", root)
        results["queries_after_the_update"] = _in_a_process("ask", root, options.queries)
    finally:
        if not options.folder:
            shutil.rmtree(root.parent)
    workload = {"vectors": options.vectors, "dimensions": DIM, "added": options.added, "queries": options.queries}
    description = (__doc__ or "").split("\n\n", 1)[1]
    versions = {"faiss": faiss.__version__, "shared_machine": options.shared}
    save_result("search", {"workload": workload, "vectors": description, **versions, **results})


if __name__ == "__main__":
    main()
