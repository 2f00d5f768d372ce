"""Several processes change one catalog at once. Spawned, never forked: deltalake does not survive a fork."""

from __future__ import annotations

import multiprocessing
import random
from collections import Counter
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pyarrow as pa

from tests.catalog_samples import constants, enrich, finish, open_catalog, references, request, rows_by_name
from vlmflow import schema
from vlmflow.catalog import Catalog
from vlmflow.config import CatalogConfig

NAMES = [f"image {number}" for number in range(120)]
OLD, NEW = NAMES[:60], NAMES[60:]
CHUNK = 10

spawn = multiprocessing.get_context("spawn")


def write_all(config: CatalogConfig, run_id: str, barrier: Barrier) -> None:
    """Plans everything, then replaces half of it and adds the other half, in commits of a few rows."""
    catalog = Catalog.open(config)
    asked = request()
    versions = dict.fromkeys(OLD, "v2") | dict.fromkeys(NEW, "v1")
    with catalog.plan([references(NAMES, version=versions)], asked) as plan:
        writer = catalog.writer(constants(run_id, asked), plan.version)
        batches = list(plan.batches(CHUNK))
        random.Random(run_id).shuffle(batches)
        barrier.wait()
        for planned in batches:
            rows = finish(planned, content="new", caption="new")
            catalog.commit(run_id, pa.concat_tables([schema.DESCRIPTOR.empty_table(), writer.write(rows)]))


def compact_all(config: CatalogConfig, run_id: str, barrier: Barrier) -> None:
    """Compacts again and again."""
    catalog = Catalog.open(config)
    barrier.wait()
    for number in range(8):
        catalog.compact(f"{run_id}-{number}")


def create(config: CatalogConfig, run_id: str, barrier: Barrier) -> None:
    """Creates the catalog, with a column of its own, and adds a few images."""
    barrier.wait()
    catalog = Catalog.open_or_create(config, pa.schema([(f"of_{run_id}", pa.string())]))
    enrich(catalog, run_id, [references(NAMES[:20], source=[{f"of_{run_id}": "x"}] * 20)])


def run_together(work: list[tuple[object, str]], config: CatalogConfig) -> None:
    barrier = spawn.Barrier(len(work), timeout=300)  # one that dies before it must not keep the others for ever
    processes = [spawn.Process(target=target, args=(config, name, barrier), daemon=True) for target, name in work]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=600)
        assert [process.exitcode for process in processes] == [0] * len(work)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()


def check_every_image_is_there_once(catalog: Catalog, names: list[str]) -> None:
    assert sorted(rows_by_name(catalog)) == sorted(names)
    vectors = Counter(zip(*catalog.embeddings(["image_id", "view"]).to_pydict().values(), strict=True))
    assert len(vectors) == 2 * len(names)
    assert set(vectors.values()) == {1}


def test_two_runs_and_a_compaction_leave_every_key_once(config: CatalogConfig) -> None:
    catalog = Catalog.open_or_create(config, pa.schema([]))
    for number in range(4):
        enrich(catalog, f"r{number}", [references(OLD[number::4])])
    run_together([(write_all, "one"), (write_all, "two"), (compact_all, "three")], config)
    check_every_image_is_there_once(catalog, NAMES)
    rows = rows_by_name(catalog).values()
    assert {(row["caption"], row["status"], row["decision"]) for row in rows} == {("new", "ok", "allow")}
    assert {row["run_id"] for row in rows} <= {"one", "two"}


def test_two_runs_create_the_catalog_at_once(tmp_path: Path) -> None:
    config = CatalogConfig(uri=str(tmp_path / "catalog"))
    run_together([(create, "one"), (create, "two"), (create, "three")], config)
    catalog = open_catalog(config.uri)
    check_every_image_is_there_once(catalog, NAMES[:20])
    assert sorted(catalog.source_columns.names) == ["of_one", "of_three", "of_two"]
