"""What the quality gate compares of a label that prompts and detectors feed."""

from __future__ import annotations

import datetime as dt
from typing import Any

from vlmflow.gate import GoldenValues, _image_of, compare


def label(margin: float | None, score: float | None, detector: str | None = None) -> dict[str, Any]:
    return {"label": "nudity", "margin": margin, "score": score, "detector": detector}


def values(*labels: dict[str, Any]) -> GoldenValues:
    row = {"uri": "golden/a.png", "status": "ok", "caption": None, "decision": "review", "labels": labels}
    return GoldenValues(
        made_at=dt.datetime.now(dt.UTC), profile="p", policy=None, fingerprints={}, images={"a": _image_of(row)}
    )


def test_margins_count_where_a_detector_feeds_the_label_too() -> None:
    accepted = values(label(0.12, 0.7), label(None, 0.9, "nsfw"))
    assert compare(accepted, accepted).passed
    assert compare(accepted, values(label(-0.5, 0.1), label(None, 0.9, "nsfw"))).shifts["nudity"] > 0.6
    assert not compare(accepted, values(label(None, None), label(None, 0.9, "nsfw"))).passed


def test_a_detector_is_held_against_its_own_scores() -> None:
    accepted = values(label(0.12, 0.7), label(None, 0.9, "nsfw"), label(None, 0.2, "nsfw"))
    assert compare(accepted, values(label(0.12, 0.7), label(None, 0.1, "nsfw"), label(None, 0.9, "nsfw"))).passed
    for low, high in ((0.1, 0.2), (None, 0.9)):  # another model, and one output without a score
        observed = values(label(0.12, 0.7), label(None, high, "nsfw"), label(None, low, "nsfw"))
        assert not compare(accepted, observed).passed


def test_labels_without_accepted_margins_are_told() -> None:
    report = compare(values(label(0.12, 0.7)), values(label(0.12, 0.7), label(None, 0.9, "nsfw")))
    assert report.passed
    assert report.notes == ("1 labels have no accepted margins yet, such as nudity (nsfw)",)
