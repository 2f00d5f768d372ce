"""Results shared between images of equal bytes that one actor works on."""

from __future__ import annotations

import pyarrow as pa

from vlmflow import schema
from vlmflow.engine import columns
from vlmflow.engine.equal_bytes import RecentResults
from vlmflow.engine.pools import run_on_due_rows
from vlmflow.tasks import Columns
from vlmflow.tasks.run import BatchLimit


class Counting:
    """Says what it was shown, and fails on images whose hash says so."""

    name = "caption"
    reads: tuple[str, ...] = ("pixels_32_bicubic", "text")
    writes = pa.schema([("caption", pa.string())])

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []

    def __call__(self, batch: pa.Table) -> Columns:
        shown = list(zip(batch["content_hash"].to_pylist(), batch["text"].to_pylist(), strict=True))
        if any(image == "bad" for image, _ in shown):
            raise ValueError("cannot be done")
        self.seen += shown
        return {"caption": pa.array([f"{image} {text} {len(self.seen)}" for image, text in shown])}


def batch(*images: tuple[str, str]) -> pa.Table:
    lists = pa.list_(pa.string())
    count = len(images)
    return pa.table(
        {
            "content_hash": [image for image, _ in images],
            "text": [text for _, text in images],
            "pixels_32_bicubic": pa.array([[b"x"]] * count, pa.list_(pa.binary())),
            columns.RUN_TASKS: pa.array([["caption"]] * count, lists),
            columns.TASKS_RUN: pa.array([[]] * count, lists),
            columns.TASKS_FAILED: pa.array([[]] * count, lists),
            columns.TASKS_SHARED: pa.array([[]] * count, lists),
            "errors": pa.array(
                [[]] * count, pa.list_(pa.struct([("stage", "string"), ("class", "string"), ("message", "string")]))
            ),
        }
    )


def run(task: Counting, recent: RecentResults, *images: tuple[str, str]) -> pa.Table:
    return run_on_due_rows(batch(*images), task, BatchLimit(), 60.0, recent)


def test_equal_bytes_and_texts_are_shown_once_across_batches() -> None:
    task = Counting()
    recent = RecentResults(task)

    first = run(task, recent, ("a", "x"), ("b", "x"), ("a", "x"), ("a", "y"))
    second = run(task, recent, ("b", "x"), ("c", "x"), ("a", "y"))

    assert task.seen == [("a", "x"), ("b", "x"), ("a", "y"), ("c", "x")]
    assert [caption[:3] for caption in first["caption"].to_pylist()] == ["a x", "b x", "a x", "a y"]
    assert [caption[:3] for caption in second["caption"].to_pylist()] == ["b x", "c x", "a y"]
    assert first[columns.TASKS_SHARED].to_pylist() == [[], [], ["caption"], []]
    assert second[columns.TASKS_SHARED].to_pylist() == [["caption"], [], ["caption"]]
    assert second[columns.TASKS_RUN].to_pylist() == [["caption"]] * 3


def test_failures_are_not_kept_and_old_results_are_forgotten() -> None:
    task = Counting()
    recent = RecentResults(task, max_rows=2)

    first = run(task, recent, ("a", "x"), ("bad", "x"), ("b", "x"), ("c", "x"), ("bad", "x"))
    run(task, recent, ("a", "x"), ("c", "x"), ("bad", "x"))

    assert first[columns.TASKS_FAILED].to_pylist() == [[], ["caption"], [], [], ["caption"]]
    assert first["caption"].null_count == 2
    assert [image for image, _ in task.seen].count("a") == 2, "two results were kept, and a was the oldest"
    assert [image for image, _ in task.seen].count("c") == 1


def test_batches_of_two_threads_find_what_they_were_promised() -> None:
    """The second is done before the first, and brings what that had not found, at other places."""
    task = Counting()
    recent = RecentResults(task, max_rows=3)
    run(task, recent, ("a", "x"), ("b", "x"))
    none = pa.nulls(2, schema.ERROR)

    first = recent.split(batch(("c", "x"), ("a", "x"), ("d", "x")))
    second = recent.split(batch(("e", "x"), ("d", "x"), ("b", "x")))
    assert (first.fresh, second.fresh) == ([0, 2], [0, 1])
    values, _ = recent.join(second, {"caption": pa.array(["of e", "of d"])}, none)
    assert values["caption"].to_pylist() == ["of e", "of d", "b x 2"]
    values, _ = recent.join(first, {"caption": pa.array(["of c", "also d"])}, none)
    assert values["caption"].to_pylist() == ["of c", "a x 2", "also d"]

    third = recent.split(batch(("d", "x"), ("c", "x"), ("e", "x"), ("a", "x")))
    assert third.fresh == [3], "the last three are kept"
    values, _ = recent.join(third, {"caption": pa.array(["of a"])}, none[:1])
    assert values["caption"].to_pylist() == ["also d", "of c", "of e", "of a"]
