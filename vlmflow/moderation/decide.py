"""Decisions: from the margins of an image's views to its labels and to allow, review or block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vlmflow import schema
from vlmflow.imaging.frames import split_views
from vlmflow.moderation.detections import Detected, DetectorRules
from vlmflow.moderation.policy import Binding, Logistic, Policy
from vlmflow.moderation.prompts import PromptVectors
from vlmflow.moderation.scoring import Scorer

DECISIONS = ("allow", "review", "block")  # in order of precedence: the last wins
UNSCORED = "unscored"
UNBOUND = "unbound"
FRAMES_UNSEEN = "frames_unseen"
_REVIEW, _BLOCK = 1, 2


@dataclass(frozen=True)
class Moderation:
    """One value per image. ``decision`` is never null."""

    labels: pa.ListArray[Any]  # of schema.LABEL; null: the image has no vector
    decision: pa.StringArray
    reason: pa.StringArray  # null: allowed; else `category/label` of what decided, or `unscored`, or `unbound`


class Moderator:
    """A policy made ready to decide. N: images, V: vectors of all their views, L: labels.

    Args:
        binding: what was set for the embedder; None: every decision is `review`, with the reason `unbound`.
        prompts: None: it decides by margins alone.
        detectors: by name, the fingerprint that the scores of the policy's detectors carry.
    """

    def __init__(
        self,
        policy: Policy,
        binding: Binding | None,
        prompts: PromptVectors | None,
        detectors: Mapping[str, str] | None = None,
    ) -> None:
        if prompts is not None and len(prompts.labels) != len(policy.labels):
            raise ValueError(
                f"{len(prompts.labels)} label vectors for the {len(policy.labels)} labels of {policy.name}"
            )
        self._policy = policy
        self._bound = binding is not None
        self.rules = DetectorRules(policy, detectors or {})
        self._scorer = None if prompts is None else Scorer(prompts)
        self.dim: int = 0 if prompts is None else prompts.labels.shape[1]
        labels = policy.each_label()
        default = (binding.logistic if binding else None) or policy.logistic
        calibration = binding.calibration if binding else {}
        limits = [(binding.thresholds if binding else {}).get(label.name, label) for label in labels]
        self._curves = _curves([default] * len(labels))
        self._calibrated = np.array([label.name in calibration for label in labels])
        self._calibration = _curves([calibration.get(label.name, default) for label in labels])
        self._review = np.array([limit.review for limit in limits], np.float32)
        # A label that never blocks: no score reaches infinity.
        self._block = np.array([np.inf if limit.block is None else limit.block for limit in limits], np.float32)

    def moderate(
        self,
        vectors: NDArray[np.float32],
        views: Sequence[str],
        offsets: NDArray[np.int64],
        detections: pa.ListArray[Any] | None = None,
        unseen: NDArray[np.bool_] | None = None,
    ) -> Moderation:
        """Labels and decides images by the worst of their views.

        Args:
            vectors: (V, D) unit vectors, those of an image next to each other.
            views: (V,) names of the views; of frames with their times, as imaging names them.
            offsets: (N + 1,): image i has the vectors from ``offsets[i]`` to ``offsets[i + 1]``; it may have none.
            detections: (N,) lists of schema.DETECTION; None: no detector ran.
            unseen: (N,) images of which some frames were not looked at; None: there are none.
        """
        has_vectors = np.diff(offsets) > 0
        margins, deciding = self.worst_views(vectors, offsets[:-1][has_vectors])
        names, times = split_views(pa.array(views, pa.string()))
        at = pa.array(deciding.ravel())
        return self.decide(margins, names.take(at), has_vectors, times.take(at), detections, unseen)

    def worst_views(
        self, vectors: NDArray[np.float32], starts: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The greatest margin of each image and label, and the vector that it comes from.

        Args:
            vectors: (V, D) unit vectors, those of an image next to each other.
            starts: (N,): where the vectors of each image begin; each has at least one.

        Returns:
            (N, L) margins, and (N, L) indices into ``vectors``.
        """
        if self._scorer is None:
            raise ValueError("a moderator without prompt vectors scores none")
        return _worst_views(self._scorer.score(vectors), starts)

    def decide_labels(self, margins: NDArray[np.float32]) -> NDArray[np.int64]:
        """(S, L) margins -> (S, L) numbers in :data:`DECISIONS`."""
        scores = _apply(self._curves, margins)
        return self._decide_labels(np.where(self._calibrated, _apply(self._calibration, margins), scores))

    def decide(
        self,
        margins: NDArray[np.float32],
        views: pa.StringArray,
        scored: NDArray[np.bool_] | None = None,
        times: pa.FloatArray | None = None,
        detections: pa.Array[Any] | None = None,
        unseen: NDArray[np.bool_] | None = None,
    ) -> Moderation:
        """Labels and decides images by margins and detections, be they new or stored.

        Args:
            margins: (S, L), of the images that are scored.
            views: (S * L,) names of the views that they come from, image by image.
            scored: (N,) which images those are, S of them; None: all.
            times: (S * L,) seconds of the frames that they come from; None: stills.
            detections: (N,) lists of schema.DETECTION; None: no detector ran.
            unseen: (N,) images of which some frames were not looked at: none of them is allowed. None: there are none.
        """
        scored = np.ones(len(margins), np.bool_) if scored is None else scored
        scores, probabilities = _apply(self._curves, margins), _apply(self._calibration, margins)
        # What thresholds are compared with.
        compared = np.where(self._calibrated, probabilities, scores)
        decisions = self._decide_labels(compared)
        probabilities = np.where(self._calibrated, probabilities, np.float32(np.nan))
        labels = self._label_structs(margins, scores, probabilities, decisions, views, times)
        counts = np.where(scored, len(self._policy.labels), 0)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        detected = None
        counted = decisions
        if len(self.rules):
            of_images = np.full((len(scored), len(self._policy.labels)), -1)
            of_images[scored] = decisions
            detected = self.rules.apply(detections, len(scored), of_images)
            if self._bound:  # else everything is `review`, which no detector lowers
                counted = np.where(self.rules.overruled(detected, len(self._policy.labels))[scored], 0, decisions)
            labels, offsets = _interleaved(labels, offsets, detected.labels, len(self.rules))
        image_decisions = np.full(len(scored), _REVIEW)
        image_decisions[scored] = counted.max(axis=1)
        reasons = np.full(len(scored), UNSCORED, object)
        reasons[scored] = self._reasons(counted, compared)
        if detected is not None:
            self._add_detected(detected, image_decisions, reasons)
        if unseen is not None:
            reasons[unseen & (image_decisions == 0)] = FRAMES_UNSEEN
            image_decisions[unseen] = np.maximum(image_decisions[unseen], _REVIEW)
        return Moderation(
            labels=pa.ListArray.from_arrays(
                pa.array(offsets, pa.int32()), labels, mask=pa.array(np.diff(offsets) == 0)
            ),
            decision=pa.array(DECISIONS, pa.string()).take(pa.array(image_decisions)),
            reason=pa.array(reasons, pa.string()),
        )

    def _add_detected(self, detected: Detected, decisions: NDArray[np.int64], reasons: NDArray[np.object_]) -> None:
        """Raises the decisions of images to those of their detectors; where these are graver, they are the reason."""
        if not self._bound:
            return  # everything is `review`, and the reason is that
        gravest = detected.decisions.max(axis=1)
        raised = gravest > decisions
        candidates = np.where(detected.decisions == gravest[:, None], np.nan_to_num(detected.values, nan=-1.0), -2.0)
        best = candidates.argmax(axis=1)
        names = np.array(self.rules.names, object)[best]
        names[~detected.scored[np.arange(len(best)), best]] = UNSCORED
        reasons[raised] = names[raised]
        decisions[raised] = gravest[raised]

    def _decide_labels(self, values: NDArray[np.float32]) -> NDArray[np.int64]:
        if not self._bound:
            return np.full(values.shape, _REVIEW)
        decisions = (values >= self._review).astype(np.int64)
        decisions[values >= self._block] = _BLOCK
        decisions[np.isnan(values)] = _REVIEW  # fails closed
        return decisions

    def _reasons(self, decisions: NDArray[np.int64], values: NDArray[np.float32]) -> NDArray[np.object_]:
        """What decided each image: of the labels with the gravest decision, the highest."""
        names = np.array(["/".join(ref) for ref in self._policy.labels], object)
        gravest = decisions.max(axis=1, keepdims=True)
        candidates = np.where((decisions == gravest) & ~np.isnan(values), values, -1.0)
        reasons: NDArray[np.object_] = names[candidates.argmax(axis=1)]
        reasons[candidates.max(axis=1) < 0] = UNSCORED
        reasons[gravest[:, 0] == 0] = None
        if not self._bound:
            reasons[:] = UNBOUND
        return reasons

    def _label_structs(
        self,
        margins: NDArray[np.float32],
        scores: NDArray[np.float32],
        probabilities: NDArray[np.float32],
        decisions: NDArray[np.int64],
        views: pa.StringArray,
        times: pa.FloatArray | None,
    ) -> pa.StructArray:
        num_rows, refs = len(margins), self._policy.labels
        block = np.where(np.isinf(self._block), np.float32(np.nan), self._block)
        columns: dict[str, pa.Array[Any]] = {
            "label": _repeat([ref.label for ref in refs], num_rows),
            "category": _repeat([ref.category for ref in refs], num_rows),
            "margin": _floats(margins),
            "score": _floats(scores),
            "probability": _floats(probabilities),
            "review_threshold": _floats(np.tile(self._review, num_rows)),
            "block_threshold": _floats(np.tile(block, num_rows)),
            "decision": pa.array(DECISIONS, pa.string()).take(pa.array(decisions.ravel())),
            "view": views,
            "time_s": pa.nulls(num_rows * len(refs), pa.float32()) if times is None else times,
            "detector": pa.nulls(num_rows * len(refs), pa.string()),
        }
        return pa.StructArray.from_arrays([columns[field.name] for field in schema.LABEL], fields=list(schema.LABEL))


