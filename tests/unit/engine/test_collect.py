"""What the driver counts of finished rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.catalog_samples import DATE, enrich, fingerprints, finish, open_catalog, references, request, write
from tests.erasing import key
from tests.report_samples import record
from vlmflow.catalog import Catalog, PlanRequest
from vlmflow.engine.budget import ErrorBudget, FreshRows
from vlmflow.engine.collect import Collected, Collector, Written, decisions_given
from vlmflow.engine.progress import Tally
from vlmflow.engine.report import RunReport, finished_report
from vlmflow.report.killed import enrichment_of, with_counts
from vlmflow.report.run_section import run_section
from vlmflow.report.runs import RunFacts

NAMES = ("a", "b", "c")
FIRST = ("embed", "moderate")
GONE = ("read", "missing")
BROKEN = ("decode", "corrupt")


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    """Three images that were embedded and moderated; all are allowed."""
    made = open_catalog(tmp_path / "catalog")
    enrich(made, "r1", [references(NAMES)], request(FIRST))
    return made


def finished(
    catalog: Catalog, asked: PlanRequest, names: Sequence[str] = NAMES, version: str = "v1", **given: Any
) -> pa.Table:
    with catalog.plan([references(names, version=version)], asked) as plan:
        return pa.concat_tables([finish(planned, **given) for planned in plan.batches()])


def collector_of(
    catalog: Catalog, run_id: str, batches: Sequence[pa.RecordBatch], asked: PlanRequest, **given: Any
) -> Collector:
    """One that was given what a run has written, and has committed nothing yet; it needs no Ray."""
    collector = Collector.__new__(Collector)
    state = {"_catalog": catalog, "_run_id": run_id, "_files": [], "_decisions": Counter(), "_tally": Tally()}
    collector.__dict__ |= state | {"_started": 0.0, "_budget": ErrorBudget(1, 0), "collected": Collected()}
    with catalog.plan(batches, asked) as plan:
        rows = pa.concat_tables([finish(planned, **given) for planned in plan.batches()])
    files = write(catalog, run_id, batches, asked, **given)
    collector._take(Written(files, {}, {}, decisions_given(rows), {}, 0, 0, FreshRows(), None))
    return collector


def without_moderation(rows: pa.Table) -> pa.Table:
    """As the pools hand it over where `moderate` is no task of the run."""
    return rows.drop_columns(["labels", "decision", "decision_reason", "verdict"])


@pytest.mark.parametrize("task", ["caption", "embed"])
def test_rows_that_keep_their_decision_are_not_counted_as_flagged(catalog: Catalog, task: str) -> None:
    """A night in which captions alone are due would otherwise look as if every image was flagged."""
    asked = request((task,), fingerprints={task: f"{task}-2"})
    rows = finished(catalog, asked)
    assert rows.num_rows == len(NAMES)
    assert decisions_given(rows) == {}
    assert decisions_given(without_moderation(rows)) == {}
    # Beside images that are new: these have no decision but `review`.
    assert decisions_given(without_moderation(finished(catalog, asked, [*NAMES, "new"]))) == {"review": 1}


def test_what_was_moderated_counts_by_its_decision_and_what_failed_as_review(catalog: Catalog) -> None:
    again = request(FIRST, fingerprints=fingerprints(FIRST, moderate="moderate-2"))
    assert decisions_given(finished(catalog, again, decision="block")) == {"block": 3}
    assert decisions_given(finished(catalog, again, failed=["moderate"])) == {"review": 3}
    assert decisions_given(finished(catalog, again, ["a", "new"], decision="allow")) == {"allow": 2}


def test_a_list_of_known_images_has_the_last_word(catalog: Catalog) -> None:
    rows = finished(catalog, request(), ["new 1", "new 2"])
    index = rows.schema.get_field_index("verdict")
    said = pa.array([{"decision": "block"}, None], rows.schema.field(index).type)
    assert decisions_given(rows.set_column(index, rows.schema.field(index), said)) == {"block": 1, "allow": 1}


@pytest.mark.parametrize("problem", [GONE, BROKEN, ("read", "read_failed")])
def test_new_images_that_cannot_be_read_are_for_review(catalog: Catalog, problem: tuple[str, str]) -> None:
    rows = finished(catalog, request(), ["new 1", "new 2"], problem=problem)
    assert decisions_given(without_moderation(rows)) == {"review": 2}


def test_images_that_are_other_ones_or_were_lost_count_once(catalog: Catalog) -> None:
    """Their decision falls to `review`, whatever was due; one that is gone keeps it."""
    caption = request(("caption",))
    rows = finished(catalog, caption, version="v2", content="others")
    assert decisions_given(without_moderation(rows)) == {"review": 3}
    assert decisions_given(finished(catalog, caption, version="v2", problem=GONE)) == {}
    assert decisions_given(finished(catalog, request(), version="v2", problem=BROKEN)) == {"review": 3}
    enrich(catalog, "r2", [references(NAMES, version="v2")], request(), problem=BROKEN)
    again = finished(catalog, request(retry=("unreadable",)), version="v2", problem=BROKEN)
    assert again.num_rows == 3
    assert decisions_given(again) == {}


def test_images_that_are_erased_while_the_run_is_at_work_are_told(catalog: Catalog) -> None:
    collector = collector_of(catalog, "r2", [references([*NAMES, "secret"], version="v2")], request(FIRST))
    catalog.erase(key("a", "secret"))
    collector._commit_files()
    before = RunReport.model_validate(record("r2", num_erased=1))
    after = finished_report(before, collector.collected, "done", "", seconds=1, startup_s=0, waited_s=0, num_first=0)
    assert (after.num_added, after.num_replaced, after.num_erased) == (0, 2, 1 + 2)


def test_rows_that_a_killed_run_replaced_on_the_day_they_came_are_not_new(catalog: Catalog) -> None:
    """The table alone does not tell: these have the run's own date too."""
    begun = RunReport.model_validate(record("r2", finished_at=None, num_added=0, date=DATE.isoformat()))
    catalog.runs.start("r2", begun.model_dump(mode="json"))
    collector_of(catalog, "r2", [references([*NAMES, "new"], version="v2")], request(FIRST))._commit_files()
    killed = enrichment_of(catalog.runs.get("r2") or {})
    assert killed is not None
    (report,) = with_counts(catalog, [killed])
    assert (report.num_added, report.num_replaced, report.statuses) == (1, 3, {"ok": 4})


