"""The figures of an explanation give the decision: values against thresholds, and what is said of exceptions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console

from vlmflow import schema
from vlmflow.explain import EVIDENCE_COLUMNS, Evidence, _chosen, evidence_of
from vlmflow.models import ModelIdentity
from vlmflow.moderation.decide import DECISIONS, Moderator
from vlmflow.moderation.detections import why_not
from vlmflow.moderation.policy import Policy, bind
from vlmflow.views_moderation import print_evidence

IDENTITY = ModelIdentity("org/clip", "local", "a" * 64, "[32]", 1)
LEVELS = (0.2, 0.5, 0.8)


def explained(rng: np.random.Generator, combine: str) -> Evidence:
    def limits() -> dict[str, Any]:
        review, block = sorted(rng.choice(LEVELS, 2))
        return {"review": float(review), "block": None if rng.random() < 0.2 else float(block)}

    fed = {f"o{number}": {"category": "c", "label": f"l{number}", "combine": combine, **limits()} for number in (0, 1)}
    policy = Policy.model_validate(
        {
            "name": "random",
            "version": "1",
            "neutral": ["n"],
            "categories": [{"name": "c", "labels": [{"name": n, "prompts": ["p"], **limits()} for n in ("l0", "l1")]}],
            "logistic": {"scale": 10.0, "offset": 0.0},
            "detectors": [{"name": "d", "family": "opennsfw", "outputs": fed}],
        }
    )
    scores = [None if rng.random() < 0.1 else float(rng.choice([*LEVELS, rng.random()])) for _ in fed]
    found = [
        {"detector": "d", "model": "m", "output": name, "score": score, "view": "squash", "time_s": None}
        for name, score in zip(fed, scores, strict=True)
    ]
    moderator = Moderator(policy, bind(policy, IDENTITY), None, {"d": "m"})
    margins = rng.normal(0, 0.15, (1, 2)).astype(np.float32)
    result = moderator.decide(
        margins, pa.array(["squash"] * 2), detections=pa.array([found], pa.list_(schema.DETECTION))
    )
    row: dict[str, Any] = dict.fromkeys(EVIDENCE_COLUMNS)
    row |= {"image_id": "i", "uri": "u", "status": "ok", "run_id": "r", "labels": result.labels.to_pylist()[0]}
    row |= {"decision": result.decision[0].as_py(), "decision_reason": result.reason[0].as_py()}
    return evidence_of(row)


def by_figures(evidence: Evidence) -> str:
    """What a reader of the table makes of it."""
    said = [0]
    for label in evidence.labels:
        note = why_not(label, evidence.labels, *evidence.by_model)
        value, block = label["score"], label["block_threshold"]
        if value is None:
            said.append(1)
        elif not note.startswith("does not count"):
            blocks = block is not None and value >= block and not note
            said.append(2 if blocks else int(value >= label["review_threshold"]))
    return DECISIONS[max(said)]


def test_the_figures_and_what_is_said_of_them_give_the_decision() -> None:
    notes = set()
    for seed in range(600):
        combine = ("any", "confirm", "replace")[seed % 3]
        evidence = explained(np.random.default_rng(seed), combine)
        assert by_figures(evidence) == evidence.decision, (seed, evidence)
        said = {why_not(label, evidence.labels, *evidence.by_model) for label in evidence.labels}
        notes |= {(combine, note) for note in said if note}
        if evidence.decision_reason not in (None, "unscored"):
            assert _chosen(evidence, None)["decision"] == evidence.decision, "a map is of what decided"
    assert notes == {
        ("confirm", "its prompts do not confirm block"),
        ("replace", "does not count: d replaces it"),
    }


def test_an_allowed_image_whose_prompts_say_block_says_why() -> None:
    labels: list[dict[str, Any]] = [
        {"label": "gun", "category": "weapon", "score": 0.9, "decision": "block", "block_threshold": 0.8},
        {"label": "gun", "category": "weapon", "score": 0.1, "decision": "allow", "detector": "judge"},
    ]
    full = [dict.fromkeys(field.name for field in schema.LABEL) | label for label in labels]
    row: dict[str, Any] = dict.fromkeys(EVIDENCE_COLUMNS)
    row |= {"image_id": "i", "uri": "u", "status": "ok", "run_id": "r", "labels": full, "decision": "allow"}
    console = Console(record=True, width=160)
    print_evidence(evidence_of(row), console)
    assert "weapon/gun by prompts: does not count: judge replaces it" in console.export_text()
    row |= {"decision": "review", "decision_reason": "unreadable"}  # the object cannot be read: no label decides
    print_evidence(evidence_of(row), console)
    assert "replaces" not in console.export_text()
