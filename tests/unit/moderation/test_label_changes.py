"""What a remoderation reports of labels: by label, the rows whose gravest decision on it changed."""

from __future__ import annotations

import pyarrow as pa

from vlmflow import schema
from vlmflow.moderation.relabel import _label_changes


def rows(*labels: list[tuple[str, str | None, str]] | None) -> pa.Table:
    names = ("label", "detector", "decision")
    found = [None if some is None else [dict(zip(names, one, strict=True)) for one in some] for some in labels]
    return pa.table({"labels": pa.array(found, pa.list_(schema.LABEL))})


def test_two_outputs_of_a_detector_that_feed_one_label_change_it_once() -> None:
    gun, none = ("gun", None, "allow"), None
    low, high = ("nudity", "nsfw", "allow"), ("nudity", "nsfw", "block")
    before = rows([gun, low, high], [gun, low, high], [gun, high, low], [gun, low, low], none)
    after = rows([gun, high, low], [low, high, gun], [low, low], [gun, low, high], [gun])
    assert _label_changes(before, after) == {
        ("nudity (nsfw)", "block", "allow"): 1,
        ("nudity (nsfw)", "allow", "block"): 1,
        ("gun", "allow", "none"): 1,
        ("gun", "none", "allow"): 1,
    }
    assert _label_changes(before, before) == {}
    assert _label_changes(rows(None), rows([])) == {}
