"""What the command line says, and what it refuses before it opens a catalog."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest
from rich.console import Console

from tests.terminal import run
from vlmflow.engine.remoderate_report import RemoderateReport
from vlmflow.engine.report import PlanSummary, RunReport
from vlmflow.engine.sizing import PreflightReport
from vlmflow.errors import ExplainError
from vlmflow.explain import write_heatmap
from vlmflow.review import QueueReport
from vlmflow.views import print_plan, print_report
from vlmflow.views_moderation import print_queue, print_remoderation
from vlmflow.views_preflight import print_preflight


@pytest.mark.parametrize(("num_undetected", "is_all_done"), [(0, True), (209, False)])
def test_a_remoderation_that_waits_for_images_does_not_say_that_all_is_done(
    num_undetected: int, is_all_done: bool
) -> None:
    names = {"run_id": "r", "dry_run": True, "catalog": "c", "policy": "p 1", "policy_digest": "d"}
    counts = {"num_undetected": num_undetected, "detectors": ("opennsfw",)}
    report = RemoderateReport.model_validate(names | counts | {"started_at": dt.datetime.now(dt.UTC)})
    console = Console(record=True, width=200)
    print_remoderation(report, console)
    assert ("under it already" in (said := console.export_text())) == is_all_done
    assert ("opennsfw must see them first" in said) != is_all_done


def test_a_rollback_that_waits_for_images_names_the_policy_that_they_go_back_to() -> None:
    names = {"run_id": "r", "dry_run": True, "catalog": "c", "policy": "the one before", "policy_digest": ""}
    counts = {"num_undetected": 2, "detectors": ("opennsfw", "arms"), "rollback_of": "d", "policies": {"p 1 (abc)": 7}}
    counts |= {"runs_beside": {"night-1": "p 2 (def)"}}
    report = RemoderateReport.model_validate(names | counts | {"started_at": dt.datetime.now(dt.UTC)})
    console = Console(record=True, width=200)
    print_remoderation(report, console)
    said = " ".join(console.export_text().split())
    assert "policies: p 1 (abc) 7" in said
    assert "Run night-1 is at work under policy p 2 (def): rows that it commits from now on stay" in said
    assert "2 images keep theirs: opennsfw, arms must see them first" in said
    assert "`vlmflow enrich` with the policy that they go back to as --policy does that" in said


def test_a_preflight_says_that_start_up_comes_on_top() -> None:
    report = PreflightReport(
        num_due=215,
        num_sampled=64,
        read_images_per_s=1000,
        decode_images_per_s=1000,
        pools=(),
        images_per_s=900,
        hours=215 / 900 / 3600,
        limited_by="pool embed",
    )
    console = Console(record=True, width=200)
    print_preflight(report, console)
    said = " ".join(console.export_text().split())
    assert "215 images to do: about 1 s at 900.0 images/s, limited by pool embed; start-up comes on top" in said


def test_a_plan_counts_rows_that_get_new_columns_and_names_these() -> None:
    counts = {"num_listed": 9, "num_duplicates": 0, "num_new": 4, "num_due": 4, "num_planned": 4, "num_exhausted": 0}
    counts |= {"num_erased": 0, "num_policy_differs": 0, "num_unchanged": 5}
    for columns in ({"price": 3_000, "[title]": 1}, {}):
        console = Console(record=True, width=200)
        summary = PlanSummary(
            **counts, due={}, policy=None, num_outdated=3_000 if columns else 0, outdated_columns=columns
        )
        print_plan(summary, console)
        line = (
            "new values of the caller's columns, or another alternative text, for 3,000 rows on which no task will "
            "run: price 3,000, [title] 1"
        )
        assert (line in console.export_text()) == bool(columns)


def test_commands_to_go_on_with_can_be_copied() -> None:
    catalog = "/mnt/team share/catalogs/[2026] every picture of the shop/catalog"
    facts = {"run_id": "r", "status": "done", "source": "list.csv", "catalog": catalog, "profile": "starter"}
    facts |= {"tasks": ("embed",), "date": dt.date(2026, 3, 1), "started_at": dt.datetime.now(dt.UTC)}
    console = Console(record=True, width=50)
    print_report(RunReport.model_validate(facts | {"startup_s": 127.2, "waited_s": 30, "seconds": 173}), console)
    print_queue(QueueReport(catalog=catalog, output="my queue.csv", num_images=0, queues={}), console)
    said = console.export_text()
    assert f"vlmflow show '{catalog}'\n" in said
    assert f"vlmflow review import '{catalog}' 'my queue.csv'\n" in said
    assert "in 2 min 53 s, 30 s of waiting for other runs, 2 min 7 s of start-up" in " ".join(said.split())


@pytest.mark.parametrize("status", ["done", "nothing_due"])
def test_a_run_says_in_how_many_rows_it_updated_columns(status: str) -> None:
    facts = {"run_id": "r", "status": status, "source": "list.csv", "catalog": "c", "profile": "starter"}
    facts |= {"tasks": ("embed",), "date": dt.date(2026, 3, 1), "started_at": dt.datetime.now(dt.UTC)}
    for count in (0, 1_200):
        console = Console(record=True, width=200)
        print_report(RunReport.model_validate(facts | {"num_columns_updated": count}), console)
        said = "or alternative texts were updated in 1,200 rows on which no task ran" in console.export_text()
        assert said == bool(count)


@pytest.mark.parametrize("status", ["done", "nothing_due"])
def test_a_run_does_not_call_images_up_to_date_that_it_left_out(status: str) -> None:
    facts = {"run_id": "r", "status": status, "source": "list.csv", "catalog": "c", "profile": "starter"}
    facts |= {"tasks": ("embed",), "date": dt.date(2026, 3, 1), "started_at": dt.datetime.now(dt.UTC)}
    console = Console(record=True, width=200)
    left_out = {"num_listed": 6, "num_unchanged": 3, "num_exhausted": 2, "num_erased": 1}
    print_report(RunReport.model_validate(facts | left_out), console)
    said = console.export_text()
    assert "all 3" not in said
    assert "2 failed three times and are left alone; --retry failed,partial,missing tries them" in said
    assert "1 were erased from the catalog and are left out" in said
    print_report(RunReport.model_validate(facts | {"num_listed": 3, "num_doubled": 1}), console)
    assert "1 image with more than one row, which another program has written" in console.export_text()
    print_report(RunReport.model_validate(facts | {"num_listed": 3, "num_unchanged": 3}), console)
    said = console.export_text()
    assert "more than one row" not in said
    assert ("all 3 images of list.csv are up to date" in said) == (status == "nothing_due")
    assert "left" not in said


def test_a_run_says_how_many_images_their_servers_still_had() -> None:
    facts = {"run_id": "r", "status": "done", "source": "list.csv", "catalog": "c", "profile": "starter"}
    facts |= {"tasks": ("embed",), "date": dt.date(2026, 3, 1), "started_at": dt.datetime.now(dt.UTC)}
    for count, line in ((0, None), (1_200, "1,200 images not downloaded: unchanged, says the server")):
        console = Console(record=True, width=200)
        print_report(RunReport.model_validate(facts | {"num_unmodified": count}), console)
        said = console.export_text()
        assert line in said if line else "not downloaded" not in said


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["explain", "c", "a.jpg", "--label", "gun"], "--label gun is of a map, and --heatmap was not given"),
        (["explain", "c", "a.jpg", "--show-flagged"], "--show-flagged is of a map"),
        (["known", "add", "c", "list.txt", "--name", "x"], "neither --block nor --allow was given"),
        (["search", "c", "--build-index", "--where", "true", "--csv", "a.csv"], "--where, --csv without a query"),
        (["search", "c", "--build-index", "--html", "a.html"], "--html without a query"),
        (["search", "c", "a dog", "--show-flagged"], "--show-flagged without a page"),
    ],
)
def test_an_option_that_another_needs_is_named(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    assert named in capsys.readouterr().err


def test_a_map_is_png() -> None:
    with pytest.raises(ExplainError, match=r"why\.jpg: a map is written as PNG"):
        write_heatmap(None, None, Path("why.jpg"))  # type: ignore[arg-type]


def test_the_share_of_equal_bytes_is_of_what_was_run_whoever_committed_it() -> None:
    names = {"run_id": "r", "status": "done", "source": "s", "catalog": "c", "profile": "starter", "tasks": ("embed",)}
    counts = {"num_due": 215, "num_by_others": 215, "num_shared": 4}
    now = dt.datetime.now(dt.UTC)
    report = RunReport.model_validate(names | counts | {"date": now.date(), "started_at": now})
    console = Console(record=True, width=200)
    print_report(report, console)
    assert "4 from each other (1.9% not computed again)" in console.export_text()
