"""``vlmflow serve`` over a catalog of 1,000,000 rows: how long a person waits for each kind of page.

``python -m benchmarks.serve`` makes a catalog (real Parquet files, a real Delta log) of synthetic rows with 16 labels,
a caption and match scores each, in 20 nights of 50,000, whose pictures are those of the demo; starts the server as a
process of its own; and asks it over HTTP, one request after the other, each time for something else. Vectors have the
192 dimensions of the starter's embedder, so that text queries go all the way; they are clustered, as in
``benchmarks.search``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc

from benchmarks.machine import save_result
from benchmarks.planning import hexadecimal
from tests.catalog_samples import DATE, config_of
from vlmflow import schema
from vlmflow.catalog import Catalog
from vlmflow.catalog.columns import conform
from vlmflow.catalog.commit import Change, CommitRequest, commit
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.log import DataFile, TableLog
from vlmflow.catalog.writer import write_file

FILE_ROWS = 50_000
NUM_LABELS = 16
DIM = 192
TOKEN = "the-token-of-the-benchmark"
DEMO = Path("vlmflow/starter/demo").resolve()
ADJECTIVES = ("red", "blue", "small", "wooden", "shiny", "old", "striped", "green")
THINGS = ("dog", "bag", "chair", "bottle", "house", "car", "shoe", "lamp", "hat", "clock", "boat", "tree")


def add_rows(root: Path, num_rows: int) -> None:
    """Adds rows and their vectors, a file for every 50,000."""
    from vlmflow.search.query import QueryEncoder, search_job

    config, run = config_of(root), "base"
    model = QueryEncoder(search_job(config, "starter")).fingerprints[0]
    catalog = Catalog.open_or_create(config, pa.schema([("title", pa.string())]))
    catalog.runs.start(run, {"profile": "starter", "status": "done"})
    catalog.runs.finish(run, {"profile": "starter", "status": "done"})
    folder = Folder(config)
    logs = {name: TableLog.open(folder, name) for name in ("embeddings", "images")}  # type: ignore[arg-type]
    files: dict[str, list[DataFile]] = {name: [] for name in logs}
    pictures = [file for file in sorted(DEMO.glob("sku-*")) if file.suffix in (".jpg", ".png", ".webp")]
    for number, start in enumerate(range(0, num_rows, FILE_ROWS)):
        count = min(FILE_ROWS, num_rows - start)
        rows = image_rows(number, count, model, pictures, logs["images"].refresh().schema)
        files["images"].append(write_file(folder, "images", rows, rows["ingest_date"][0].as_py(), run))
        vectors = vector_rows(number, rows, model)
        files["embeddings"].append(write_file(folder, "embeddings", vectors, rows["ingest_date"][0].as_py(), run))
    for name, log in logs.items():
        request = CommitRequest(f"{run}-{name}", run, "benchmark", log.refresh().version)
        commit(log, request, lambda _, added=tuple(files[name]): Change(add=added))  # type: ignore[misc]


def image_rows(number: int, count: int, model: str, pictures: list[Path], columns: pa.Schema) -> pa.Table:
    """Rows of one night."""
    random = np.random.default_rng((number, 5))
    labels, worst = _labels(random, count)
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in pictures]
    which = pa.array(random.integers(0, len(pictures), count))
    words = [pa.array(group).take(pa.array(random.integers(0, len(group), count))) for group in (ADJECTIVES, THINGS)]
    caption = pc.binary_join_element_wise("a drawing of a", *words, "on a yellow ground", " ")
    constant = {
        "status": "ok", "format": "png", "mode": "RGB", "policy_name": "benchmark", "policy_version": "1",
        "policy_digest": "0" * 32, "run_id": "base", "embed_run_id": "base", "embed_fingerprint": model,
        "embed_model": "vlmflow/starter-clip@1", "caption_model": "vlmflow/starter-captioner@1", "decoder": "1",
        "object_version": "17a3c5e1f2b4d687-5b2f",
    }  # fmt: skip
    given: dict[str, Any] = {name: pa.repeat(value, count) for name, value in constant.items()}
    ids = hexadecimal((number, 0), count)
    given |= {
        "image_id": ids,
        "key": ids,
        "uri": pa.array([str(file) for file in pictures]).take(which),
        "content_hash": pa.array(hashes).take(which),
        "phash": pc.utf8_slice_codeunits(ids, 0, 16),
        "size_bytes": pa.array(random.integers(10_000, 500_000, count)),
        "width": pa.array(random.integers(200, 2_000, count), pa.int32()),
        "height": pa.array(random.integers(200, 2_000, count), pa.int32()),
        "caption": caption,
        "labels": labels,
        "decision": pa.array(["allow", "review", "block"]).take(pa.array(worst)),
        "decision_reason": pa.array([None, "things/label-03", "things/label-07"]).take(pa.array(worst)),
        "caption_itm": pa.array(random.random(count).astype(np.float32)),
        "text_itm": pa.array(random.random(count).astype(np.float32)),
        "ingest_date": pa.repeat(pa.scalar(DATE.replace(day=1 + number % 28), pa.date32()), count),
        "source": pa.StructArray.from_arrays([caption], ["title"]),
    }
    return conform(pa.table(given), columns)


def _labels(random: np.random.Generator, count: int) -> tuple[pa.Array, Any]:
    """(N,) lists of 16 labels each, and (N,) the worst decision as a number."""
    score = random.beta(0.4, 6.0, count * NUM_LABELS).astype(np.float32)
    decided = (score >= 0.5).astype(np.int64) + (score >= 0.7)
    names = pa.array([f"label-{number:02d}" for number in range(NUM_LABELS)])
    size = len(score)
    none = pa.nulls(size, pa.float32())
    values = {
        "label": pa.DictionaryArray.from_arrays(np.tile(np.arange(NUM_LABELS), count), names).cast(pa.string()),
        "category": pa.repeat("things", size), "margin": pa.array(score - 0.5), "score": pa.array(score),
        "probability": none, "review_threshold": pa.repeat(pa.scalar(0.5, pa.float32()), size),
        "block_threshold": pa.repeat(pa.scalar(0.7, pa.float32()), size),
        "decision": pa.array(["allow", "review", "block"]).take(pa.array(decided)),
        "view": pa.repeat("squash", size), "time_s": none, "detector": pa.nulls(size, pa.string()),
    }  # fmt: skip
    items = pa.StructArray.from_arrays([values[field.name] for field in schema.LABEL], fields=list(schema.LABEL))
    offsets = pa.array(np.arange(count + 1, dtype=np.int32) * NUM_LABELS)
    return pa.ListArray.from_arrays(offsets, items), decided.reshape(count, NUM_LABELS).max(axis=1)


def vector_rows(number: int, rows: pa.Table, model: str) -> pa.Table:
    """A vector for each row, clustered."""
    random = np.random.default_rng((number, 6))
    centres = np.random.default_rng(1).standard_normal((20_000, DIM)).astype(np.float32)
    count = rows.num_rows
    vectors = centres[random.integers(0, len(centres), count)] + 0.6 * random.standard_normal((count, DIM), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    flat = pa.array(vectors.ravel())
    given = {
        "image_id": rows["image_id"],
        "ingest_date": rows["ingest_date"],
        "embed_run_id": rows["embed_run_id"],
        "embed_fingerprint": pa.repeat(model, count),
        "view": pa.repeat("squash", count),
        "vector": pa.ListArray.from_arrays(pa.array(np.arange(count + 1, dtype=np.int32) * DIM), flat),
    }
    return conform(pa.table(given), schema.EMBEDDINGS)


class Client:
    """One browser, which asks one thing after the other."""

    def __init__(self, base: str) -> None:
        self._http = httpx.Client(base_url=base, headers={"Origin": base}, timeout=120)
        self._http.get("/enter", params={"token": TOKEN})
        found = re.search(r'name="csrf" content="([^"]+)"', self._http.get("/").text)
        assert found is not None
        self._http.headers["X-Vlmflow-Csrf"] = found[1]
        self.write("/reviewer", {"name": "ada"})

    def read(self, path: str) -> tuple[float, str]:
        started = time.perf_counter()
        answer = self._http.get(path)
        seconds = time.perf_counter() - started
        assert answer.status_code == 200, f"{path}: {answer.status_code} {answer.text[:500]}"
        return seconds, answer.text

    def write(self, path: str, body: dict[str, Any]) -> float:
        started = time.perf_counter()
        answer = self._http.post(path, json=body)
        seconds = time.perf_counter() - started
        assert answer.status_code == 200, answer.text[:500]
        return seconds


def ask(client: Client, count: int, words: Iterator[str]) -> dict[str, Any]:
    """Each kind of request ``count`` times, each time another one."""
    random = np.random.default_rng(7)
    times: dict[str, list[float]] = {}

    def note(kind: str, seconds: float) -> None:
        if kind not in times:
            print(kind, flush=True)
        times.setdefault(kind, []).append(seconds)

    address, ids = "/?sort=random", []
    for _ in range(count):  # page after page
        seconds, page = client.read(address)
        note("list page", seconds)
        ids += _ids(page)
        following = re.search(r'rel="next" href="([^"]+)"', page)
        assert following is not None
        address = unescape(following[1])
    for number in range(count):
        facets = [("decision", ("allow", "review", "block")[number % 3]), ("label", f"things/label-{number % 16:02d}")]
        facets += [("date", f"2026-03-{1 + number % 20:02d}")] if number % 2 else []
        facets += [("verdict", "nobody"), ("sort", ("near", "match", "new", "random")[number // 4 % 4])]
        note("facet change", client.read("/?" + urlencode(facets[: 2 + number // 48 % 3] + facets[-1:]))[0])
    for image_id in random.permutation(ids)[:count]:
        note("image page", client.read(f"/image/{image_id}")[0])
    for image_id in random.permutation(ids)[:count]:
        note("small picture", client.read(f"/picture/{image_id}")[0])
    for _ in range(count):
        note("search by text", client.read("/?" + urlencode([("q", next(words))]))[0])
    for image_id in random.permutation(ids)[: count // 4]:
        note("search by an image of the catalog", client.read(f"/?like={image_id}")[0])
    for number in range(count // 4):
        query = urlencode([("decision", "allow"), ("label", f"things/label-{number % 16:02d}"), ("q", next(words))])
        note("search by text among filtered rows", client.read(f"/?{query}")[0])
    for number in range(6):
        note("new condition in SQL", client.read("/?" + urlencode([("where", f"width > {300 + number}")]))[0])
    judge(client, count, note)
    return {kind: _percentiles(found) for kind, found in times.items()}


def judge(client: Client, count: int, note: Callable[[str, float], None]) -> None:
    """A reviewer at work: the next image of the queue, and a verdict on it. Rows are written meanwhile."""
    for number in range(count):
        seconds, page = client.read("/review?decision=review")
        note("next image of the queue, while rows are written", seconds)
        form = re.search(r'data-image="([^"]+)" data-hash="([^"]+)"', page)
        assert form is not None
        decision = ("allow", "block")[number % 2]
        body = {"image_id": form[1], "content_hash": form[2], "reviewer": "ada", "decision": decision}
        note("verdict", client.write("/verdict", body))


def phrases() -> Iterator[str]:
    """Texts, each another one."""
    number = 0
    while True:
        number += 1
        yield f"{ADJECTIVES[number % 8]} {THINGS[number // 8 % 12]} number {number}"


def _ids(page: str) -> list[str]:
    return re.findall(r'class="uri"><a href="/image/([0-9a-f]{32})"', page)


def _percentiles(times: list[float]) -> dict[str, Any]:
    found = {f"p{p}_ms": round(float(np.percentile(times, p)) * 1e3, 1) for p in (50, 99)}
    return {"requests": len(times), **found, "max_ms": round(max(times) * 1e3, 1)}


def measure(root: Path, count: int) -> dict[str, Any]:
    """Starts the server as a user does, asks, and ends it."""
    environment = os.environ | {"VLMFLOW_SERVE_TOKEN": TOKEN}
    command = [sys.executable, "-m", "vlmflow", "serve", str(root), "--port", "0"]
    started = time.perf_counter()
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert server.stdout is not None
    base = server.stdout.readline().split()[1].partition("/enter")[0]
    out: dict[str, Any] = {"seconds_to_start": round(time.perf_counter() - started, 1)}
    process, words = psutil.Process(server.pid), phrases()
    out["rss_at_start_mib"] = process.memory_info().rss // 2**20
    client = Client(base)
    out["first_list_page_ms"] = round(client.read("/")[0] * 1e3, 1)
    out["first_text_search_ms"] = round(client.read("/?" + urlencode([("q", next(words))]))[0] * 1e3, 1)
    out["requests"] = ask(client, count, words)
    out["rss_at_the_end_mib"] = process.memory_info().rss // 2**20
    ended = time.perf_counter()
    server.send_signal(signal.SIGINT)
    assert server.wait(300) == 0
    out["seconds_to_end"] = round(time.perf_counter() - ended, 1)
    judged = Catalog.open(config_of(root)).images(["verdict"])["verdict"]
    out["rows_with_a_verdict_afterwards"] = len(judged) - judged.null_count
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--requests", type=int, default=200, help="of each kind")
    parser.add_argument("--folder", type=Path, help="keep the catalog here, and take it if it is there")
    parser.add_argument("--shared", action="store_true", help="say that other work ran beside")
    options = parser.parse_args()
    root = (options.folder or Path(tempfile.mkdtemp(prefix="vlmflow-serve-"))) / "catalog"
    try:
        if not root.exists():
            add_rows(root, options.rows)
        from vlmflow.search.build import update_index

        update_index(config_of(root))
        result = measure(root, options.requests)
    finally:
        if not options.folder:
            shutil.rmtree(root.parent)
    print(json.dumps(result, indent=2))
    workload = {"rows": options.rows, "labels_a_row": NUM_LABELS, "dimensions": DIM, "requests": options.requests}
    save_result("serve", {"workload": workload, "shared_machine": options.shared, **result})


if __name__ == "__main__":
    main()
