"""Which images a person is asked to look at."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from vlmflow import schema
from vlmflow.moderation.queue import COLUMNS, QueueSizes, make_queue

ROWS = pa.schema([schema.IMAGES.field(name) for name in COLUMNS])


def row(number: int, status: str, **more: Any) -> dict[str, Any]:
    label = {"label": "gun", "score": 0.5, "review_threshold": 0.5, "decision": "review"}
    image = {"image_id": f"{number:032x}", "uri": f"mem://{number}", "content_hash": f"hash-{number}"}
    return {**image, "status": status, "decision": "review", "labels": [label], **more}


def test_what_nobody_can_look_at_is_not_asked_for_and_not_stood_for() -> None:
    given = [row(number, status) for number, status in enumerate(["ok", "missing", "unreadable", "partial", "failed"])]
    given.append(row(5, "failed", content_hash=None))
    batch = pa.Table.from_pylist(given, ROWS)
    for sizes in (QueueSizes(near=9, random=0), QueueSizes(near=0, random=9)):
        assert set(make_queue([batch], sizes).images["status"].to_pylist()) == {"ok", "partial", "failed"}
    assert make_queue([batch], QueueSizes(0, 0, 1)).images["weight"].to_pylist() == [3.0]


def test_what_was_labelled_is_not_asked_for_again_and_the_sample_stands_for_the_rest() -> None:
    batch = pa.Table.from_pylist([row(number, "ok") for number in range(30)], ROWS)
    for sizes in (QueueSizes(0, 0, 10), QueueSizes(10, 0, 0)):
        seen: dict[str, float | None] = {}
        for num_before, weight in ((0, 3.0), (10, 2.0), (20, 1.0)):
            labelled = [(image, f"hash-{int(image, 16)}") for image in seen]
            queue = make_queue([batch], sizes, labelled=[*labelled, (f"{29:032x}", "of other bytes")])
            assert queue.num_labelled == num_before
            assert set(queue.images["weight"].to_pylist()) == {weight if sizes.random else None}
            seen |= dict.fromkeys(queue.images["image_id"].to_pylist())
        assert len(seen) == 30


def test_the_nearest_and_the_most_contradictory_of_many_rows_are_chosen() -> None:
    def scored(number: int, score: float, num_signs: int) -> dict[str, Any]:
        label = {"label": "gun", "score": score, "review_threshold": 0.5, "decision": "review"}
        signs = [label | {"label": f"knife-{sign}", "score": None, "decision": "allow"} for sign in range(num_signs)]
        return row(number, "ok", labels=[label, *signs], caption="a knife")

    rows = [scored(number, 0.5 + ((number * 37) % 3000 + 1) / 10_000, (number * 11) % 997) for number in range(3000)]
    rows = [one if len(one["labels"]) > 990 else one | {"labels": one["labels"][:1]} for one in rows]
    batches = [pa.Table.from_pylist(rows[start : start + 1500], ROWS) for start in (0, 1500)]
    queue = make_queue(batches, QueueSizes(near=5, disagreement=3, random=0)).images.to_pylist()
    near = [entry["priority"] for entry in queue if entry["queue"] == "near"]
    assert near == pytest.approx([number / 10_000 for number in range(1, 6)], abs=1e-6)
    assert all(entry["why"] is None for entry in queue if entry["queue"] == "near")
    most = [entry for entry in queue if entry["queue"] == "disagreement"]
    assert [entry["priority"] for entry in most] == [996, 996, 996]
    assert all(entry["why"].count("the caption names knife-") == 996 for entry in most)


def test_a_row_that_stands_there_twice_ends_nothing() -> None:
    batch = pa.Table.from_pylist([row(number // 2, "ok") for number in range(8)], ROWS)
    queue = make_queue([batch], QueueSizes(near=8, disagreement=0, random=0)).images
    assert sorted(set(queue["image_id"].to_pylist())) == [f"{number:032x}" for number in range(4)]
