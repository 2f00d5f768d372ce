"""What the scores of detectors mean under a policy: decisions of their own, joined with those of the prompts.

S: images of which there are scores of either kind, L: labels with prompts, R: rules, one for each output of a detector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from vlmflow import schema
from vlmflow.catalog.detections import Detection, holds_all, places_of
from vlmflow.catalog.rows import FAILED, UNREADABLE, UNSCORED
from vlmflow.moderation.policy import DetectorOutput, Policy

_ALLOW, _REVIEW, _BLOCK = 0, 1, 2
DECISION_NAMES = ("allow", "review", "block")
_OF_IMAGE = (UNREADABLE, FAILED, UNSCORED)  # reasons for which labels, whatever they say, do not decide


def name_of(label: Mapping[str, Any]) -> str:
    """What an entry of a row's labels goes by: its label, or ``label (detector)`` where a detector gave the score."""
    name: str = label["label"]
    return name if label["detector"] is None else f"{name} ({label['detector']})"


def why_not(label: Mapping[str, Any], labels: Sequence[Mapping[str, Any]], decision: str, reason: str | None) -> str:
    """Why an entry of a row's labels decides less than its figures say; empty: it does not.

    Args:
        labels: all of the row.
        decision, reason: of the row, by the model.
    """
    if label["detector"] is not None:
        limit = label["block_threshold"]
        reached = None not in (limit, label["score"]) and label["score"] >= limit
        return "its prompts do not confirm block" if reached and label["decision"] == "review" else ""
    graver = DECISION_NAMES[DECISION_NAMES.index(decision) + 1 :] if decision in DECISION_NAMES else ()
    if label["decision"] not in graver or reason in _OF_IMAGE:
        return ""
    detectors = [
        o["detector"] for o in labels if o["detector"] and o["label"] == label["label"] and o["score"] is not None
    ]
    return f"does not count: {' or '.join(dict.fromkeys(detectors))} replaces it" if detectors else ""


@dataclass(frozen=True)
class _Rule:
    reads: Detection
    means: DetectorOutput
    label: int | None  # number of the label with prompts that it goes with


@dataclass(frozen=True, eq=False)
class Detected:
    """What the detectors say of N images. Decisions are numbers of DECISION_NAMES."""

    labels: pa.StructArray  # (N * R,) of schema.LABEL, image by image
    decisions: NDArray[np.int64]  # (N, R); an output without a score is `review`
    scored: NDArray[np.bool_]  # (N, R)
    values: NDArray[np.float32]  # (N, R) scores; not a number where there is none


class DetectorRules:
    """A policy's detectors, made ready to decide.

    Args:
        models: by the detector's name, the fingerprint that its scores must carry; scores of others do not count.
    """

    def __init__(self, policy: Policy, models: Mapping[str, str]) -> None:
        numbers = {ref.label: number for number, ref in enumerate(policy.labels)}
        self.rules = tuple(
            _Rule(Detection(detector.name, models[detector.name], output), means, numbers.get(means.label))
            for detector in policy.detectors
            for output, means in detector.outputs.items()
        )
        self._reads = tuple(rule.reads for rule in self.rules)
        self.names = tuple(f"{rule.means.category}/{rule.means.label}" for rule in self.rules)

    def __len__(self) -> int:
        return len(self.rules)

    def held(self, detections: pa.Array | pa.ChunkedArray) -> NDArray[np.bool_]:
        """(N,) the rows that have a score for every rule."""
        return holds_all(detections, self._reads)

    def apply(
        self, detections: pa.Array | pa.ChunkedArray | None, num_images: int, prompts: NDArray[np.int64]
    ) -> Detected:
        """Decides by scores.

        Args:
            detections: N lists of schema.DETECTION; None: no detector ran.
            prompts: (N, L) decisions by prompts; -1: the image has none.
        """
        if detections is None:
            detections = pa.nulls(num_images, pa.list_(schema.DETECTION))
        items, place = places_of(detections, self._reads)
        taken = items.take(pa.array(place.ravel(), mask=place.ravel() < 0))
        values = np.asarray(pc.fill_null(pc.struct_field(taken, "score"), np.nan), np.float32).reshape(place.shape)
        scored = ~np.isnan(values)
        decisions = np.full(values.shape, _REVIEW)
        for number, rule in enumerate(self.rules):
            decisions[:, number] = _decide(rule, values[:, number], prompts)
        return Detected(self._structs(values, decisions, taken, num_images), decisions, scored, values)

    def overruled(self, detected: Detected, num_labels: int) -> NDArray[np.bool_]:
        """(N, L) labels whose prompts do not count, because a detector that replaces them gave its score."""
        marks = np.zeros((len(detected.decisions), num_labels), dtype=np.bool_)
        for number, rule in enumerate(self.rules):
            if rule.means.combine == "replace" and rule.label is not None:
                marks[:, rule.label] |= detected.scored[:, number]
        return marks

    def _structs(
        self, values: NDArray[np.float32], decisions: NDArray[np.int64], taken: pa.StructArray, num_images: int
    ) -> pa.StructArray:
        count = num_images * len(self.rules)

        def repeated(value: list[Any], kind: pa.DataType) -> pa.Array:
            return pa.array(value * num_images, kind)

        means = [rule.means for rule in self.rules]
        columns: dict[str, pa.Array] = {
            "label": repeated([mean.label for mean in means], pa.string()),
            "category": repeated([mean.category for mean in means], pa.string()),
            "margin": pa.nulls(count, pa.float32()),
            "score": pa.array(values.ravel(), pa.float32(), from_pandas=True),
            "probability": pa.nulls(count, pa.float32()),
            "review_threshold": repeated([mean.review for mean in means], pa.float32()),
            "block_threshold": repeated([mean.block for mean in means], pa.float32()),
            "decision": pa.array(DECISION_NAMES, pa.string()).take(pa.array(decisions.ravel())),
            "view": pc.struct_field(taken, "view"),
            "time_s": pc.struct_field(taken, "time_s"),
            "detector": repeated([rule.reads.detector for rule in self.rules], pa.string()),
        }
        return pa.StructArray.from_arrays([columns[field.name] for field in schema.LABEL], fields=list(schema.LABEL))


def _decide(rule: _Rule, values: NDArray[np.float32], prompts: NDArray[np.int64]) -> NDArray[np.int64]:
    decisions = np.where(values >= np.float32(rule.means.review), _REVIEW, _ALLOW)
    if rule.means.block is not None:
        decisions[values >= np.float32(rule.means.block)] = _BLOCK
    if rule.means.combine == "confirm" and rule.label is not None:
        # Where the prompts found nothing, a person looks; where they were not asked, they refute nothing.
        decisions[(decisions == _BLOCK) & (prompts[:, rule.label] == _ALLOW)] = _REVIEW
    decisions[np.isnan(values)] = _REVIEW  # fails closed
    return decisions
