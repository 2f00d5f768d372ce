"""What the flows show: strings from outside as text, flagged images as links and blurred pictures."""

from __future__ import annotations

import datetime as dt
import json
import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from pipelines import artifacts
from pipelines.artifacts import MAX_EXAMPLES, code, link, plain
from tests.hostile import HOSTILE
from vlmflow.catalog import Verification
from vlmflow.catalog.verify import Finding
from vlmflow.checks import Check
from vlmflow.config import CatalogConfig, Job, SourceConfig
from vlmflow.engine import PlanSummary, RunReport
from vlmflow.engine.remoderate_report import RemoderateReport
from vlmflow.gate import GateReport
from vlmflow.report.rows import Row
from vlmflow.search.results import Hit
from vlmflow.search.thumbnails import Thumbnail

NOW = dt.datetime(2026, 11, 1, tzinfo=dt.UTC)
JOB = Job(source=SourceConfig(uri="/photos"), catalog=CatalogConfig(uri="/catalog"), profile="starter")


class Shown:
    """What was made into an artifact, the last of its kind."""

    markdown: str
    rows: list[dict[str, Any]]
    url: str
    description: str


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Shown:
    kept = Shown()

    def markdown(text: str, *, key: str, description: str) -> None:
        assert re.fullmatch(r"[a-z0-9-]+", key)
        json.dumps([text, description]).encode("utf-8")
        text.encode("utf-8")
        kept.markdown, kept.description = text, description

    def table(rows: list[dict[str, Any]], *, key: str, description: str) -> None:
        json.dumps(rows, ensure_ascii=False, allow_nan=False).encode("utf-8")
        kept.rows, kept.description = rows, description

    def link(url: str, *, link_text: str, key: str, description: str) -> None:
        kept.url, kept.description = url, description

    monkeypatch.setattr(artifacts, "create_markdown_artifact", markdown)
    monkeypatch.setattr(artifacts, "create_table_artifact", table)
    monkeypatch.setattr(artifacts, "create_link_artifact", link)
    return kept


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_string_from_outside_is_one_code_span(text: str) -> None:
    span = code(text)
    assert re.fullmatch(r"`[^`|<>\n\r]+`", span)
    assert len(span) <= 162
    assert all(character.isprintable() for character in span)
    span.encode("utf-8")


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_an_address_is_followed_only_on_the_web_and_stays_within_its_link(text: str) -> None:
    for uri in (text, f"https://host/{text}.png", f"s3://bucket/{text}"):
        found = link(uri)
        if not uri.startswith(("http://", "https://")):
            assert found == code(uri)
            continue
        matched = re.fullmatch(r"\[`[^`|<>\n]+`\]\((https?://[^\s()<>\"'`|\\]*)\)", found)
        assert matched, found


def test_an_address_with_brackets_ends_where_it_ends() -> None:
    assert link("https://host/a](javascript:alert(1)).png") == (
        "[`a](javascript:alert(1)).png`](https://host/a%5D%28javascript:alert%281%29%29.png)"
    )


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_cells_are_short_and_printable(shown: Shown, text: str) -> None:
    artifacts.show_checks("doctor", [Check(text, "fail", text, text)])
    cells = shown.rows[0].values()
    assert all(len(cell) <= 400 and cell.isprintable() for cell in cells)
    found = Verification(1, 0, findings={"missing": Finding(1, [text]), "stale": Finding(1, [])})
    artifacts.show_verification("verify", found)
    assert shown.rows[2]["example"] == plain(text)
    assert shown.rows[2]["kind"] == "error"
    assert shown.description == "The catalog is not sound."


