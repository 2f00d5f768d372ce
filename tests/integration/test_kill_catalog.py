"""Killed with SIGKILL at chosen and at random points, a catalog ends up as if nothing had happened."""

from __future__ import annotations

import datetime as dt
import os
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests import kill
from tests.catalog_samples import enrich, open_catalog, references
from tests.s3 import S3Server
from vlmflow.catalog import Catalog
from vlmflow.catalog.runs import DEAD_AFTER
from vlmflow.config import CatalogConfig

VOLATILE = ["run_id", "read_at", "updated_at", "embed_run_id"]
NAMES = [f"image {number}" for number in range(100)]

Rows = dict[str, dict[str, Any]]


def prepared(config: CatalogConfig) -> Catalog:
    """A catalog that holds two thirds of the images, in several files."""

    catalog = Catalog.open_or_create(config, pa.schema([("price", pa.int64())]))
    for part in range(4):
        names = NAMES[part:66:4]
        enrich(catalog, f"before-{part}", [references(names, source=[{"price": -1}] * len(names))])
    return catalog


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a prepared catalog, for copies."""
    root = tmp_path_factory.mktemp("before") / "catalog"
    prepared(CatalogConfig(uri=str(root)))
    return root


def copied(before: Path, root: Path) -> Catalog:
    """A prepared catalog of a test's own; making each anew takes a second."""
    shutil.copytree(before, root)
    return open_catalog(root)


def rows_of(catalog: Catalog) -> Rows:
    rows = catalog.images().drop_columns(VOLATILE).to_pylist()
    found = {row["image_id"]: row for row in rows}
    assert len(found) == len(rows), "a key is in the table twice"
    return found


def vectors_of(catalog: Catalog) -> Counter[tuple[str, str, tuple[float, ...]]]:
    rows = catalog.embeddings(["image_id", "view", "vector"]).to_pylist()
    return Counter((row["image_id"], row["view"], tuple(row["vector"])) for row in rows)


@pytest.fixture(scope="module")
def undisturbed(
    before: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Rows, Counter[tuple[str, str, tuple[float, ...]]]]:
    catalog = copied(before, tmp_path_factory.mktemp("undisturbed") / "catalog")
    kill.work(CatalogConfig(uri=catalog.uri))
    rows = rows_of(catalog)
    assert {row["uri"]: row["source"]["price"] for row in rows.values()} == {
        f"mem://{name}": number for number, name in enumerate(NAMES)
    }
    return rows, vectors_of(catalog)


def let_all_die(root: Path) -> None:
    old = time.time() - DEAD_AFTER.total_seconds() - 5
    for lease in (root / "runs").glob("*.lease"):
        os.utime(lease, (old, old))


FAST = [
    ("in the commit, after it is written", 2),
    ("between the tables' commits", 3),
    ("in vacuum, half deleted", 1),
]
CHOSEN = [
    ("updating columns, before the commit", 1),
    ("in compaction, before its commit", 1),
    ("before a file", 1),
    ("before a file", 4),
    ("between file and commit", 1),
    ("between file and commit", 6),
    ("rewriting a live file", 1),
    ("rewriting a live file", 5),
    ("in the commit, before it is written", 1),
    ("in the commit, before it is written", 8),
    ("in the commit, after it is written", 1),
    ("in the commit, after it is written", 9),
    ("between the tables' commits", 1),
    ("between commits", 1),
    ("between commits", 5),
    ("updating columns, before the commit", 3),
    ("updating columns, after the commit", 1),
    ("in compaction, before its commit", 2),
    ("in compaction, after its commit", 1),
    ("in compaction, after its commit", 2),
    ("in vacuum, after revoking", 1),
    *(("at random", seed) for seed in range(10)),
]


@pytest.mark.parametrize(
    ("point", "number"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in CHOSEN)]
)
def test_after_a_kill_the_same_work_ends_as_if_nothing_had_happened(
    before: Path,
    tmp_path: Path,
    undisturbed: tuple[Rows, Counter[tuple[str, str, tuple[float, ...]]]],
    point: str,
    number: int,
) -> None:
    root = tmp_path / "catalog"
    catalog = copied(before, root)
    if point.startswith("in vacuum"):
        # Something for it to do: the leftovers of another run that was killed.
        assert kill.run("between file and commit", 3, "catalog", str(root)).returncode == -signal.SIGKILL
        let_all_die(root)

    killed = kill.run(point, number, "catalog", str(root))

    assert killed.returncode == (-signal.SIGKILL if point != "at random" else killed.returncode), killed.stderr
    let_all_die(root)
    kill.work(CatalogConfig(uri=str(root)))
    expected_rows, expected_vectors = undisturbed
    assert rows_of(catalog) == expected_rows
    assert vectors_of(catalog) == expected_vectors
    versions = {name: "v2" if index % 3 else "v1" for index, name in enumerate(NAMES)}
    catalog.vacuum(retention=dt.timedelta())
    assert catalog.verify([references(NAMES, version=versions)], {}).findings == {}


@pytest.mark.slow
@pytest.mark.parametrize("point", ["in the commit, after it is written", "between the tables' commits"])
def test_on_a_store(
    s3_server: S3Server,
    undisturbed: tuple[Rows, Counter[tuple[str, str, tuple[float, ...]]]],
    point: str,
) -> None:
    config = CatalogConfig(uri=f"s3://{s3_server.make_bucket()}/catalog", storage=s3_server.storage)
    catalog = prepared(config)
    for number in (1, 2):
        assert kill.run(point, number, "catalog", config.uri, s3_server.endpoint).returncode == -signal.SIGKILL
    kill.work(config)
    assert (rows_of(catalog), vectors_of(catalog)) == undisturbed


def test_killed_again_and_again_it_gets_there(
    before: Path, tmp_path: Path, undisturbed: tuple[Rows, Counter[tuple[str, str, tuple[float, ...]]]]
) -> None:
    root = tmp_path / "catalog"
    catalog = copied(before, root)
    for _ in range(2):
        assert kill.run("between commits", 2, "catalog", str(root)).returncode == -signal.SIGKILL
    assert open_catalog(root).version == 8, "each attempt has gone on from the last"
    kill.work(CatalogConfig(uri=str(root)))
    assert (rows_of(catalog), vectors_of(catalog)) == undisturbed
