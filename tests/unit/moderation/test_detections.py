"""Detectors' scores under a policy: how they combine with prompts, and failing closed."""

from __future__ import annotations

import datetime as dt
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from vlmflow import schema
from vlmflow.catalog.columns import conform
from vlmflow.catalog.masks import is_valid
from vlmflow.models import ModelIdentity
from vlmflow.moderation.decide import Moderation, Moderator
from vlmflow.moderation.policy import Policy, bind
from vlmflow.moderation.prompts import PromptVectors
from vlmflow.moderation.relabel import SCANNED, Target, relabel, wanted_rows

DATE = dt.date(2026, 3, 1)
IDENTITY = ModelIdentity("org/clip", "local", "a" * 64, "[32]", 1)
# Prompts that make the margin of an image equal to the first entry of its vector.
AXES = PromptVectors(np.eye(1, 2, dtype=np.float32), np.eye(1, 2, 1, dtype=np.float32), 1.0, "digest")
MODELS = {"nsfw": "model-1", "arms": "model-2"}


def policy(combine: str) -> Policy:
    return Policy.model_validate(
        {
            "name": "test",
            "version": "1",
            "neutral": ["a banana"],
            "categories": [
                {"name": "arms", "labels": [{"name": "gun", "prompts": ["a gun"], "review": 0.5, "block": 0.8}]}
            ],
            "logistic": {"scale": 1.0, "offset": 0.0},
            "detectors": [
                {
                    "name": "nsfw",
                    "family": "opennsfw",
                    "outputs": {"nsfw": {"category": "sexual", "label": "nudity", "review": 0.4, "block": 0.9}},
                },
                {
                    "name": "arms",
                    "family": "image_classification",
                    "path": "x",
                    "outputs": {
                        "gun": {"category": "arms", "label": "gun", "review": 0.5, "block": 0.7, "combine": combine}
                    },
                },
            ],
        }
    )


def detection(name: str, score: float | None, *, model: str | None = None) -> dict[str, Any]:
    output = {"nsfw": "nsfw", "arms": "gun"}[name]
    return {
        "detector": name,
        "model": model or MODELS[name],
        "output": output,
        "score": score,
        "view": "center",
        "time_s": None,
    }


def moderate(
    prompt_margin: float | None, found: list[dict[str, Any]] | None, *, combine: str = "any", bound: bool = True
) -> tuple[str, str | None, list[dict[str, Any]]]:
    """The decision, its reason and the labels of one image, put between two others that are harmless."""
    given = policy(combine)
    moderator = Moderator(given, bind(given, IDENTITY) if bound else None, AXES, MODELS)
    margins = [[-5.0], [] if prompt_margin is None else [prompt_margin], [-5.0]]
    vectors = np.array([[value, 0.0] for image in margins for value in image], np.float32).reshape(-1, 2)
    offsets = np.concatenate([[0], np.cumsum([len(image) for image in margins])])
    harmless = [detection("nsfw", 0.0), detection("arms", 0.0)]
    detections = pa.array([harmless, found, harmless], pa.list_(schema.DETECTION))
    result: Moderation = moderator.moderate(vectors, ["squash"] * len(vectors), offsets, detections)
    if bound:
        assert result.decision[0].as_py() == result.decision[2].as_py() == "allow"
    assert [len(labels) for labels in result.labels.to_pylist()] == [3, 3 if prompt_margin is not None else 2, 3]
    return result.decision[1].as_py(), result.reason[1].as_py(), result.labels[1].as_py()


LOW, HIGH = -5.0, 5.0


@pytest.mark.parametrize(
    ("margin", "nsfw", "arms", "combine", "decision", "reason"),
    [
        (LOW, 0.0, 0.0, "any", "allow", None),
        (LOW, 0.5, 0.0, "any", "review", "sexual/nudity"),
        (LOW, 0.95, 0.0, "any", "block", "sexual/nudity"),
        (LOW, 0.0, 0.75, "any", "block", "arms/gun"),
        (HIGH, 0.5, 0.0, "any", "block", "arms/gun"),
        # Confirmed: the detector blocks only where the prompts found something.
        (LOW, 0.0, 0.75, "confirm", "review", "arms/gun"),
        (0.2, 0.0, 0.75, "confirm", "block", "arms/gun"),
        (None, 0.0, 0.75, "confirm", "block", "arms/gun"),
        # Replaced: the prompts count only where the detector gave no score.
        (HIGH, 0.0, 0.0, "replace", "allow", None),
        (HIGH, 0.0, 0.6, "replace", "review", "arms/gun"),
        (HIGH, 0.0, None, "replace", "block", "arms/gun"),
        # Nothing scored is nothing allowed, and an unscored label never lowers a block.
        (LOW, None, 0.0, "any", "review", "unscored"),
        (HIGH, None, None, "any", "block", "arms/gun"),
        (None, 0.0, 0.0, "any", "review", "unscored"),
        (None, 0.95, 0.0, "any", "block", "sexual/nudity"),
        # At the threshold itself.
        (LOW, 0.4, 0.0, "any", "review", "sexual/nudity"),
        (LOW, 0.9, 0.0, "any", "block", "sexual/nudity"),
    ],
)
def test_how_scores_combine(
    margin: float | None, nsfw: float | None, arms: float | None, combine: str, decision: str, reason: str | None
) -> None:
    found = [detection("nsfw", nsfw), detection("arms", arms)]
    assert moderate(margin, found, combine=combine)[:2] == (decision, reason)


