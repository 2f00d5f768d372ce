"""Classes and decisions: top-k, mean per class, area under the ROC curve, average precision, with intervals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

NUM_DRAWS = 500


def top_k(scores: NDArray[np.float32], truth: NDArray[np.int64], k: int) -> Flags:
    """(N,) whether the true class is among the ``k`` best of (N, C) scores; equal ones in the order of the classes.

    A row whose scores are not finite has no best.
    """
    own = np.take_along_axis(scores, truth[:, None], axis=1)
    before = np.arange(scores.shape[1])[None] < truth[:, None]
    ranks = (scores > own).sum(axis=1) + ((scores == own) & before).sum(axis=1)
    hits: Flags = (ranks < k) & np.isfinite(own[:, 0])
    return hits


def mean_per_class(hits: Flags, truth: NDArray[np.int64]) -> float:
    """The mean over classes of the share of each that was hit; classes without an image do not count."""
    counts = np.bincount(truth)
    shares = np.bincount(truth, weights=hits)[counts > 0] / counts[counts > 0]
    return float(shares.mean())


def roc_auc(scores: Floats, positive: Flags, weights: Floats | None = None) -> float | None:
    """The chance that a positive scores above a negative, ties half; None without both kinds.

    Args:
        weights: (N,) of the images; None: one each.
    """
    mass = np.ones(len(scores)) if weights is None else weights
    groups = _Groups(scores, positive)
    of_positive, of_negative = groups.sums(mass * positive), groups.sums(mass * ~positive)
    total = of_positive.sum() * of_negative.sum()
    if total == 0:
        return None
    above = np.cumsum(of_positive) - of_positive  # positives with higher scores than each group
    return float((of_negative * (above + of_positive / 2)).sum() / total)


def average_precision(scores: Floats, positive: Flags, weights: Floats | None = None) -> float | None:
    """Average precision: precision at each score, weighted by the recall that it adds; None without a positive."""
    mass = np.ones(len(scores)) if weights is None else weights
    groups = _Groups(scores, positive)
    of_positive, of_all = groups.sums(mass * positive), groups.sums(mass)
    if of_positive.sum() == 0:
        return None
    found, listed = np.cumsum(of_positive), np.cumsum(of_all)
    precision = np.divide(found, listed, out=np.zeros_like(found), where=listed > 0)
    return float((precision * of_positive).sum() / of_positive.sum())


class _Groups:
    """Images with equal scores together, the highest first."""

    def __init__(self, scores: Floats, positive: Flags) -> None:
        if len(scores) != len(positive):
            raise ValueError(f"{len(scores)} scores for {len(positive)} images")
        self._order = np.argsort(-scores, kind="stable")
        ordered = scores[self._order]
        first = np.ones(len(scores), np.bool_)
        first[1:] = ordered[1:] != ordered[:-1]
        self._starts = np.flatnonzero(first)

    def sums(self, values: Floats) -> Floats:
        if not len(self._starts):
            return np.zeros(0)
        return np.add.reduceat(values[self._order].astype(np.float64), self._starts)


def bootstrap(
    metric: Callable[[Floats, Flags, Floats], float | None],
    scores: Floats,
    positive: Flags,
    image_of: NDArray[np.int64] | None = None,
) -> tuple[float, float] | None:
    """A 95% interval of a metric by drawing the images anew, with replacement (Efron 1979); None: too few have it.

    Args:
        image_of: (N,) the image of each score, which is drawn with all of its scores; None: each has one.
    """
    rng = np.random.default_rng([0])
    images = np.arange(len(scores)) if image_of is None else np.unique(image_of, return_inverse=True)[1]
    num = int(images.max(initial=-1)) + 1
    if num == 0:
        return None
    values = []
    for _ in range(NUM_DRAWS):
        drawn = np.bincount(rng.integers(num, size=num), minlength=num).astype(np.float64)[images]
        value = metric(scores, positive, drawn)
        if value is not None:
            values.append(value)
    if len(values) < NUM_DRAWS / 2:
        return None
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
