"""``vlmflow serve`` over a catalog of 1,000,000 rows: how long a person waits for each kind of page.

``python -m benchmarks.serve`` makes a catalog (real Parquet files, a real Delta log) of synthetic rows with 16 labels,
a caption and match scores each, in 20 nights of 50,000, whose pictures are those of the demo; starts the server as a
process of its own; and asks it over HTTP, one request after the other, each time for something else. Vectors have the
192 dimensions of the starter's embedder, so that text queries go all the way; they are clustered, as in
``benchmarks.search``.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

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