def test_the_row_shows_what_each_detector_said() -> None:
    _, _, labels = moderate(LOW, [detection("arms", 0.6), detection("nsfw", 0.5)])
    shown = [(label["label"], label["detector"], label["decision"]) for label in labels]
    assert shown == [("gun", None, "allow"), ("nudity", "nsfw", "review"), ("gun", "arms", "review")]
    nudity = labels[1]
    assert (nudity["score"], nudity["review_threshold"], nudity["block_threshold"]) == (
        pytest.approx(0.5),
        pytest.approx(0.4),
        pytest.approx(0.9),
    )
    assert (nudity["view"], nudity["margin"], nudity["probability"]) == ("center", None, None)


@pytest.mark.parametrize("found", [None, [], [detection("nsfw", 0.0)]])
def test_a_detector_that_did_not_run_means_review(found: list[dict[str, Any]] | None) -> None:
    assert moderate(LOW, found)[:2] == ("review", "unscored")


def test_scores_of_another_model_do_not_count() -> None:
    found = [detection("nsfw", 0.0, model="another"), detection("arms", 0.0)]
    assert moderate(LOW, found)[:2] == ("review", "unscored")


@pytest.mark.parametrize("combine", ["any", "confirm", "replace"])
def test_an_unbound_policy_reviews_everything(combine: str) -> None:
    for score in (0.0, 0.95):
        found = [detection("nsfw", 0.95), detection("arms", score)]
        assert moderate(LOW, found, combine=combine, bound=False)[:2] == ("review", "unbound")


def test_labels_and_detectors_must_fit() -> None:
    good = policy("any").model_dump(mode="json", exclude_defaults=True)
    wrong = [
        ({"category": "toys", "label": "gun"}, "is of category arms, not toys"),
        ({"category": "toys", "label": "doll", "combine": "confirm"}, "has no prompts to confirm"),
    ]
    for change, message in wrong:
        good["detectors"][1]["outputs"]["gun"] = {"review": 0.5, "block": 0.7, **change}
        with pytest.raises(ValueError, match=message):
            Policy.model_validate(good)


def test_scores_that_a_later_attempt_did_not_confirm_decide_nothing_anew() -> None:
    given = policy("any")
    target = Target(given, Moderator(given, bind(given, IDENTITY), AXES, MODELS), "e", "m", "run-2")
    harmless = [detection("nsfw", 0.0), detection("arms", 0.0)]
    failures = ([], [{"stage": "detect", "class": "task_failed", "message": ""}], None)
    row = {"policy_digest": "before", "embed_run_id": "run-1", "embed_fingerprint": "e", "detections": harmless}
    rows = pa.Table.from_pylist(
        [row | {"errors": errors} for errors in failures], pa.schema([schema.IMAGES.field(name) for name in SCANNED])
    )
    wanted = wanted_rows(rows, target)
    assert wanted.computed.tolist() == [True, False, True]
    assert wanted.undetected.tolist() == [False, True, False]


def test_under_a_policy_without_detectors_one_that_failed_makes_no_row_partial() -> None:
    """Its scores of an earlier attempt go with the error: a policy with detectors must not take them for good ones."""
    given = policy("any")
    without = Policy.model_validate(given.model_dump(mode="json", exclude={"detectors"}))
    target = Target(without, Moderator(without, bind(without, IDENTITY), AXES, {}), "e", "m", "run-2")
    harmless = [detection("nsfw", 0.0), detection("arms", 0.0)]
    failed = {"class": "task_failed", "message": ""}
    errors = [
        [],
        [{"stage": "detect", **failed}],
        [{"stage": "detect", **failed}, {"stage": "caption", **failed}],
        [{"stage": "read", **failed}, {"stage": "detect", **failed}],
    ]
    row = {"policy_digest": "before", "embed_run_id": "r", "embed_fingerprint": "e", "image_id": "0" * 32}
    row |= {"detections": harmless, "decision": "review", "uri": "a", "run_id": "r", "ingest_date": DATE}
    statuses = ["ok", "partial", "partial", "failed"]
    named = [row | {"errors": of_row, "status": status} for of_row, status in zip(errors, statuses, strict=True)]
    columns = pa.schema([schema.IMAGES.field(name) for name in named[0]])
    rows = conform(pa.Table.from_pylist(named, columns), schema.IMAGES)
    moved, changes = relabel(rows, wanted_rows(rows, target), target, ())
    assert changes.num_moved == 4
    assert moved["status"].to_pylist() == ["ok", "ok", "partial", "failed"]
    assert [[error["stage"] for error in of_row] for of_row in moved["errors"].to_pylist()] == [
        [],
        [],
        ["caption"],
        ["read"],
    ]
    assert is_valid(moved["detections"]).tolist() == [True, False, False, False]
    back = Target(given, Moderator(given, bind(given, IDENTITY), AXES, MODELS), "e", "m", "run-3")
    assert wanted_rows(moved, back).undetected.tolist() == [False, True, True, True]
