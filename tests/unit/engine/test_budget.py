"""The error budget: bad images stop a run before its first commit, unless they were bad before."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from tests.catalog_samples import enrich, fingerprints, finish, open_catalog, references, request
from vlmflow.catalog import Catalog, PlanRequest
from vlmflow.engine.budget import BUDGET_ROWS, ErrorBudget, FreshRows
from vlmflow.errors import ErrorBudgetError

MISSING = ("read", "missing")
DEAD = [f"dead {number}" for number in range(6)]


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    made = open_catalog(tmp_path / "catalog")
    enrich(made, "r1", [references(DEAD, version=None)], problem=MISSING)
    enrich(made, "r1", [references(["good"])])
    return made


def tried(catalog: Catalog, names: list[str], asked: PlanRequest, version: str | None = None) -> tuple[int, FreshRows]:
    """What is planned of images that are all missing, and what of it counts."""
    with catalog.plan([references(names, version=version)], asked) as plan:
        rows = pa.concat_tables([finish(planned, problem=MISSING) for planned in plan.batches()])
        assert plan.num_fresh == FreshRows.of(rows).num_rows
        return plan.num_planned, FreshRows.of(rows)


def test_images_that_failed_before_do_not_count(catalog: Catalog) -> None:
    new = ["new 1", "new 2"]
    assert tried(catalog, [*DEAD, *new], request()) == (8, FreshRows(2, 2, {"missing": 2}))
    # Nor where they are tried for another reason: with other models, or because it was asked for.
    others = request(fingerprints=fingerprints(caption="caption-2"), retry=("missing",))
    assert tried(catalog, DEAD, others) == (6, FreshRows())
    # A good one that is gone counts, and one whose object is another now.
    assert tried(catalog, [*DEAD, "good"], request(), version="v2")[1].num_rows == 7


def test_a_failed_task_counts_and_what_is_only_noted_does_not(catalog: Catalog) -> None:
    with catalog.plan([references(["x", "y"])], request()) as plan:
        (planned,) = plan.batches()
    assert FreshRows.of(finish(planned, failed=["caption"])) == FreshRows(2, 2, {"task_failed": 2})
    assert FreshRows.of(finish(planned, unseen=True)) == FreshRows(2, 0, {})


def test_a_run_is_stopped_by_the_first_rows_that_count() -> None:
    budget = ErrorBudget(0.5, num_fresh=BUDGET_ROWS)
    budget.add(FreshRows(BUDGET_ROWS - 1, BUDGET_ROWS - 1, {"missing": BUDGET_ROWS - 1}))
    budget.check()
    assert not budget.is_kept
    budget.add(FreshRows(1, 0))
    with pytest.raises(ErrorBudgetError, match=r"999 of the first 1,000 images are bad \(missing 999\)"):
        budget.check()


def test_few_rows_that_count_are_no_reason_to_wait() -> None:
    assert ErrorBudget(0.5, num_fresh=BUDGET_ROWS - 1).is_kept
    assert ErrorBudget(1.0, num_fresh=BUDGET_ROWS).is_kept
