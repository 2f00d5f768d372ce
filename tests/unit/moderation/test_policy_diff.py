"""Differences of policies, and what they imply for a catalog."""

from __future__ import annotations

from typing import Any

import pytest

from vlmflow.models import ModelIdentity
from vlmflow.moderation.diff import PolicyDiff, diff_policies
from vlmflow.moderation.policy import Logistic, Policy, Thresholds, bind

CLIP = ModelIdentity("org/clip", "local", "a" * 64, "[32]", 1)


def policy(*, gun: dict[str, Any] | None = None, bound: bool = False, **changes: Any) -> Policy:
    label = {"name": "gun", "prompts": ["a gun", "two guns"], "review": 0.5, "block": 0.8, **(gun or {})}
    wine = {"name": "wine", "prompts": ["wine"], "review": 0.6, "block": None}
    data: dict[str, Any] = {
        "name": "test",
        "version": "1",
        "neutral": ["a banana", "a car"],
        "logistic": {"scale": 40.0, "offset": 0.1},
    }
    data["categories"] = [{"name": "weapons", "labels": [label]}, {"name": "alcohol", "labels": [wine]}]
    made = Policy.model_validate(data | changes)
    return made.model_copy(update={"bindings": (bind(made, CLIP),)}) if bound else made


def moved(found: PolicyDiff) -> set[tuple[str, str, Any, Any]]:
    return {(change.where, change.what, change.before, change.after) for change in found.changes}


def test_equal_policies_differ_in_nothing() -> None:
    found = diff_policies(policy(bound=True), policy(bound=True))
    assert (found.effect, found.changes, found.prompts, found.labels_added, found.labels_removed) == (
        "none",
        (),
        (),
        (),
        (),
    )


def test_thresholds_need_the_stored_margins_alone() -> None:
    found = diff_policies(policy(), policy(gun={"review": 0.4, "block": None}))
    assert moved(found) == {("gun", "review", 0.5, 0.4), ("gun", "block", 0.8, None)}
    assert found.effect == "margins"
    assert "without any model" in found.implies


