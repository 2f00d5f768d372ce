"""Catalogs for tests of the report: rows with every column that the page shows."""

from __future__ import annotations

import datetime as dt
import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from tests.search_samples import clustered, put
from vlmflow import schema
from vlmflow.catalog import Catalog
from vlmflow.catalog.keys import digest_of
from vlmflow.config import CatalogConfig


def label(name: str, score: float | None, decision: str, category: str = "weapons") -> dict[str, Any]:
    return {
        "label": name,
        "category": category,
        "score": score,
        "review_threshold": 0.5,
        "block_threshold": 0.9,
        "decision": decision,
    }


def labels_of(rows: Sequence[Sequence[Mapping[str, Any]]]) -> pa.Array:
    return pa.array([list(row) for row in rows], pa.list_(schema.LABEL))


def put_rows(
    config: CatalogConfig | Path, names: Sequence[str], *, run: str = "run-1", **columns: Sequence[Any]
) -> None:
    """Commits rows with small vectors; without a record of the run."""
    titles = columns.pop("title", [f"title of {name}" for name in names])
    given = {
        "caption": [f"caption of {name}" for name in names],
        "caption_itm": [0.75] * len(names),
        "text_itm": [0.5] * len(names),
        "text_digest": [digest_of(title) for title in titles],
        "source": [{"title": title} for title in titles],
        "policy_name": ["demo"] * len(names),
        "policy_version": ["1"] * len(names),
        "policy_digest": ["0" * 64] * len(names),
        **columns,
    }
    put(config, names, clustered(len(names)), run=run, **given)


def record(run: str, **given: Any) -> dict[str, Any]:
    """A run's record as `enrich` leaves it."""
    return {
        "run_id": run,
        "status": "done",
        "source": "photos/",
        "catalog": "catalog/",
        "profile": "starter",
        "tasks": ["embed", "match"],
        "date": "2026-03-01",
        "started_at": dt.datetime(2026, 3, 1, 2, tzinfo=dt.UTC).isoformat(),
        "finished_at": dt.datetime(2026, 3, 1, 2, 2, tzinfo=dt.UTC).isoformat(),
        "seconds": 100.0,
        "startup_s": 10.0,
        "num_added": 3,
        "statuses": {"ok": 2, "failed": 1},
        "decisions": {"allow": 2, "review": 1},
        "errors": {"truncated": 1},
        "stages": [
            {"stage": "read", "images": 3, "busy_s": 5.0, "images_per_busy_s": 0.6},
            {"stage": "decode", "images": 3, "busy_s": 60.0, "images_per_busy_s": 0.1},
            {"stage": "embed", "images": 3, "busy_s": 20.0, "images_per_busy_s": 0.2},
        ],
        "pools": [{"tasks": ["embed", "match"], "batches": 1, "busy_s": 30.0, "waiting_s": 60.0}],
        **given,
    }


def put_record(config: CatalogConfig, run: str, /, **given: Any) -> None:
    runs = Catalog.open(config).runs
    runs.start(run, record(run, **given))
    runs.finish(run, record(run, **given))


def put_pictures(folder: Path, count: int, *, side: int = 192) -> tuple[list[str], list[str]]:
    """Writes pictures of noise, which compress badly; gives their addresses and the hashes of their bytes."""
    random = np.random.default_rng(0)
    folder.mkdir()
    uris, hashes = [], []
    for number in range(count):
        sink = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (side, side, 3), np.uint8)).save(sink, "JPEG", quality=90)
        file = folder / f"{number:04d}.jpg"
        file.write_bytes(sink.getvalue())
        uris.append(str(file))
        hashes.append(hashlib.sha256(sink.getvalue()).hexdigest())
    return uris, hashes
