"""What is due, and in which order."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.catalog_samples import (
    DATE,
    TASKS,
    enrich,
    error,
    fingerprints,
    finish,
    image_id,
    open_catalog,
    references,
    request,
    rows_by_name,
)
from vlmflow import schema
from vlmflow.catalog import Catalog, PlanRequest, plan_without_catalog
from vlmflow.catalog.keys import to_binary
from vlmflow.catalog.plan import plan
from vlmflow.catalog.tombstones import Erased
from vlmflow.errors import SourceError

NAMES = [f"image {number}" for number in range(8)]


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return open_catalog(tmp_path / "catalog")


def planned(
    catalog: Catalog, batches: Sequence[pa.RecordBatch], asked: PlanRequest | None = None
) -> tuple[dict[str, dict[str, Any]], dict[str, Counter[str]]]:
    """The planned rows by name, and the reasons by task."""
    with catalog.plan(batches, asked or request()) as plan:
        rows = [row for table in plan.batches(3) for row in table.to_pylist()]
        reasons: dict[str, Counter[str]] = {}
        for (task, reason), count in plan.counts.items():
            reasons.setdefault(task, Counter())[reason] = count
        assert plan.num_planned == len(rows)
        assert plan.num_listed == plan.num_due + plan.num_unchanged + plan.num_exhausted
    return {row["uri"].removeprefix("mem://"): row for row in rows}, reasons


@pytest.mark.parametrize(("sizes", "usual"), [([3, 9, 100], 9.0), ([None, 4, 6], 5.0), ([None], None), ([], None)])
def test_the_usual_size_is_that_in_the_middle_of_those_that_are_known(
    sizes: list[int | None], usual: float | None
) -> None:
    listed = references(NAMES[: len(sizes)])
    at = listed.schema.get_field_index("size_bytes")
    listed = listed.set_column(at, listed.schema.field(at), pa.array(sizes, pa.int64()))
    with plan_without_catalog([listed], request()) as plan:
        assert plan.usual_size() == usual


def test_without_a_catalog_everything_is_new() -> None:
    with plan_without_catalog([references(NAMES[:5]), references(NAMES[5:])], request()) as plan:
        (rows,) = plan.batches()
        assert plan.version == -1
        assert plan.counts == {(task, "new"): 8 for task in TASKS}
    assert rows["uri"].to_pylist() == [f"mem://{name}" for name in NAMES]
    assert rows["due"].to_pylist() == [list(TASKS)] * 8
    assert rows["ingest_date"].to_pylist() == [DATE] * 8
    assert rows.schema == pa.schema([*schema.REFERENCE, *schema.PLANNED])


def test_an_empty_source_plans_nothing() -> None:
    with plan_without_catalog([], request()) as plan:
        assert list(plan.batches()) == []
        assert plan.num_listed == 0


def test_a_second_run_has_nothing_to_do(catalog: Catalog) -> None:
    enrich(catalog, "r1", [references(NAMES)])
    assert planned(catalog, [references(NAMES)]) == ({}, {})


def test_the_source_that_cannot_tell_a_version_changes_nothing(catalog: Catalog) -> None:
    enrich(catalog, "r1", [references(NAMES)])
    assert planned(catalog, [references(NAMES, version=None)])[0] == {}


def test_a_changed_object_runs_everything_unless_its_bytes_are_the_same(catalog: Catalog) -> None:
    enrich(catalog, "r1", [references(NAMES)])
    rows, reasons = planned(catalog, [references(NAMES, version=dict.fromkeys(NAMES, "v1") | {NAMES[2]: "v2"})])
    row = rows[NAMES[2]]
    assert list(rows) == [NAMES[2]]
    assert (row["due"], row["due_if_same"], row["replaces"]) == (list(TASKS), [], True)
    assert (row["previous_version"], row["previous_hash"]) == ("v1", f"bytes-mem://{NAMES[2]}")
    assert row["previous_caption"] == "a cat"
    assert reasons["caption"] == {"changed": 1}


def test_a_task_that_failed_runs_again_on_the_same_bytes_under_another_version(catalog: Catalog) -> None:
    enrich(catalog, "r1", [references(NAMES[:1])])
    other = request(fingerprints=fingerprints(caption="caption-2"))
    enrich(catalog, "r2", [references(NAMES[:1])], other, failed=["caption"])
    enrich(catalog, "r3", [references(NAMES[:1], version="v2")])
    assert rows_by_name(catalog)[NAMES[0]]["status"] == "ok"
    assert planned(catalog, [references(NAMES[:1], version="v2")])[0] == {}


def test_another_fingerprint_makes_its_task_due_and_those_that_read_it(catalog: Catalog) -> None:
    enrich(catalog, "r1", [references(NAMES)])
    rows, reasons = planned(catalog, [references(NAMES)], request(fingerprints=fingerprints(caption="caption-2")))
    assert {tuple(row["due_if_same"]) for row in rows.values()} == {("caption", "match")}
    assert reasons == {"caption": {"fingerprint": 8}, "match": {"needed": 8}}
    rows, reasons = planned(catalog, [references(NAMES)], request(fingerprints=fingerprints(moderate="moderate-2")))
    assert reasons == {"moderate": {"fingerprint": 8}, "embed": {"needed": 8}}


def test_tasks_of_other_runs_are_left_alone(catalog: Catalog) -> None:
    enrich(catalog, "r1", [references(NAMES)], request(["embed"]))
    _, reasons = planned(catalog, [references(NAMES)], request(["embed", "moderate", "caption"]))
    assert reasons == {"moderate": {"task_added": 8}, "embed": {"needed": 8}, "caption": {"task_added": 8}}
    assert planned(catalog, [references(NAMES)], request(["embed"]))[0] == {}


def test_another_policy_alone_is_counted_and_not_due(catalog: Catalog) -> None:
    enrich(catalog, "r1", [references(NAMES)])
    with catalog.plan([references(NAMES)], request(policy="policy-2")) as plan:
        assert (plan.num_due, plan.num_policy_differs) == (0, 8)


def test_another_text_makes_match_due(catalog: Catalog) -> None:
    enrich(catalog, "r1", [references(NAMES, text="a red shoe")])
    assert planned(catalog, [references(NAMES, text="a red shoe")])[0] == {}
    rows, reasons = planned(catalog, [references(NAMES, text="a blue shoe")])
    assert reasons == {"match": {"text_changed": 8}}
    assert {row["previous_caption"] for row in rows.values()} == {"a cat"}
    assert planned(catalog, [references(NAMES)])[1] == {"match": {"text_changed": 8}}


def test_a_failed_task_is_tried_three_times_for_a_version_and_fingerprints(catalog: Catalog) -> None:
    for attempt in range(3):
        rows, reasons = planned(catalog, [references(NAMES[:1])])
        assert rows[NAMES[0]]["attempts"] == attempt
        assert reasons["caption"] == {"retry" if attempt else "new": 1}
        enrich(catalog, f"r{attempt}", [references(NAMES[:1])], failed=["caption"])
    with catalog.plan([references(NAMES[:1])], request()) as plan:
        assert (plan.num_due, plan.num_exhausted) == (0, 1)
    assert planned(catalog, [references(NAMES[:1], version="v2")])[1]["caption"] == {"changed": 1}
    other = request(fingerprints=fingerprints(caption="caption-2"))
    rows, reasons = planned(catalog, [references(NAMES[:1])], other)
    assert (rows[NAMES[0]]["attempts"], reasons["caption"]) == (0, {"retry": 1})


def test_moderation_does_not_call_for_vectors_that_cannot_be_made(catalog: Catalog) -> None:
    for attempt in range(3):
        enrich(catalog, f"r{attempt}", [references(NAMES[:1])], failed=["embed"], run=["caption", "match"])
    with catalog.plan([references(NAMES[:1])], request()) as plan:
        assert (plan.num_due, plan.num_exhausted) == (0, 1)


@pytest.mark.parametrize("problem", [("read", "missing"), ("read", "read_timeout")])
def test_an_image_that_was_not_read_is_tried_three_times(catalog: Catalog, problem: tuple[str, str]) -> None:
    for attempt in range(3):
        rows, _ = planned(catalog, [references(NAMES[:1])])
        assert rows[NAMES[0]]["attempts"] == attempt
        enrich(catalog, f"r{attempt}", [references(NAMES[:1])], problem=problem)
    with catalog.plan([references(NAMES[:1])], request()) as plan:
        assert (plan.num_due, plan.num_exhausted) == (0, 1)


def test_an_image_that_was_not_read_is_tried_three_times_by_jobs_with_other_tasks_together(catalog: Catalog) -> None:
    jobs = [request(["embed"]), request(["caption"])]
    for attempt in range(3):
        asked = jobs[attempt % 2]
        assert planned(catalog, [references(NAMES[:1])], asked)[0][NAMES[0]]["attempts"] == attempt
        enrich(catalog, f"r{attempt}", [references(NAMES[:1])], asked, problem=("read", "missing"))
    for asked in jobs:
        with catalog.plan([references(NAMES[:1])], asked) as plan:
            assert (plan.num_due, plan.num_exhausted) == (0, 1)
    assert list(planned(catalog, [references(NAMES[:1])], request(decoder="decoder-2"))[0]) == NAMES[:1]


def test_an_unreadable_image_waits_for_another_decoder(catalog: Catalog) -> None:
    enrich(catalog, "r1", [references(NAMES[:1])], problem=("decode", "truncated"))
    other_model = request(fingerprints=fingerprints(caption="caption-2"))
    assert planned(catalog, [references(NAMES[:1])], other_model)[0] == {}
    _, reasons = planned(catalog, [references(NAMES[:1])], request(decoder="decoder-2"))
    assert reasons == {task: {"decoder": 1} for task in TASKS}


def test_a_good_image_that_could_not_be_read_gets_its_decision_back(catalog: Catalog) -> None:
    enrich(catalog, "r1", [references(NAMES[:1])])
    enrich(catalog, "r2", [references(NAMES[:1], version="v2")], problem=("read", "read_timeout"))
    assert rows_by_name(catalog)[NAMES[0]]["decision"] == "review"
    rows, _ = planned(catalog, [references(NAMES[:1], version="v2")])
    assert rows[NAMES[0]]["due_if_same"] == ["embed", "moderate"]
    enrich(catalog, "r3", [references(NAMES[:1], version="v2")])
    row = rows_by_name(catalog)[NAMES[0]]
    assert (row["status"], row["decision"], row["object_version"]) == ("ok", "allow", "v2")
    assert planned(catalog, [references(NAMES[:1], version="v2")])[0] == {}


def test_the_date_of_the_first_run_is_kept(catalog: Catalog) -> None:
    enrich(catalog, "r1", [references(NAMES[:2])])
    later = request(date=DATE + dt.timedelta(days=1))
    rows, _ = planned(catalog, [references(NAMES[:3], version="v2")], later)
    assert [rows[name]["ingest_date"] for name in NAMES[:3]] == [DATE, DATE, later.date]


def test_an_image_listed_twice_is_one_row(catalog: Catalog) -> None:
    with catalog.plan([references([NAMES[0], NAMES[1]]), references([NAMES[0]])], request()) as plan:
        assert (plan.num_listed, plan.num_duplicates, plan.num_planned) == (2, 1, 2)


def test_an_image_listed_twice_with_other_columns_stops_the_run(catalog: Catalog) -> None:
    one = references([NAMES[0]], source=[{"title": "a"}])
    other = references([NAMES[0]], source=[{"title": "b"}])
    with pytest.raises(SourceError, match=f"1 images are listed twice .*mem://{NAMES[0]}") as raised:
        catalog.plan([one, other], request())
    assert "key_column" in raised.value.remedy
    with pytest.raises(SourceError):
        catalog.plan([references([NAMES[0]], text="a"), references([NAMES[0]], text="b")], request())


def test_images_listed_twice_are_compared_however_their_rows_were_put_aside(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlmflow.catalog.spill._BUFFERED_ROWS", 4)
    names = [f"image {number}" for number in range(400)]  # several in each bucket, in batches of their own
    batches = [references(names[start : start + 4]) for start in range(0, 400, 4)]
    with catalog.plan([*batches, *batches[:50]], request()) as plan:
        assert (plan.num_listed, plan.num_duplicates) == (400, 200)
    other = references(names[8:9], text="another text")
    with pytest.raises(SourceError, match=f"1 images are listed twice .*mem://{names[8]}"):
        catalog.plan([*batches, *batches[:2], other], request())


def test_a_limit_takes_the_first_due_images_of_the_listing(catalog: Catalog) -> None:
    enrich(catalog, "r1", [references([NAMES[1]])])
    with catalog.plan([references(NAMES)], request(limit=3)) as plan:
        uris = [uri for table in plan.batches() for uri in table["uri"].to_pylist()]
        assert (plan.num_due, plan.num_planned) == (7, 3)
    assert uris == [f"mem://{name}" for name in (NAMES[0], NAMES[2], NAMES[3])]
    enrich(catalog, "r2", [references(NAMES)], request(limit=3))
    assert len(rows_by_name(catalog)) == 4


def test_rows_of_one_live_file_are_planned_next_to_each_other(catalog: Catalog) -> None:
    names = [f"n{number}" for number in range(60)]
    for part in range(4):
        enrich(catalog, f"r{part}", [references(names[part::4])])
    with catalog.plan([references(names, version="v2"), references(["new"])], request()) as plan:
        files = [file for table in plan.batches(7) for file in table["live_file"].to_pylist()]
    assert files[0] is None
    changes = sum(left != right for left, right in pairwise(files))
    assert changes == 4
    assert Counter(files[1:]) == dict.fromkeys(files[1:], 15)


def test_the_plan_leaves_no_folder_behind(catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with catalog.plan([references(NAMES)], request()) as plan:
        assert list(tmp_path.glob("vlmflow-*"))
    plan.close()
    with pytest.raises(SourceError):
        catalog.plan([references(["a"], text="a"), references(["a"], text="b")], request())
    assert not list(tmp_path.glob("vlmflow-*"))


def test_the_plan_finds_rows_in_every_bucket(catalog: Catalog) -> None:
    names = [f"n{number}" for number in range(3000)]
    assert len({image_id(name)[:2] for name in names}) == 256
    enrich(catalog, "r1", [references(names)], run=["caption"])
    rows, _ = planned(catalog, [references(names, version="v2")])
    assert len(rows) == 3000
    assert {row["previous_hash"] for row in rows.values()} == {f"bytes-mem://{name}" for name in names}


def test_samples_speak_of_errors_as_the_schema_does() -> None:
    with plan_without_catalog([references(["a"])], request()) as plan:
        (table,) = plan.batches()
    assert finish(table, failed=["caption"])["errors"].to_pylist() == [[error("caption", "task_failed")]]


def test_retrying_is_due_however_often_it_failed(catalog: Catalog) -> None:
    problems = {"gone": ("read", "missing"), "broken": ("decode", "corrupt"), "hard": ("decode", "timed_out")}
    for name, problem in problems.items():
        for _ in range(3):
            enrich(catalog, "r", [references([name])], problem=problem)
    for _ in range(3):
        enrich(catalog, "r", [references(["partly"])], failed=["caption"])
    listed = [references([*problems, "partly"])]
    assert planned(catalog, listed)[0] == {}
    with catalog.plan(listed, request()) as plan:
        assert (plan.num_exhausted, plan.num_unchanged) == (3, 1)

    every = {"gone": "missing", "broken": "unreadable", "hard": "failed"}
    for name, status in every.items():
        rows, reasons = planned(catalog, listed, request(retry=(status,)))
        assert list(rows) == [name]
        assert reasons == {task: {"retry": 1} for task in TASKS}
    rows, reasons = planned(catalog, listed, request(retry=("partial",)))
    assert (list(rows), reasons["caption"]) == (["partly"], {"retry": 1})
    assert rows["partly"]["due_if_same"] == ["caption", "match"]
    assert rows["partly"]["attempts"] == 3

    enrich(catalog, "again", listed, request(retry=("failed", "missing")), problem=("decode", "timed_out"))
    assert {name: row["attempts"] for name, row in rows_by_name(catalog).items()} == {
        "gone": 4,
        "broken": 1,
        "hard": 4,
        "partly": 3,
    }
    assert planned(catalog, listed)[0] == {}


def test_erased_images_are_left_out(tmp_path: Path) -> None:
    erased = to_binary(pa.array([image_id(NAMES[1]), image_id("other")], pa.string()))
    with plan([references([NAMES[1], *NAMES])], request(), None, None, Erased.of(erased)) as made:
        names = [name for rows in made.batches() for name in rows["uri"].to_pylist()]
        assert (made.num_erased, made.num_listed, made.num_duplicates) == (1, 7, 1)
    assert names == [f"mem://{name}" for name in NAMES if name != NAMES[1]], "those listed last too"
