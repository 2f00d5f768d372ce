"""What a row says, and how a new result joins the live row."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.catalog_samples import DATE, TASKS, constants, fingerprints, finish, references, request
from vlmflow import schema
from vlmflow.catalog.merge import merge
from vlmflow.catalog.rows import STATUSES, attempt_digest, stage_rows
from vlmflow.errors import RowErrorClass

UNREADABLE = ("decode", "truncated")
MISSING = ("read", "missing")
UNREAD = ("read", "read_timeout")


def staged(
    name: str = "a",
    *,
    run_id: str = "r1",
    version: str | None = "v1",
    live: pa.Table | None = None,
    policy: str = "policy-1",
    given_fingerprints: dict[str, str] | None = None,
    **result: Any,
) -> pa.Table:
    """One image as a run would write it; ``live``: its row at planning. ``result`` goes to ``finish``."""
    asked = request(fingerprints=given_fingerprints or fingerprints(), policy=policy)
    (row,) = references([name], version=version).to_pylist()
    row |= {"due": list(TASKS), "due_if_same": list(TASKS), "attempts": 0, "ingest_date": DATE}
    if live is not None:
        row |= {"replaces": True, "previous_version": live["seen_version"][0].as_py()}
        row |= {"previous_hash": live["content_hash"][0].as_py(), "previous_caption": live["caption"][0].as_py()}
    planned = pa.Table.from_pylist([row], schema=pa.schema([*schema.REFERENCE, *schema.PLANNED]))
    return stage_rows(finish(planned, **result), constants(run_id, asked), schema.IMAGES)


def first(name: str = "a", **given: Any) -> pa.Table:
    """A live row, made of one result."""
    return staged(name, **given).select(schema.IMAGES.names)


def merged(live: pa.Table, **given: Any) -> dict[str, Any]:
    table, _ = merge(live, staged(live=live, run_id="r2", **given))
    assert table.schema == schema.IMAGES
    (row,) = table.to_pylist()
    return row


def task_values(row: dict[str, Any], task: str) -> dict[str, Any]:
    return {name: row[name] for name in schema.TASK_COLUMNS[task].names if name != "previous_policy"}


# New rows


@pytest.mark.parametrize(
    ("problem", "status"),
    [
        *((("decode", name), "unreadable") for name in ("truncated", "not_an_image", "corrupt", "too_many_pixels")),
        *((("read", name), "unreadable") for name in ("empty_file", "too_many_bytes")),
        (("read", "missing"), "missing"),
        *((("read", name), "failed") for name in ("access_denied", "read_failed", "http_status", "address_refused")),
        *((("decode", name), "failed") for name in ("worker_died", "timed_out")),
    ],
)
def test_the_class_of_an_image_error_decides_the_status(problem: tuple[str, str], status: str) -> None:
    assert RowErrorClass(problem[1])
    (row,) = first(problem=problem).to_pylist()
    assert (row["status"], row["decision"], row["decision_reason"]) == (status, "review", "unscored")
    assert row["embed_fingerprint"] is None
    assert row["errors"][0]["class"] == problem[1]


def test_a_good_row_carries_its_provenance() -> None:
    (row,) = first().to_pylist()
    assert (row["status"], row["decision"], row["attempts"]) == ("ok", "allow", 1)
    assert {row[f"{task}_fingerprint"] for task in TASKS} == set(fingerprints().values())
    assert (row["embed_run_id"], row["embed_model"], row["caption_model"]) == ("r1", "clip@1", "blip@1")
    assert (row["policy_name"], row["policy_digest"], row["decoder"]) == ("demo", "policy-1", "decoder-1")
    assert row["seen_version"] == row["object_version"] == "v1"


def test_a_failed_task_leaves_a_partial_row_and_all_failed_a_failed_one() -> None:
    (row,) = first(failed=["caption"]).to_pylist()
    assert (row["status"], row["caption"], row["caption_fingerprint"]) == ("partial", None, None)
    (row,) = first(failed=TASKS).to_pylist()
    assert (row["status"], row["decision"]) == ("failed", "review")


def test_outputs_count_only_where_their_task_ran() -> None:
    table = staged(run=["caption"])
    assert table["decision"][0].as_py() == "review"
    assert table["labels"][0].as_py() is None
    assert table["caption"][0].as_py() == "a cat"


def test_attempts_are_counted_per_set_of_fingerprints_in_any_order() -> None:
    assert attempt_digest({"a": "1", "b": "2"}) == attempt_digest({"b": "2", "a": "1"})
    assert attempt_digest({"a": "1"}) != attempt_digest({"a": "2"})


# Merging


def test_tasks_of_two_runs_end_in_one_full_row() -> None:
    row = merged(first(run=["embed", "moderate"]), run=["caption", "match"], caption="a dog")
    assert (row["status"], row["decision"], row["caption"], row["embed_run_id"]) == ("ok", "allow", "a dog", "r1")
    assert all(row[f"{task}_fingerprint"] for task in TASKS)


def test_new_bytes_null_what_was_not_run_and_fail_closed() -> None:
    row = merged(first(), version="v2", content="other", run=["caption"], caption="a dog")
    assert (row["caption"], row["object_version"], row["seen_version"]) == ("a dog", "v2", "v2")
    assert (row["decision"], row["decision_reason"]) == ("review", "unscored")
    for task in ("embed", "moderate", "match"):
        assert set(task_values(row, task).values()) == {None}
        assert row[f"{task}_fingerprint"] is None


def test_equal_bytes_only_move_the_version() -> None:
    live = first()
    row = merged(live, version="v2", run=[])
    before = live.to_pylist()[0]
    assert (row["object_version"], row["seen_version"]) == ("v2", "v2")
    same = set(schema.IMAGES.names) - {"object_version", "seen_version", "run_id", "read_at", "updated_at"}
    assert {name: row[name] for name in same} == {name: before[name] for name in same}


def test_a_run_that_looked_at_fewer_frames_takes_no_look_from_equal_bytes() -> None:
    live, other = first(phash="a" * 16), "b" * 16
    assert merged(live, version="v2", run=["caption"])["phash"] == "a" * 16
    assert merged(live, run=["embed"], phash=other)["phash"] == other
    assert merged(live, version="v2", content="other", run=["caption"])["phash"] is None
    assert merged(first(), run=["embed"], phash=other)["phash"] == other


@pytest.mark.parametrize("problem", [UNREADABLE, UNREAD])
def test_an_object_gone_bad_marks_a_good_row_and_wipes_nothing(problem: tuple[str, str]) -> None:
    before = first().to_pylist()[0]
    row = merged(first(), version="v2", problem=problem)
    for task in TASKS:
        assert task_values(row, task) == task_values(before, task)
    assert (row["object_version"], row["seen_version"], row["content_hash"]) == ("v1", "v2", before["content_hash"])
    assert row["status"] == ("unreadable" if problem == UNREADABLE else "failed")
    assert (row["decision"], row["decision_reason"]) == ("review", row["status"])
    assert row["moderate_fingerprint"] is None  # so that it is moderated again when it can be read


def test_a_missing_object_keeps_its_decision() -> None:
    row = merged(first(decision="block"), problem=MISSING)
    assert (row["status"], row["decision"], row["decision_reason"]) == ("missing", "block", "cat")
    assert row["moderate_fingerprint"] == "moderate-1"


def test_a_row_without_values_takes_what_the_new_attempt_says() -> None:
    row = merged(first(problem=UNREADABLE), version="v2", problem=MISSING)
    assert (row["status"], row["seen_version"], row["object_version"]) == ("missing", "v2", "v2")
    row = merged(first(problem=MISSING))
    assert (row["status"], row["decision"], row["errors"]) == ("ok", "allow", [])


def test_an_error_stays_until_its_task_has_run() -> None:
    live = first(failed=["caption"])
    row = merged(live, run=["embed", "moderate"])
    assert (row["status"], [error["stage"] for error in row["errors"]]) == ("partial", ["caption"])
    row = merged(live, run=["caption", "match"])
    assert (row["status"], row["errors"]) == ("ok", [])


@pytest.mark.parametrize(
    "result",
    [
        {"run": ["caption", "match"]},
        {"failed": ["embed", "moderate"], "run": ["caption", "match"]},
        {"problem": MISSING},
        {"problem": UNREADABLE, "version": "v2"},
        {"run": ["embed"]},  # the labels are those of the vectors before
        {"run": ["caption"], "unseen": True},
    ],
)
def test_frames_not_looked_at_are_told_while_values_stay_that_say_nothing_of_them(result: dict[str, Any]) -> None:
    row = merged(first(unseen=True), **result)
    assert [error["class"] for error in row["errors"]].count("frames_unseen") == 1
    if "problem" in result:
        assert row["errors"][0]["class"] == result["problem"][1]  # the one shown beside the status


@pytest.mark.parametrize("result", [{}, {"run": ["embed", "moderate"]}, {"content": "other", "run": ["caption"]}])
def test_frames_not_looked_at_are_forgotten_with_the_values(result: dict[str, Any]) -> None:
    assert merged(first(unseen=True), **result)["errors"] == []


def test_a_task_that_fails_again_keeps_the_old_values_of_equal_bytes() -> None:
    row = merged(first(), failed=["caption"], given_fingerprints=fingerprints(caption="caption-2"))
    assert (row["caption"], row["caption_fingerprint"], row["status"]) == ("a cat", "caption-1", "partial")
    row = merged(first(), failed=["caption"], content="other", version="v2")
    assert (row["caption"], row["caption_fingerprint"], row["status"]) == (None, None, "partial")


def test_moderation_that_fails_over_old_labels_fails_closed() -> None:
    row = merged(first(), failed=["moderate"])
    assert (row["decision"], row["decision_reason"], row["status"]) == ("review", "unscored", "partial")
    assert row["labels"] is not None
    assert row["moderate_fingerprint"] is None


def test_a_match_of_the_old_caption_does_not_outlive_it() -> None:
    row = merged(first(), run=["caption"], caption="a dog")
    assert (row["caption"], row["caption_itm"], row["match_fingerprint"]) == ("a dog", None, None)
    row = merged(first(), run=["caption"], caption="a cat")
    assert row["match_fingerprint"] == "match-1"


def test_a_match_of_a_caption_that_another_run_has_replaced_since_planning_does_not_join_the_new_one() -> None:
    planned = first()
    recaptioned, _ = merge(planned, staged(live=planned, run=["caption", "match"], caption="a dog", run_id="r2"))
    late = staged(live=planned, run=["match"], run_id="r3")
    (row,) = merge(recaptioned, late)[0].to_pylist()
    assert (row["caption"], row["caption_itm"], row["match_fingerprint"]) == ("a dog", None, None)
    (row,) = merge(planned, late)[0].to_pylist()
    assert (row["caption"], row["match_fingerprint"]) == ("a cat", "match-1")


def test_the_policy_before_is_kept_for_a_rollback() -> None:
    live = first()
    row = merged(live, run=["embed", "moderate"], policy="policy-2")
    assert (row["policy_digest"], row["previous_policy"]) == ("policy-2", "policy-1")
    again, _ = merge(pa.Table.from_pylist([row], schema=schema.IMAGES), staged(live=live, policy="policy-2"))
    assert again["previous_policy"][0].as_py() == "policy-1"


def test_attempts_count_within_a_version_and_its_fingerprints() -> None:
    live = first(failed=["caption"])
    assert merged(live, failed=["caption"])["attempts"] == 2
    assert merged(live, failed=["caption"], version="v2")["attempts"] == 1
    assert merged(live, failed=["caption"], given_fingerprints=fingerprints(caption="caption-2"))["attempts"] == 1


def test_the_newest_object_version_wins() -> None:
    live = first()
    ours = staged(live=live, version="v2", content="two", caption="two")
    theirs = staged(live=live, version="v3", content="three", caption="three", run_id="r3")
    now, _ = merge(live, theirs)
    later = _moved(now, "read_at", +1)
    kept, superseded = merge(later, ours)
    assert superseded.tolist() == [True]
    assert kept.equals(later)
    # Written again since, as by a verdict: nobody has met the object then.
    earlier = _moved(_moved(now, "read_at", -1), "updated_at", +1)
    replaced, superseded = merge(earlier, ours)
    assert superseded.tolist() == [False]
    assert replaced["caption"].to_pylist() == ["two"]


def _moved(rows: pa.Table, column: str, hours: int) -> pa.Table:
    times = pa.array([when + dt.timedelta(hours=hours) for when in rows[column].to_pylist()], schema.TIMESTAMP)
    return rows.set_column(rows.schema.get_field_index(column), rows.schema.field(column), times)


# Properties of any sequence of results

task_sets = st.sampled_from(
    [(), ("embed",), ("embed", "moderate"), ("caption",), ("caption", "match"), ("match",), TASKS, TASKS]
)
outcomes = st.fixed_dictionaries(
    {
        "version": st.sampled_from(["v1", "v2", None]),
        "content": st.sampled_from(["one", "two"]),
        "caption": st.sampled_from(["a cat", "a dog"]),
        "decision": st.sampled_from(["allow", "review", "block"]),
        "policy": st.sampled_from(["policy-1", "policy-2"]),
        "run": task_sets,
        "problem": st.sampled_from([None, None, UNREADABLE, MISSING, UNREAD]),
        "failed": st.sampled_from([(), (), ("caption",), ("moderate",), TASKS]),
        "unseen": st.booleans(),
    }
)


def follow(results: list[dict[str, Any]]) -> pa.Table:
    """The live row after these results, one after the other."""
    live = first(**results[0])
    for result in results[1:]:
        live, _ = merge(live, staged(live=live, **result))
    return live


@settings(max_examples=60, deadline=None)
@given(st.lists(outcomes, min_size=1, max_size=3), outcomes)
def test_a_merged_row_keeps_its_promises(results: list[dict[str, Any]], result: dict[str, Any]) -> None:
    live = follow(results)
    ours = staged(live=live, **result)
    table, _ = merge(live, ours)
    (before,), (row,), (new,) = live.to_pylist(), table.to_pylist(), ours.to_pylist()
    # One row, the same image, and a decision that rests on a score of these bytes.
    assert [row[name] for name in ("image_id", "uri", "ingest_date")] == [
        before[name] for name in ("image_id", "uri", "ingest_date")
    ]
    assert row["status"] in STATUSES
    assert row["decision"] in ("allow", "review", "block")
    if row["decision"] == "allow":
        assert row["labels"] is not None
        assert row["status"] not in ("unreadable", "failed")
    # Every value has a fingerprint, except labels that are to be made anew.
    for task in ("embed", "caption", "match"):
        assert row[f"{task}_fingerprint"] is not None or set(task_values(row, task).values()) == {None}
    had_values = before["labels"] is not None or any(before[f"{task}_fingerprint"] for task in TASKS)
    for task in TASKS:
        if result["problem"]:
            if had_values:
                assert task_values(row, task) == task_values(before, task)
        elif task in new["tasks_run"]:
            assert task_values(row, task) == task_values(new, task)
        elif before["content_hash"] != new["content_hash"]:
            assert set(task_values(row, task).values()) == {None}
        elif task != "match":
            assert task_values(row, task) == task_values(before, task)


@settings(max_examples=40, deadline=None)
@given(st.lists(outcomes, min_size=1, max_size=2), outcomes)
def test_the_same_result_twice_changes_nothing_but_attempts_and_time(
    results: list[dict[str, Any]], result: dict[str, Any]
) -> None:
    live = follow(results)
    ours = staged(live=live, **result)
    once, _ = merge(live, ours)
    twice, _ = merge(once, ours)
    marks = ["attempts", "updated_at"]
    assert twice.drop_columns(marks).equals(once.drop_columns(marks))


@settings(max_examples=40, deadline=None)
@given(st.lists(outcomes, min_size=1, max_size=2), st.sampled_from(["allow", "block"]))
def test_different_tasks_of_two_runs_join_in_either_order(results: list[dict[str, Any]], decision: str) -> None:
    live = follow(results)
    scoring = staged(live=live, run=["embed", "moderate"], decision=decision, content="one", run_id="r8")
    writing = staged(live=live, run=["caption", "match"], caption="new", content="one", run_id="r9")
    one, _ = merge(merge(live, scoring)[0], writing)
    other, _ = merge(merge(live, writing)[0], scoring)
    names = [name for columns in schema.TASK_COLUMNS.values() for name in columns.names]
    assert one.select([*names, "decision"]).equals(other.select([*names, "decision"]))


def test_rows_are_merged_each_by_its_own_rule() -> None:
    """Many rows at once give what one at a time gives."""
    cases: list[dict[str, Any]] = [
        {"run": ["caption"], "caption": "a dog"},
        {"problem": UNREADABLE, "version": "v2"},
        {"content": "other", "version": "v2"},
        {"failed": ["moderate"]},
    ]
    lives = [first(name) for name in "abcd"]
    ours = [staged(name, live=live, **case) for name, live, case in zip("abcd", lives, cases, strict=True)]
    together, _ = merge(pa.concat_tables(lives), pa.concat_tables(ours))
    apart = [merge(live, our)[0] for live, our in zip(lives, ours, strict=True)]
    columns = [name for name in together.column_names if name != "updated_at"]
    assert together.select(columns).to_pylist() == pa.concat_tables(apart).select(columns).to_pylist()
