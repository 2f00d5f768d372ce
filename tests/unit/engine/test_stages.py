"""What the record of a run says of its stages, from the sums over its rows."""

from __future__ import annotations

import datetime as dt
from collections import Counter

import pytest

from vlmflow.engine.collect import Collected
from vlmflow.engine.report import CommitReport, RunReport, finished_report
from vlmflow.engine.stages import pool_reports, stage_reports


def collected() -> Collected:
    """100 images: 4 s of reading, 20 s of decoding; a pool at work for 40 s that waited 10 s, half of it embedding."""
    sums: Counter[str] = Counter()
    sums.update({"seconds_read": 4.0, "seconds_decode": 20.0, "seconds_feed:embed+caption": 5.0})
    sums.update({"seconds_busy:embed+caption": 40.0, "seconds_waiting:embed+caption": 10.0})
    sums.update(
        {"batches_embed+caption": 4.0, "refused_embed+caption": 2.0, "seconds_embed": 20.0, "seconds_caption": 18.0}
    )
    # 40 TFLOP in 20 s; a ceiling of 8 TFLOP/s on the 60 rows behind its measurement.
    sums.update({"flops_embed": 40e12, "ceiling_embed": 60 * 8e12, "count_ceiling_embed": 60.0})
    sums.update({"flops_caption": 9e12, "ceiling_caption": 0.0, "count_ceiling_caption": 0.0})
    return Collected(sums=sums, worked=Counter({"embed": 100, "caption": 90}), num_rows=100)


def test_stages_say_how_their_time_went_and_what_the_models_reached() -> None:
    stages = {stage.stage: stage for stage in stage_reports(("embed", "caption"), collected(), cpu_s=80.0)}
    assert list(stages) == ["read", "decode", "feed", "embed", "caption"]
    assert stages["decode"].images_per_busy_s == 5.0
    assert stages["decode"].busy_share == 0.25
    assert stages["feed"].busy_share == pytest.approx(0.1)
    embed = stages["embed"]
    assert (embed.busy_share, embed.waiting_share) == (0.4, 0.2)
    assert embed.tflops_per_s == pytest.approx(2.0)
    assert embed.share_of_ceiling == pytest.approx(0.25)
    assert stages["caption"].images_per_busy_s == 5.0
    assert stages["caption"].tflops_per_s == pytest.approx(0.5)
    assert stages["caption"].share_of_ceiling is None, "its ceiling was not measured"


def test_what_was_read_in_the_start_up_alone_has_no_share_of_the_time_after_it() -> None:
    facts = {"run_id": "r", "status": "running", "source": "a", "catalog": "c", "profile": "starter"}
    facts |= {"tasks": ("embed",), "date": dt.date(2026, 3, 1), "started_at": dt.datetime.now(dt.UTC)}
    found = collected()
    found.commits.append(CommitReport(rows=100, at_s=1.0, seconds=0.1))
    for num_first, share in ((100, None), (50, 1.0)):
        report = finished_report(
            RunReport.model_validate(facts),
            found,
            "done",
            "",
            seconds=72.0,
            startup_s=40.0,
            waited_s=30.0,
            num_first=num_first,
            num_cpus=2.0,
        )
        stages = {stage.stage: stage for stage in report.stages}
        assert stages["decode"].busy_share == share
        assert stages["embed"].busy_share == 0.4


def test_nothing_is_said_of_what_did_nothing() -> None:
    assert stage_reports(("embed",), Collected(), cpu_s=0.0) == ()
    assert pool_reports(Collected()) == ()


def test_pools_keep_their_figures() -> None:
    (pool,) = pool_reports(collected())
    assert (pool.tasks, pool.batches, pool.busy_s, pool.waiting_s) == (("embed", "caption"), 4, 40.0, 10.0)
    assert pool.num_refused == 2
