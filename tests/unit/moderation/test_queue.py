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
        assert set(make_queue([batch], sizes)["status"].to_pylist()) == {"ok", "partial", "failed"}
    assert make_queue([batch], QueueSizes(0, 0, 1))["weight"].to_pylist() == [3.0]
