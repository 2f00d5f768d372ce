"""What the page says limited a run."""

from __future__ import annotations

from typing import Any

import pytest

from tests.report_samples import record
from vlmflow.engine.limits import what_limited
from vlmflow.engine.report import RunReport


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "Decoding. The busiest pool, embed+match, waited 67% of its time"),
        ({"startup_s": 80.0}, "Start-up: 1 min 20 s of 1 min 40 s"),
        ({"waited_s": 30.0}, "Other runs: 30 s of 1 min 40 s went by until"),
        ({"pools": []}, ""),
        (
            {"pools": [{"tasks": ["embed", "match"], "batches": 1, "busy_s": 95.0, "waiting_s": 5.0}]},
            "The models. Pool embed+match was busy 95% of its time, most of it with embed",
        ),
        (
            {
                "pools": [{"tasks": ["embed", "match"], "batches": 1, "busy_s": 95.0, "waiting_s": 5.0}],
                "stages": [
                    {"stage": "embed", "images": 3, "busy_s": 80.0, "images_per_busy_s": 0.1, "share_of_ceiling": 0.61}
                ],
            },
            "The models. Pool embed+match was busy 95% of its time, most of it with embed (1 min 20 s, at 61% of the",
        ),
        (
            {"stages": [{"stage": "feed", "images": 3, "busy_s": 50.0, "images_per_busy_s": 0.1}]},
            "Decoding in the pools. The busiest pool",
        ),
        (
            {"stages": [{"stage": "read", "images": 1, "busy_s": 9.0, "images_per_busy_s": 1.0}]},
            "Reading the images. The busiest pool",
        ),
    ],
)
def test_what_limited_the_run_is_said_with_figures(given: dict[str, Any], said: str) -> None:
    found = what_limited(RunReport.model_validate(record("r", **given)))
    assert found.startswith(said)
    assert bool(found) == bool(said)


def test_a_pool_that_waits_for_its_endpoint_gains_nothing_from_faster_devices() -> None:
    pools = [{"tasks": ["embed", "caption"], "batches": 1, "busy_s": 95.0, "waiting_s": 5.0}]
    spent = {"requests": 3, "input_tokens": 0, "output_tokens": 0, "cost": 0.0}
    stages = [{"stage": "caption", "images": 3, "busy_s": 80.0, "images_per_busy_s": 0.1}]
    for usage in ({}, {"caption": spent}):
        found = what_limited(RunReport.model_validate(record("r", pools=pools, stages=stages, usage=usage)))
        assert "most of it with caption (1 min 20 s)" in found
        assert ("More or faster devices" in found) == (not usage)
        assert ("endpoint.max_concurrency" in found) == bool(usage)