@pytest.mark.parametrize(
    ("gun", "expected"),
    [
        ({"severity": "high"}, ("gun", "severity", None, "high")),
        ({"actions": {"block": ["hide", "report"]}}, ("gun", "actions on block", None, "hide, report")),
        ({"external": {"azure": ["Violence"]}}, ("gun", "name at azure", None, "Violence")),
    ],
)
def test_what_is_carried_for_readers_is_shown_and_decides_nothing(
    gun: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    found = diff_policies(policy(), policy(gun=gun))
    assert moved(found) == {expected}
    assert found.effect == "none"


def test_prompts_need_the_text_encoder_and_void_the_binding() -> None:
    found = diff_policies(policy(bound=True), policy(gun={"prompts": ["a gun", "a rifle"]}, neutral=["a car", "a dog"]))
    changes = {change.where: (change.added, change.removed) for change in found.prompts}
    assert changes == {"gun": (("a rifle",), ("two guns",)), "neutral": (("a dog",), ("a banana",))}
    assert (found.effect, found.lost_bindings) == ("text", ("org/clip",))
    assert "no image is read" in found.implies


def test_prompts_in_another_order_are_shown_for_what_they_are() -> None:
    found = diff_policies(policy(), policy(gun={"prompts": ["two guns", "a gun"]}))
    assert [(change.where, change.reordered) for change in found.prompts] == [("gun", True)]
    assert found.effect == "text"


def test_labels_come_go_and_are_renamed() -> None:
    more = [{"name": "weapons", "labels": [{"name": "blade", "prompts": ["a knife"], "review": 0.5, "block": None}]}]
    found = diff_policies(policy(), policy(categories=more))
    assert (found.labels_added, found.labels_removed, found.renamed) == (("blade",), ("gun", "wine"), ())
    renamed = diff_policies(policy(), policy(gun={"name": "firearm", "review": 0.4}))
    assert (renamed.labels_added, renamed.labels_removed, renamed.renamed) == ((), (), (("gun", "firearm"),))
    assert moved(renamed) == {("firearm", "review", 0.5, 0.4)}
    assert renamed.effect == "text"


def test_what_was_set_for_a_model_is_compared_value_by_value() -> None:
    base = policy()
    one = bind(base, CLIP, thresholds={"gun": Thresholds(review=0.3, block=0.9)})
    two = bind(
        base,
        CLIP,
        thresholds={"gun": Thresholds(review=0.2, block=0.9)},
        calibration={"gun": Logistic(scale=9.0, offset=0.2)},
    )
    before, after = (base.model_copy(update={"bindings": (binding,)}) for binding in (one, two))
    found = diff_policies(before, after)
    where = f"binding of org/clip ({'a' * 12})"
    assert moved(found) == {
        (where, "gun review", 0.3, 0.2),
        (where, "gun calibrated scale", None, 9.0),
        (where, "gun calibrated offset", None, 0.2),
    }
    assert (found.effect, found.lost_bindings) == ("margins", ())


def test_a_label_in_another_category_needs_no_model() -> None:
    data = policy().model_dump(mode="json")["categories"]
    data[1]["labels"] += data[0]["labels"]
    both = [{"name": "weapons", "labels": data[0]["labels"]}, {"name": "drink", "labels": data[1]["labels"][:1]}]
    found = diff_policies(policy(), policy(categories=both))
    assert moved(found) == {("wine", "category", "alcohol", "drink")}
    assert found.effect == "margins"


def detector(**changes: Any) -> dict[str, Any]:
    output = {"category": "sexual", "label": "nudity", "review": 0.4, "block": 0.8}
    given = {name: changes.pop(name) for name in list(changes) if name in output or name == "combine"}
    return {"name": "opennsfw", "family": "opennsfw", "outputs": {"nsfw": output | given}, **changes}


def test_a_new_detector_needs_the_images_and_its_thresholds_do_not() -> None:
    without, having = policy(), policy(detectors=[detector()])
    added = diff_policies(without, having)
    assert added.effect == "pixels"
    assert ("policy", "opennsfw.nsfw review", None, 0.4) in moved(added)
    assert diff_policies(having, without).effect == "margins"
    lower = diff_policies(having, policy(detectors=[detector(review=0.2)]))
    assert (lower.effect, moved(lower)) == ("margins", {("policy", "opennsfw.nsfw review", 0.4, 0.2)})
    other = policy(detectors=[detector(family="image_classification", path="models/nsfw")])
    assert diff_policies(having, other).effect == "pixels"


def test_a_detector_of_other_weights_needs_the_images() -> None:
    one, other = (policy(detectors=[detector(weights=digit * 64)]) for digit in "ab")
    found = diff_policies(one, other)
    assert (found.effect, moved(found)) == ("pixels", {("policy", "opennsfw weights", "a" * 12, "b" * 12)})
    pinned = diff_policies(policy(detectors=[detector()]), one)
    assert (pinned.effect, moved(pinned)) == ("margins", {("policy", "opennsfw weights", None, "a" * 12)})
    hub = {"family": "image_classification", "repo": "org/nsfw"}
    one, other = (policy(detectors=[detector(revision=commit, **hub)]) for commit in ("c1", "c2"))
    found = diff_policies(one, other)
    assert (found.effect, moved(found)) == ("pixels", {("policy", "opennsfw revision", "c1", "c2")})


def test_bindings_of_the_same_weights_for_other_prompts_are_compared_each_with_its_own() -> None:
    base, asked = policy(), policy(gun={"prompts": ["a rifle"]})
    now, old = bind(base, CLIP), bind(asked, CLIP)
    stricter = bind(base, CLIP, thresholds={"gun": Thresholds(review=0.2, block=0.9)})
    before, after = (base.model_copy(update={"bindings": found}) for found in ((now, old), (stricter, old)))
    where = f"binding of org/clip ({'a' * 12}, prompts {now.prompts[:12]})"
    assert moved(diff_policies(before, after)) == {(where, "gun review", None, 0.2), (where, "gun block", None, 0.9)}
    gone = diff_policies(before, base.model_copy(update={"bindings": (now,)}))
    where = where.replace(now.prompts[:12], old.prompts[:12])
    assert moved(gone) == {(where, "model", "org/clip", None), (where, "prompts", old.prompts[:12], None)}
    # The prompts of the one binding changed, and its model goes by another name.
    local = now.model_copy(update={"model": "clip", "prompts": old.prompts})
    one, other = (base.model_copy(update={"bindings": (found,)}) for found in (now, local))
    where = f"binding of org/clip ({'a' * 12})"
    changed = {(where, "model", "org/clip", "clip"), (where, "prompts", now.prompts[:12], old.prompts[:12])}
    assert moved(diff_policies(one, other)) == changed