def _interleaved(
    labels: pa.StructArray, offsets: NDArray[np.int64], detected: pa.StructArray, per_image: int
) -> tuple[pa.StructArray, NDArray[np.int64]]:
    """Each image's labels by prompts, then those by detectors; and where each image's begin."""
    counts = np.diff(offsets)
    ends = np.cumsum(counts + per_image)
    rows = np.repeat(np.arange(len(counts)), counts)
    at = np.empty(len(labels) + len(detected), np.int64)
    at[np.arange(len(labels)) + rows * per_image] = np.arange(len(labels))
    images = np.repeat(np.arange(len(counts)), per_image)
    within = np.tile(np.arange(per_image), len(counts))
    at[ends[images] - per_image + within] = len(labels) + np.arange(len(detected))
    return pa.concat_arrays([labels, detected]).take(pa.array(at)), np.concatenate([[0], ends])


def _worst_views(
    margins: NDArray[np.float32], starts: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The greatest margin of each image and label, and the vector it comes from: the first of equals.

    A margin that is no number makes the image's label unscored, whatever its other views say.
    """
    if len(starts) == 0:
        empty = np.empty((0, margins.shape[1]))
        return empty.astype(np.float32), empty.astype(np.int64)
    worst = np.maximum.reduceat(margins, starts, axis=0)  # a not-a-number prevails
    image_of = np.repeat(np.arange(len(starts)), np.diff([*starts, len(margins)]))
    is_worst = (margins == worst[image_of]) | np.isnan(margins)
    positions = np.where(is_worst, np.arange(len(margins))[:, None], len(margins))
    return worst, np.minimum.reduceat(positions, starts, axis=0)


def _curves(curves: Sequence[Logistic]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return np.array([curve.scale for curve in curves]), np.array([curve.offset for curve in curves])


def _apply(
    curves: tuple[NDArray[np.float64], NDArray[np.float64]], margins: NDArray[np.float32]
) -> NDArray[np.float32]:
    scale, offset = curves
    # Beyond 700 the exponential leaves float64; the logistic is 0 or 1 long before.
    exponent = np.clip(-scale * (margins.astype(np.float64) - offset), -700, 700)
    return (1.0 / (1.0 + np.exp(exponent))).astype(np.float32)


def _floats(values: NDArray[np.floating]) -> pa.FloatArray:
    """A float32 column in which what is no number is null."""
    return pa.array(values.ravel(), pa.float32(), from_pandas=True)


def _repeat(values: Sequence[str], times: int) -> pa.StringArray:
    return pa.array(values, pa.string()).take(pa.array(np.tile(np.arange(len(values)), times)))
