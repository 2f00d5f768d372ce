"""Labels and decisions against the rules of policies/README.md, written once more, slowly: one image, one label a time.

Scores lie at the very edge of thresholds, some are no numbers, absent, or of another model; several detectors feed a
label.
"""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from vlmflow import schema
from vlmflow.models import ModelIdentity
from vlmflow.moderation.decide import DECISIONS, Moderator
from vlmflow.moderation.policy import Binding, Logistic, Policy, Thresholds, bind

IDENTITY = ModelIdentity("org/clip", "local", "a" * 64, "[32]", 1)
NO_SCORE = math.nan


def limits(draw: random.Random) -> dict[str, Any]:
    review = draw.choice([0.0, 0.3, 0.5, 0.7, 1.0, draw.random()])
    return {"review": review, "block": draw.choice([None, review, 1.0, draw.uniform(review, 1)])}


def random_policy(draw: random.Random) -> Policy:
    names = {f"c{number}": [f"l{number}{one}" for one in range(draw.randint(1, 2))] for number in range(2)}
    refs = [(category, label) for category, labels in names.items() for label in labels]
    detectors = []
    for number in range(draw.randint(0, 3)):
        outputs = {}
        for output in range(draw.randint(1, 2)):
            (category, label), combine = draw.choice(refs), draw.choice(["any", "confirm", "replace"])
            if draw.random() < 0.2:  # a label without prompts
                category, label, combine = "c0", "unasked", "any"
            outputs[f"o{output}"] = {"category": category, "label": label, "combine": combine, **limits(draw)}
        detectors.append({"name": f"d{number}", "family": "opennsfw", "outputs": outputs})
    categories = [
        {"name": category, "labels": [{"name": label, "prompts": ["p"], **limits(draw)} for label in labels]}
        for category, labels in names.items()
    ]
    logistic = {"scale": draw.choice([1.0, 20.0, 1e6]), "offset": draw.choice([0.0, 0.1])}
    return Policy.model_validate(
        {"name": "p", "version": "1", "neutral": ["n"], "categories": categories, "logistic": logistic}
        | {"detectors": detectors}
    )


def random_binding(draw: random.Random, policy: Policy) -> Binding:
    names = [ref.label for ref in policy.labels]
    curves = {name: Logistic(scale=draw.uniform(1, 30), offset=draw.uniform(-0.2, 0.2)) for name in names}
    return bind(
        policy,
        IDENTITY,
        thresholds={name: Thresholds(**limits(draw)) for name in names if draw.random() < 0.4},
        calibration={name: curves[name] for name in names if draw.random() < 0.4},
    )


def random_scores(draw: random.Random, policy: Policy) -> list[dict[str, Any]] | None:
    """Of the image's detectors: at an edge, just below it, anywhere, no number, none, or another model's."""
    found = []
    for detector in policy.detectors:
        for name, means in detector.outputs.items():
            edge = np.float32(draw.choice([means.review, means.block or 0.5]))
            below = np.nextafter(edge, np.float32(-1))
            score = draw.choice([0.0, 1.0, float(edge), float(below), draw.random(), NO_SCORE, None])
            model = draw.choice(["now", "now", "now", "now", "before"])
            if draw.random() < 0.9:
                where = {"detector": detector.name, "model": model, "output": name}
                found.append(where | {"score": score, "view": "squash", "time_s": None})
    draw.shuffle(found)
    return None if draw.random() < 0.1 else found


def level(value: float, limit: Any) -> int:
    if math.isnan(value):
        return 1
    return 2 if limit.block is not None and value >= np.float32(limit.block) else int(value >= np.float32(limit.review))


def by_rule(
    policy: Policy, binding: Binding, margins: NDArray[np.float32] | None, scores: list[dict[str, Any]] | None
) -> tuple[list[str], str, str | None]:
    """The decision on each label, that on the image, and its reason."""
    prompts: dict[str, tuple[int, float]] = {}
    for label, margin in zip(policy.each_label(), [] if margins is None else margins.tolist(), strict=False):
        curve = binding.calibration.get(label.name, policy.logistic)
        power = min(max(-curve.scale * (margin - curve.offset), -700), 700) if not math.isnan(margin) else math.nan
        value = float(np.float32(1 / (1 + np.exp(power))))
        prompts[label.name] = level(value, binding.thresholds.get(label.name, label)), value
    detected = []
    for detector in policy.detectors:
        for output, means in detector.outputs.items():
            wanted = (detector.name, "now", output)
            fitting = [one["score"] for one in scores or [] if (one["detector"], one["model"], one["output"]) == wanted]
            value = NO_SCORE if not fitting or fitting[0] is None else float(np.float32(fitting[0]))
            said = level(value, means)
            if said == 2 and means.combine == "confirm" and prompts.get(means.label, (1, 0.0))[0] == 0:
                said = 1
            detected.append((means, said, value))
    replaced = {means.label for means, _, value in detected if means.combine == "replace" and not math.isnan(value)}
    counted = [
        (0 if ref.label in replaced else prompts[ref.label][0], prompts[ref.label][1], "/".join(ref))
        for ref in policy.labels
        if prompts
    ]
    decision, reason = gravest(counted) if prompts else (1, "unscored")
    raised, because = gravest([(said, value, f"{means.category}/{means.label}") for means, said, value in detected])
    if raised > decision:
        decision, reason = raised, because
    labels = [said for said, _ in prompts.values()] + [said for _, said, _ in detected]
    return [DECISIONS[said] for said in labels], DECISIONS[decision], reason


def gravest(said: list[tuple[int, float, str]]) -> tuple[int, str | None]:
    most = max((one for one, _, _ in said), default=0)
    of_these = [(value, name) for one, value, name in said if one == most and not math.isnan(value)]
    if most == 0:
        return 0, None
    return most, max(of_these, key=lambda one: one[0])[1] if of_these else "unscored"


@pytest.mark.parametrize("first_seed", range(0, 300, 100))
def test_the_rules_give_every_label_decision_and_reason(first_seed: int) -> None:
    for seed in range(first_seed, first_seed + 100):
        draw = random.Random(seed)
        policy = random_policy(draw)
        binding = random_binding(draw, policy)
        moderator = Moderator(policy, binding, None, {detector.name: "now" for detector in policy.detectors})
        scored = np.array([draw.random() < 0.9 for _ in range(6)])
        margins = np.random.default_rng(seed).normal(0, 0.3, (int(scored.sum()), len(policy.labels))).astype(np.float32)
        margins[np.random.default_rng(seed).random(margins.shape) < 0.05] = np.nan
        found = [random_scores(draw, policy) for _ in scored]
        unseen = np.array([draw.random() < 0.1 for _ in scored])
        result = moderator.decide(
            margins,
            pa.array(["squash"] * margins.size, pa.string()),
            scored,
            detections=pa.array(found, pa.list_(schema.DETECTION)),
            unseen=unseen,
        )
        rows = iter(margins)
        for image, has_margins in enumerate(scored.tolist()):
            labels, decision, reason = by_rule(policy, binding, next(rows) if has_margins else None, found[image])
            if unseen[image] and decision == "allow":
                decision, reason = "review", "frames_unseen"
            got = [label["decision"] for label in result.labels[image].as_py() or []]
            assert (got, result.decision[image].as_py(), result.reason[image].as_py()) == (labels, decision, reason), (
                seed,
                image,
            )
