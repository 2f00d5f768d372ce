"""Whatever the policy: moderated from stored vectors, margins and detections, rows are those of the online run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmflow import schema
from vlmflow.catalog.columns import conform
from vlmflow.imaging.frames import split_views
from vlmflow.models import ModelIdentity
from vlmflow.moderation.decide import Moderation, Moderator
from vlmflow.moderation.policy import Policy, bind
from vlmflow.moderation.prompts import PromptVectors
from vlmflow.moderation.relabel import Target, relabel, score_vectors, wanted_rows

DIM = 16
IDENTITY = ModelIdentity("org/clip", "local", "a" * 64, "[32]", 1)
MODELS = {"d": "model-d"}
MODERATION = ("labels", "decision", "decision_reason")
KINDS = (
    ["squash"],
    ["squash", "center"],
    ["squash", "center", "tile-1", "tile-2", "tile-3"],
    ["squash", "black"],
    ["squash", "frame-1@0.100", "frame-2@1.233", "frame-3@60.007"],
    [],
)


def unit(rng: np.random.Generator, count: int) -> Any:
    vectors = rng.normal(size=(count, DIM))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@st.composite
def policies(draw: st.DrawFn, num_labels: int, version: str) -> Policy:
    def limits() -> dict[str, Any]:
        review = draw(st.floats(0, 1))
        return {"review": review, "block": draw(st.none() | st.floats(review, 1))}

    labels = [{"name": f"l{number}", "prompts": ["p"], **limits()} for number in range(num_labels)]
    combine = draw(st.sampled_from(["any", "confirm", "replace"]))
    output = {"category": "c", "label": "l0", "combine": combine, **limits()}
    detectors = [{"name": "d", "family": "opennsfw", "outputs": {"nsfw": output}}] if draw(st.booleans()) else []
    return Policy.model_validate(
        {
            "name": "random",
            "version": version,
            "neutral": ["n"],
            "categories": [{"name": "c", "labels": labels}],
            "logistic": {"scale": draw(st.floats(0.5, 30)), "offset": draw(st.floats(-0.5, 0.5))},
            "detectors": detectors,
        }
    )


def moderator(policy: Policy, prompts: PromptVectors | None) -> Moderator:
    return Moderator(policy, bind(policy, IDENTITY), prompts, MODELS)


def target(policy: Policy, prompts: PromptVectors | None, same: tuple[str, ...] = ()) -> Target:
    return Target(policy, moderator(policy, prompts), "e", "m", "run-2", same_margins=same)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), seed=st.integers(0, 10_000), kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=12))
def test_rows_are_equal_to_the_bit(data: st.DataObject, seed: int, kinds: list[list[str]]) -> None:
    rng = np.random.default_rng(seed)
    num_labels = data.draw(st.integers(1, 4))
    before = data.draw(policies(num_labels, "1"))
    after = data.draw(policies(num_labels, "2"))
    prompts = PromptVectors(unit(rng, num_labels), unit(rng, 3), 0.05, "digest")
    views = [name for kind in kinds for name in kind]
    vectors = unit(rng, len(views))
    offsets = np.concatenate([[0], np.cumsum([len(kind) for kind in kinds])]).astype(np.int64)
    found = [
        [
            {
                "detector": "d",
                "model": "model-d",
                "output": "nsfw",
                "score": float(score),
                "view": "squash",
                "time_s": None,
            }
        ]
        for score in rng.random(len(kinds)).astype(np.float32)
    ]
    detections = pa.array(found, pa.list_(schema.DETECTION))
    unseen = rng.random(len(kinds)) < 0.2
    errors = pa.array(
        [[{"stage": "frames", "class": "frames_unseen", "message": ""}] if mark else [] for mark in unseen],
        schema.ERRORS,
    )

    def online(policy: Policy) -> Moderation:
        return moderator(policy, prompts).moderate(vectors, views, offsets, detections, unseen)

    old, new = online(before), online(after)
    ids = [f"{number:032x}" for number in range(len(kinds))]
    has = [len(kind) > 0 for kind in kinds]
    images = conform(
        pa.table(
            {
                "image_id": ids,
                "uri": ids,
                "status": ["ok"] * len(ids),
                "errors": errors,
                "labels": old.labels,
                "decision": old.decision,
                "decision_reason": old.reason,
                "detections": detections,
                "policy_digest": [before.digest] * len(ids),
                "embed_run_id": ["run-1"] * len(ids),
                "embed_fingerprint": ["e"] * len(ids),
                "moderate_fingerprint": ["m" if one else None for one in has],
                "run_id": ["run-1"] * len(ids),
                "ingest_date": pa.array([0] * len(ids), pa.int32()).cast(pa.date32()),
            }
        ),
        schema.IMAGES,
    )
    names, times = split_views(pa.array(views, pa.string()))
    owners = np.repeat(np.arange(len(kinds)), np.diff(offsets))
    stored = pa.table(
        {
            "image_id": pa.array([ids[owner] for owner in owners], pa.string()),
            "embed_run_id": pa.array(["run-1"] * len(views), pa.string()),
            "embed_fingerprint": pa.array(["e"] * len(views), pa.string()),
            "view": names,
            "time_s": times,
            "vector": pa.array(list(vectors), pa.list_(pa.float32())),
        }
    )
    # The images of a file of vectors stand in any order, the views of each together; or, where another program has
    # rewritten the table, all rows in any order, and in several files.
    if data.draw(st.booleans()):
        parts = np.array_split(rng.permutation(len(views)), 3)
    else:
        parts = [np.concatenate([np.flatnonzero(owners == image) for image in rng.permutation(len(kinds))])]
    shuffled = [stored.take(pa.array(part.astype(np.int64))) for part in parts]
    expected = {"labels": new.labels, "decision": new.decision, "decision_reason": new.reason}

    by_vectors = target(after, prompts)
    scored = tuple(score_vectors(part, by_vectors) for part in shuffled)
    from_vectors, changes = relabel(images, wanted_rows(images, by_vectors), by_vectors, scored)
    if before.digest != after.digest:
        assert changes.num_moved == len(kinds)
        for name in MODERATION:
            assert from_vectors[name].to_pylist() == expected[name].to_pylist(), name

    # Thresholds alone: the margins in the rows do, and no vector is read.
    by_margins = target(after, None, same=(before.digest,))
    moved = images.filter(pa.array(has))
    from_margins, changes = relabel(moved, wanted_rows(moved, by_margins), by_margins, ())
    if before.digest != after.digest:
        assert changes.num_from_margins == sum(has)
        for name in MODERATION:
            assert from_margins[name].to_pylist() == expected[name].filter(pa.array(has)).to_pylist(), name


@pytest.mark.parametrize(
    "damage", [None, [], [0.5], [0.1] * (DIM + 1), [float("nan")] * DIM], ids=["null", "empty", "short", "long", "nan"]
)
def test_an_image_with_a_vector_that_is_none_is_not_scored_and_others_are(damage: list[float] | None) -> None:
    label = {"name": "l", "prompts": ["p"], "review": 1.0, "block": None}
    held = {"name": "p", "version": "1", "neutral": ["n"], "logistic": {"scale": 1.0, "offset": 0.0}}
    policy = Policy.model_validate(held | {"categories": [{"name": "c", "labels": [label]}]})
    rng = np.random.default_rng(0)
    ids = [f"{number:032x}" for number in (0, 0, 1)]
    vectors = [*unit(rng, 1).tolist(), damage, *unit(rng, 1).tolist()]
    stored = pa.table(
        {
            "image_id": ids,
            "embed_run_id": ["run-1"] * 3,
            "embed_fingerprint": ["e"] * 3,
            "view": ["squash", "center", "squash"],
            "time_s": pa.nulls(3, pa.float32()),
            "vector": pa.array(vectors, pa.list_(pa.float32())),
        }
    )
    prompts = PromptVectors(unit(rng, 1), unit(rng, 2), 0.05, "digest")
    scored = score_vectors(stored, target(policy, prompts))
    assert np.isnan(scored.margins[:, 0]).tolist() == [True, False]
