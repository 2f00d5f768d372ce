"""Which rows are due because a policy reads scores of detectors that they lack, or because a detector failed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.catalog_samples import enrich, fingerprints, open_catalog, references, request, rows_by_name
from vlmflow.catalog import Catalog, PlanRequest
from vlmflow.catalog.detections import Detection

NAMES = ["a", "b"]
TASKS = ("embed", "detect", "moderate")
PORN, HENTAI = Detection("nsfw", "model-1", "porn"), Detection("nsfw", "model-1", "hentai")


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return open_catalog(tmp_path)


def asked(*detections: Detection, **given: object) -> PlanRequest:
    return request(TASKS, detections=detections, **given)


def run(catalog: Catalog, run_id: str, wanted: PlanRequest, **given: object) -> None:
    enrich(catalog, run_id, [references(NAMES)], wanted, detections=wanted.detections, **given)


def reasons(catalog: Catalog, wanted: PlanRequest) -> dict[str, str]:
    """Why the tasks are due, all on both images."""
    with catalog.plan([references(NAMES)], wanted) as plan:
        assert set(plan.counts.values()) <= {2}
        return dict(plan.counts)


DUE = {("detect", "undetected"), ("moderate", "needed"), ("embed", "needed")}


def test_a_policy_that_reads_what_rows_hold_makes_nothing_due(catalog: Catalog) -> None:
    run(catalog, "r1", asked(PORN, HENTAI))
    assert reasons(catalog, asked(PORN, HENTAI)) == {}
    assert reasons(catalog, asked(HENTAI, policy="policy-2")) == {}, "less than they hold"
    assert reasons(catalog, request(("embed", "moderate"), policy="policy-2")) == {}, "no detector"


def test_another_output_of_a_detector_makes_its_rows_due_once(catalog: Catalog) -> None:
    run(catalog, "r1", asked(PORN))
    both = asked(PORN, HENTAI, policy="policy-2")
    assert reasons(catalog, both).keys() == DUE
    run(catalog, "r2", both)
    assert {row["policy_digest"] for row in rows_by_name(catalog).values()} == {"policy-2"}
    assert reasons(catalog, both) == {}


def test_another_name_of_a_detector_makes_its_rows_due(catalog: Catalog) -> None:
    run(catalog, "r1", asked(PORN))
    assert reasons(catalog, asked(PORN._replace(detector="adult"))).keys() == DUE
    other = Detection("other", "model-2", "porn")
    run(catalog, "r2", asked(PORN, other))
    swapped = (PORN._replace(detector="other"), other._replace(detector="nsfw"))
    assert reasons(catalog, asked(*swapped)).keys() == DUE


def test_a_detector_that_failed_is_tried_again_though_its_earlier_scores_stay(catalog: Catalog) -> None:
    run(catalog, "r1", asked(PORN))
    rescored = asked(PORN, fingerprints=fingerprints(TASKS, moderate="moderate-2"))
    for attempt in range(1, 4):
        run(catalog, f"r{attempt + 1}", rescored, failed=["detect"], decision="review")
        (row, _) = rows_by_name(catalog).values()
        assert (row["status"], row["decision"], row["attempts"]) == ("partial", "review", attempt)
        assert row["detections"] is not None
        retried = {("detect", "retry"), ("moderate", "needed"), ("embed", "needed")}
        assert reasons(catalog, rescored).keys() == (retried if attempt < 3 else set())
    asked_for = dataclasses.replace(rescored, retry=("partial",))
    assert reasons(catalog, asked_for).keys() == retried
    run(catalog, "r5", asked_for)
    assert {row["status"] for row in rows_by_name(catalog).values()} == {"ok"}
    assert reasons(catalog, rescored) == {}


def test_scores_of_fewer_views_do_not_stay_beside_vectors_of_more(catalog: Catalog) -> None:
    run(catalog, "r1", asked(PORN))
    without = ("embed", "moderate")
    run(catalog, "r2", request(without, fingerprints=fingerprints(without, moderate="moderate-2"), policy="policy-2"))
    (row, _) = rows_by_name(catalog).values()
    assert (len(row["detections"]), row["detect_fingerprint"]) == (1, "detect-1"), "equal vectors"
    wider = {"embed": "embed-2", "moderate": "moderate-3"}
    run(catalog, "r3", request(without, fingerprints=fingerprints(without, **wider), policy="policy-2"))
    (row, _) = rows_by_name(catalog).values()
    assert (row["detections"], row["detect_fingerprint"], row["status"]) == (None, None, "ok")

    run(catalog, "r4", asked(PORN))
    run(catalog, "r5", asked(PORN, fingerprints=fingerprints(TASKS, **wider)), failed=["detect"], decision="review")
    (row, _) = rows_by_name(catalog).values()
    assert (row["detections"], row["detect_fingerprint"], row["status"]) == (None, None, "partial")