def test_of_two_runs_at_once_each_counts_the_errors_and_decisions_of_its_own_rows(catalog: Catalog) -> None:
    """Else a night that was beside another tells people of flagged images and errors that are the other's."""
    theirs, both = ["x", "y"], ["x", "y", "z"]
    collector = collector_of(catalog, "r2", [references(both)], request(FIRST), problem=BROKEN)
    all_others = collector_of(catalog, "r3", [references(theirs)], request(FIRST), problem=BROKEN)
    enrich(catalog, "r4", [references(theirs)], request(FIRST), decision="block")

    collector._commit_files()
    all_others._commit_files()

    found = collector.collected
    assert (found.num_added, found.num_by_others) == (1, 2)
    assert (found.statuses, found.errors, found.decisions) == ({"unreadable": 1}, {"corrupt": 1}, {"review": 1})
    found = all_others.collected
    assert (found.num_added, found.num_by_others) == (0, 2)
    assert (found.statuses, found.errors, found.decisions) == ({}, {}, {})


def test_what_is_not_committed_does_not_count(catalog: Catalog) -> None:
    """A run that is stopped between has left it to the next one, which counts it."""
    collector = collector_of(catalog, "r2", [references(NAMES, version="v2")], request(FIRST), problem=BROKEN)
    assert (collector.collected.errors, collector.collected.decisions) == ({}, {})
    assert collector._tally.errors == {"corrupt": 3}, "while it goes on, they are shown"
    collector._commit_files()
    assert (collector.collected.errors, collector.collected.decisions) == ({"corrupt": 3}, {"review": 3})


@pytest.mark.parametrize(("decisions", "is_shown"), [({"allow": 2, "review": 1}, True), ({}, False)])
def test_a_run_that_decided_nothing_shows_no_table_of_decisions(decisions: dict[str, int], is_shown: bool) -> None:
    given = record("r", decisions=decisions)
    page = run_section(RunFacts("r", "finished", given, RunReport.model_validate(given)))
    assert ("Rows that the run decided on" in page) == is_shown
