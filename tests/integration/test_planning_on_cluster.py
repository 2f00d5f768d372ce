"""Planning on Ray's workers gives what planning in one process gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.catalog_samples import enrich, fingerprints, open_catalog, references, request
from vlmflow.catalog import Catalog, PlanRequest, plan_without_catalog
from vlmflow.catalog.keys import to_binary
from vlmflow.catalog.plan import plan
from vlmflow.catalog.plan_parts import InProcess, Workers
from vlmflow.catalog.tombstones import Erased
from vlmflow.engine.planning import OnCluster
from vlmflow.errors import CatalogError, SourceError

pytestmark = pytest.mark.usefixtures("ray_session")

NAMES = [f"image {number}" for number in range(900)]


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    """A table of five files, some of whose rows are due again."""
    catalog = open_catalog(tmp_path / "catalog", pa.schema([("price", pa.int64())]))
    for number in range(5):
        batch = references(NAMES[number * 150 : (number + 1) * 150])
        enrich(catalog, f"r{number}", [batch if number % 2 else with_prices(batch)])
    return catalog


def listing() -> list[pa.RecordBatch]:
    rng = np.random.default_rng(0)
    order = rng.permutation(len(NAMES))
    changed = [NAMES[number] for number in order[:40]]
    names = [NAMES[number] for number in order[40:]]
    # Some are listed twice, and 150 are new.
    batches = [references(changed, version="v2"), references(names[:500]), references([*names[500:], *names[:7]])]
    return [with_prices(batch) for batch in batches]


def with_prices(batch: pa.RecordBatch) -> pa.RecordBatch:
    prices = [len(uri) for uri in batch["uri"].to_pylist()]
    source = pa.array([{"price": price} for price in prices], pa.struct([("price", pa.int64())]))
    return batch.append_column("source", source)


def outcome(catalog: Catalog, asked: PlanRequest, workers: Workers) -> dict[str, Any]:
    with catalog.plan(listing(), asked, workers) as made:
        rows = [row for table in made.batches(64) for row in table.to_pylist()]
        counts = {name: value for name, value in vars(made).items() if name.startswith(("num_", "counts", "outdated"))}
        outdated = [row for table in made.outdated() for row in table.to_pylist()]
    return {"rows": rows, "its": outdated, **counts}


@pytest.mark.parametrize(
    "kind", ["fingerprint", *(pytest.param(other, marks=pytest.mark.slow) for other in ("plain", "limit"))]
)
def test_both_plans_are_equal(kind: str, catalog: Catalog) -> None:
    other = request()
    if kind == "fingerprint":
        other = PlanRequest(
            tasks=other.tasks,
            fingerprints=fingerprints() | {"caption": "another"},
            policy_digest=other.policy_digest,
            decoder=other.decoder,
            date=other.date,
        )
    if kind == "limit":
        other = PlanRequest(**{**vars(other), "limit": 60})

    here, there = outcome(catalog, other, InProcess()), outcome(catalog, other, OnCluster(2))

    assert here == there
    assert here["num_duplicates"] == 7
    assert here["num_planned"] == {"plain": here["num_due"], "fingerprint": 900, "limit": 60}[kind]
    assert len(here["its"]) == here["num_outdated"] == here["outdated_columns"]["price"]
    assert (here["num_outdated"] > 200) == (kind != "fingerprint"), "rows of which the pipeline brings none along"
    if kind == "fingerprint":
        assert sum(row["previous_caption"] is not None for row in here["rows"]) == 750


@pytest.mark.slow
def test_erased_images_are_left_out(catalog: Catalog) -> None:
    erased = to_binary(pa.concat_tables([pa.Table.from_batches([references(NAMES[:20])])])["image_id"])
    snapshot = catalog._images.refresh()
    with plan(listing(), request(), catalog._folder, snapshot, Erased.of(erased), OnCluster(2)) as made:
        assert made.num_erased == 20


def test_without_a_catalog_everything_is_new() -> None:
    with plan_without_catalog(listing(), request(), OnCluster(2)) as made:
        assert (made.num_new, made.num_planned, made.num_duplicates) == (900, 900, 7)


def test_errors_of_a_worker_come_in_our_words(catalog: Catalog, tmp_path: Path) -> None:
    twice = references(NAMES[:1]).set_column(
        references(NAMES[:1]).schema.get_field_index("text"), "text", pa.array(["another text"])
    )
    with pytest.raises(SourceError, match="listed twice with different columns") as caught:
        catalog.plan([references(NAMES[:5]), twice], request(), OnCluster(2))
    assert "key" in caught.value.remedy
    next((tmp_path / "catalog" / "images").rglob("*.parquet")).unlink()
    with pytest.raises(CatalogError, match="is gone although the table refers to it"):
        catalog.plan(listing(), request(), OnCluster(2))
