"""Catalogs for tests of search: rows with vectors of our choice, written as a run writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tests.catalog_samples import DATE, config_of, image_id
from vlmflow import schema
from vlmflow.catalog import Catalog
from vlmflow.catalog.columns import conform
from vlmflow.catalog.commit import Change, CommitRequest, commit
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.log import DataFile, TableLog
from vlmflow.catalog.writer import write_file
from vlmflow.config import CatalogConfig

MODEL = "model-1"


def unit(vectors: NDArray[Any]) -> NDArray[np.float32]:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True), np.float32)


def clustered(count: int, *, seed: int = 0, dim: int = 16, centres: int = 40) -> NDArray[np.float32]:
    random = np.random.default_rng(seed)
    centre = np.random.default_rng(99).standard_normal((centres, dim))
    return unit(centre[random.integers(0, centres, count)] + 0.3 * random.standard_normal((count, dim)))


def names(count: int, start: int = 0) -> list[str]:
    return [f"i{number:05d}" for number in range(start, start + count)]


def put(
    config: CatalogConfig | Path,
    images: Sequence[str],
    vectors: NDArray[np.float32],
    *,
    run: str = "r0",
    model: str = MODEL,
    view: str = "squash",
    with_rows: bool = True,
    replace: bool = False,
    **columns: Sequence[Any],
) -> None:
    """Commits one file of vectors and one of rows.

    Args:
        with_rows: else vectors alone, as a killed run leaves them.
        replace: all live rows go.
        columns: of the images table, one value per image; others are filled in.
    """
    config = config if isinstance(config, CatalogConfig) else config_of(config)
    source = columns.get("source")
    wanted = pa.schema([]) if source is None else pa.schema([(name, pa.string()) for name in source[0]])
    Catalog.open_or_create(config, wanted)
    folder, count = Folder(config), len(images)
    ids = [image_id(name) for name in images]
    given: dict[str, Any] = {
        "image_id": ids,
        "uri": [f"mem://{name}" for name in images],
        "status": ["ok"] * count,
        "decision": ["allow"] * count,
        "run_id": [run] * count,
        "embed_run_id": [run] * count,
        "embed_fingerprint": [model] * count,
        "embed_model": [f"clip-of-{model}@1"] * count,
        "content_hash": [f"hash of {name} {run}" for name in images],
        "ingest_date": pa.array([DATE] * count, pa.date32()),
        **columns,
    }
    stored: dict[str, Any] = {"image_id": ids, "ingest_date": given["ingest_date"]}
    stored |= {"embed_run_id": [run] * count, "embed_fingerprint": [model] * count}
    stored |= {"view": [view] * count, "vector": pa.array(list(vectors), pa.list_(pa.float32()))}
    file = write_file(folder, "embeddings", conform(pa.table(stored), schema.EMBEDDINGS), DATE, run)
    _commit(TableLog.open(folder, "embeddings"), run, [file], replace=False)
    if with_rows:
        log = TableLog.open(folder, "images")
        rows = conform(pa.table(given), log.refresh().schema)
        _commit(log, run, [write_file(folder, "images", rows, DATE, run)], replace=replace)


def _commit(log: TableLog, run: str, files: list[DataFile], *, replace: bool) -> None:
    request = CommitRequest(f"{log.name}-{files[0].path}", run, "test", log.refresh().version)
    commit(
        log,
        request,
        lambda snapshot: Change(add=tuple(files), remove=tuple(snapshot.files.values()) if replace else ()),
    )


def found(result: Any) -> list[str]:
    """The names of the images that were found, in order."""
    return [hit.uri.removeprefix("mem://") for hit in result.hits]


def nearest(images: Sequence[str], vectors: NDArray[np.float32], query: NDArray[np.float32], top_k: int) -> list[str]:
    """The same by a plain product and sort."""
    return [images[row] for row in np.argsort(-(vectors @ query), kind="stable")[:top_k].tolist()]


def recall(ours: Mapping[int, list[str]], theirs: Mapping[int, list[str]]) -> float:
    return float(np.mean([len(set(ours[key]) & set(theirs[key])) / len(theirs[key]) for key in theirs]))
