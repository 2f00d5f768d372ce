"""Which images a person is asked to look at."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

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
