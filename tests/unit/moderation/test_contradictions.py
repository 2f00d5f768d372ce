"""What in a row contradicts what: counted over all rows at once, and told of one."""

from __future__ import annotations

import random
from typing import Any

import pyarrow as pa
import pytest

from vlmflow import schema
from vlmflow.moderation.contradictions import contradictions, count_contradictions

COLUMNS = ("labels", "caption", "caption_itm", "text_itm")
ROWS = pa.schema([schema.IMAGES.field(name) for name in COLUMNS])


def label(name: str, decision: str | None, detector: str | None = None) -> dict[str, Any]:
    return {"label": name, "decision": decision, "detector": detector}


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"caption": "Two GUNS, on a table", "labels": [label("hand-gun", "allow")]}, ["the caption names hand-gun"]),
        ({"caption": "a gunsmith", "labels": [label("gun", "allow")]}, []),
        ({"caption": "a gun", "labels": [label("gun", "allow", "detector")]}, []),
        ({"caption": "a 9mm", "labels": [label("9mm", "allow"), label("to", "allow")]}, []),
        ({"caption": "a cat", "caption_itm": 0.95, "labels": [label("gun", "block")]}, ["gun blocks, and a caption"]),
        ({"caption": "a cat", "caption_itm": 0.5, "labels": [label("gun", "block")]}, []),
        ({"caption": None, "caption_itm": 0.95, "labels": [label("gun", "block")]}, []),
        (
            {"caption": "a cat", "caption_itm": 0.95, "text_itm": 0.05, "labels": []},
            ["the caption fits the image, the caller's text does not"],
        ),
        (
            {"labels": [label("gun", "block", "d"), label("gun", "review", "e"), label("gun", "review")]},
            ["detector and prompts differ on gun"],
        ),
        ({"caption": "a cat", "caption_itm": 0.95, "text_itm": float("nan"), "labels": None}, []),
    ],
)
def test_what_contradicts_what_is_told(row: dict[str, Any], told: list[str]) -> None:
    whole = dict.fromkeys(COLUMNS) | row
    found = contradictions(whole)
    assert [sign[: len(start)] for sign, start in zip(found, told, strict=True)] == told
    assert count_contradictions(pa.Table.from_pylist([whole], ROWS)).tolist() == [len(told)]


def test_rows_counted_together_count_as_each_alone() -> None:
    chance = random.Random(7)
    names = ["hand-gun", "gun", "knife_open", "café-bar", "ok", "blood"]
    words = ["a", "Gun", "guns", "knife", "knives", "café", "bars", "blood.", "bloody", "open,", "hand-made", "K"]
    rows: list[dict[str, Any]] = []
    for _ in range(600):
        labels = [
            label(
                chance.choice(names),
                chance.choice(["allow", "review", "block", None]),
                chance.choice([None, None, "d"]),
            )
            for _ in range(chance.randrange(5))
        ]
        rows.append(
            {
                "labels": chance.choice([labels, labels, labels, None]),
                "caption": chance.choice([None, "", " ".join(chance.choices(words, k=3)), "; ".join(words)]),
                "caption_itm": chance.choice([None, 0.2, 0.9, 0.95]),
                "text_itm": chance.choice([None, 0.05, 0.1, 0.5]),
            }
        )
    table = pa.concat_tables([pa.Table.from_pylist(rows[:200], ROWS), pa.Table.from_pylist(rows[200:], ROWS)])
    told = [len(contradictions(row)) for row in table.to_pylist()]
    assert count_contradictions(table).tolist() == told
    assert count_contradictions(table.slice(13, 300)).tolist() == told[13:313]
    assert count_contradictions(table.slice(0, 0)).tolist() == []
    assert len(set(told)) > 3