def show_flagged(
    monkeypatch: pytest.MonkeyPatch, count: int, thumbnails: list[Thumbnail], uri: str = "https://host/a.png"
) -> int:
    asked: dict[str, Any] = {}

    def make(hits: Any, catalog: CatalogConfig, **options: Any) -> list[Thumbnail]:
        asked.update(options)
        return thumbnails

    hit = Hit(rank=1, score=1, image_id="i", uri=uri, status="ok", decision="block", decision_reason="gun: 0.9 >= 0.8",
              ingest_date="2026-11-01")  # fmt: skip
    rows = [Row(hit, None, None, None, None, None, (), ()) for _ in thumbnails]
    monkeypatch.setattr(artifacts, "newly_flagged", lambda *_: (count, rows))
    monkeypatch.setattr(artifacts, "make_thumbnails", make)
    found = artifacts.show_flagged("flagged", JOB, "run")
    assert asked == ({"job": JOB} if count else {}), "nobody asked to see flagged images"
    return found


def test_flagged_images_are_links_and_blurred(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [
        Thumbnail("data:image/jpeg;base64,BLURRED", is_blurred=True),
        Thumbnail("data:image/jpeg;base64,CLEAR", is_blurred=False),
        Thumbnail(None, "the image has changed since it was enriched"),
    ]
    assert show_flagged(monkeypatch, 1234, pictures) == 1234
    assert "# 1,234 newly flagged" in shown.markdown
    assert shown.markdown.count("BLURRED") == 1
    assert "CLEAR" not in shown.markdown
    assert "`the image has changed since it was enriched`" in shown.markdown
    assert "[`a.png`](https://host/a.png)" in shown.markdown
    assert show_flagged(monkeypatch, 0, []) == 0


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_name_keeps_the_table_whole(shown: Shown, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    show_flagged(monkeypatch, 1, [Thumbnail(None, text)], f"https://host/{text}")
    *_, line = shown.markdown.splitlines()
    assert line.count("|") == 5
    assert "<" not in line


def test_a_closed_gate_says_why_and_what_to_do(shown: Shown) -> None:
    report = GateReport(num_images=4, problems=("3 decisions flipped",), equal_captions=0.5, shifts={"gun": 0.25})
    artifacts.show_gate("gate", report)
    assert "# Quality gate closed" in shown.markdown
    assert "- **regression**: `3 decisions flipped`" in shown.markdown
    assert "| `gun` | 0.2500 |" in shown.markdown
    assert "`vlmflow gate accept`" in shown.markdown
    artifacts.show_gate("gate", GateReport(num_images=4, notes=("the policy was a and is b",)))
    assert "# Quality gate open" in shown.markdown
    assert "accept" not in shown.markdown.partition("accepted")[2]


def run_report(**given: Any) -> RunReport:
    facts: dict[str, Any] = {"run_id": "r", "status": "done", "source": "/images", "catalog": "/catalog"}
    facts |= {"profile": "starter", "tasks": ("embed",), "date": NOW.date(), "started_at": NOW}
    return RunReport(**facts | given)


def test_counts_of_a_plan_and_a_run(shown: Shown) -> None:
    due = {"embed": {"new": 3}, "caption": {"new": 3, "changed": 1}}
    counts = {"num_listed": 9, "num_duplicates": 0, "num_new": 3, "num_unchanged": 5, "num_due": 4, "num_planned": 4}
    others = {"num_exhausted": 2, "num_erased": 0, "num_policy_differs": 988}
    columns = {"outdated_columns": {"price\u202e": 5}, "num_outdated": 5}
    artifacts.show_plan("plan", PlanSummary(**counts, **others, **columns, due=due, policy=None))
    assert {"what": "caller's columns", "reason": "price ", "images": 5} in shown.rows
    assert {"what": "caption", "reason": "changed", "images": 1} in shown.rows
    assert shown.description == "4 images are due."
    left = {row["reason"]: row["images"] for row in shown.rows if row["what"] == "left alone"}
    assert left == {
        "rows are under another policy: run the backfill, or name theirs in the job": 988,
        "images failed three times and are not tried again": 2,
    }
    done = run_report(num_added=3, num_replaced=1, num_columns_updated=5, decisions={"allow": 3, "block": 1})
    artifacts.show_counts("counts", done)
    assert {"what": "rows", "value": "columns updated", "images": 5} in shown.rows
    assert {"what": "rows", "value": "new", "images": 3} in shown.rows
    assert {"what": "decision", "value": "block", "images": 1} in shown.rows


def test_a_report_is_a_link_where_it_has_an_address(shown: Shown) -> None:
    artifacts.show_report("report", "s3://bucket/a.html", "https://reports/a.html", "Run r.")
    assert shown.url == "https://reports/a.html"
    artifacts.show_report("report", "s3://bucket/`a`.html", None, "Run r.")
    assert shown.markdown == "The report of the run is at `s3://bucket/ a .html`."


def moved(**given: Any) -> RemoderateReport:
    facts: dict[str, Any] = {"run_id": "r", "dry_run": False, "catalog": "/catalog", "policy": "p 2"}
    return RemoderateReport(**facts | {"policy_digest": "d", "started_at": NOW} | given)


def test_a_diff_sums_partitions_and_shows_few_examples(shown: Shown) -> None:
    example = {"uri": "s3://b/<img>.png", "before": "allow", "after": "block", "decision_reason": "gun|0.9"}
    reports = [
        moved(num_moved=2, flips={"allow -> block": 2}, label_flips={"gun": {"allow -> block": 2}}, num_first=1,
              runs_beside={"night-1": "p 1 (abc)"}, policies={"p 2 (def)": 2}),
        moved(num_moved=1, policies={"p 2 (def)": 1, "p 0 (abc)": 0},
              flips={"allow -> block": 1}, label_flips={"gun": {"allow -> block": 1}},
              examples=(example,) * 99),
    ]  # fmt: skip
    artifacts.show_diff("diff", "Policy p 2", reports)
    assert "3 images moved." in shown.markdown
    assert "| allow -> block | 3 |" in shown.markdown
    assert "| `gun` | allow -> block | 3 |" in shown.markdown
    assert shown.markdown.count("`s3://b/ img .png`") == MAX_EXAMPLES
    assert "`gun 0.9`" in shown.markdown
    assert "| came under | images |\n| --- | --- |\n| `p 2 (def)` | 3 |\n\n" in shown.markdown
    assert "- run `night-1` was at work under `p 1 (abc)`" in shown.markdown
    assert "- 1 images stay: none is known that they had before" in shown.markdown
    artifacts.show_diff("diff", "Policy p 2, dry run", [moved(num_moved=2, dry_run=True, policies={"p 2 (def)": 2})])
    assert "2 images would move." in shown.markdown
    assert "| would come under | images |" in shown.markdown


def test_partitions_wait_or_are_done(shown: Shown) -> None:
    artifacts.show_partitions("partitions", {"2026-11-01": moved(num_moved=3, seconds=1.23), "2026-11-02": None})
    assert [row["state"] for row in shown.rows] == ["done", "waiting"]
    assert shown.rows[0]["images"] == 3
    assert shown.description == "1 of 2 partitions."
    artifacts.show_partitions("partitions", {"2026-11-01": moved(num_moved=3, dry_run=True, status="dry run")})
    assert shown.description == "1 of 1 partitions, as a dry run: nothing is written."


@pytest.mark.parametrize(
    "show",
    [
        lambda: artifacts.show_checks("c", []),
        lambda: artifacts.show_gate("g", GateReport(num_images=4)),
        lambda: artifacts.show_report("r", "s3://bucket/a.html", "https://reports/a.html", "Run r."),
    ],
    ids=["table", "markdown", "link"],
)
def test_finished_work_is_not_failed_by_a_server_that_is_away(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, show: Callable[[], None]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise httpx.ConnectError("[Errno 111] Connection refused")

    for kind in ("markdown", "table", "link"):
        monkeypatch.setattr(artifacts, f"create_{kind}_artifact", refuse)
    show()
    assert "is not shown: Prefect's server cannot be told: ConnectError: [Errno 111]" in caplog.text
