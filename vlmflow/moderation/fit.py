"""Calibration of one label: from margins and verdicts to probabilities and thresholds. NumPy alone, in float64.

The curve is Platt's (Platt 1999, "Probabilistic outputs for support vector machines"; Lin, Lin and Weng 2007, Machine
Learning 68): a logistic fitted by maximum likelihood to smoothed targets, so that separable labels have a finite fit.
Where weights differ, what smooths is one verdict of the lighter kind.

Thresholds are those at which precision and recall *expected under the curve* reach their targets: with the mean
probability of the images above a cut as its precision. The cut at which the counted precision last reaches a high
target is picked by luck: in a trial with 600 verdicts and a target of 0.95 its 95% interval held the true cut in 45 of
100 seeds. What is counted is reported beside, so that a curve that does not fit shows.

Intervals come from the percentile bootstrap over images (Efron 1979): whole images are drawn anew, the share of
positives with them, because that share is known no better than the rest. Curves of all draws are fitted at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from vlmflow.errors import CalibrationError

Floats = NDArray[np.float64]
Interval = tuple[float, float]

NUM_DRAWS = 1000
_MAX_STEPS = 50
_DRAWS_AT_ONCE = 50  # bounds memory: draws times images


@dataclass(frozen=True)
class Sample:
    """Verdicts on one label. N: images.

    Attributes:
        margins: (N,) finite.
        positive: (N,) whether the label holds.
        weights: (N,) positive, of mean 1: how many images of the catalog each stands for.
    """

    margins: Floats
    positive: NDArray[np.bool_]
    weights: Floats

    @property
    def is_weighted(self) -> bool:
        """Whether the images count differently."""
        return bool(np.ptp(self.weights) > 0)


@dataclass(frozen=True)
class Estimate:
    """A value and its 95% interval; infinite: no margin reaches the target."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Fit:
    """What verdicts say of a label: its curve, and the margins from which it blocks and means review."""

    scale: Estimate
    offset: Estimate
    block_margin: Estimate
    review_margin: Estimate
    block: Estimate  # probabilities at the margins
    review: Estimate


def fit_label(sample: Sample, *, precision: float, recall: float, seed: Sequence[int]) -> Fit:
    """Fits the curve of a label and picks its thresholds.

    ``block`` is the lowest cut at which the precision expected reaches its target, ``review`` the highest at which
    recall does.

    Raises:
        CalibrationError: margins do not rise with the label, so that no threshold on them means anything.
    """
    base = sample.weights[None]
    scale, offset = fit_curves(sample, base)
    if not scale[0] > 0:
        raise CalibrationError("higher margins do not go with the label: its prompts do not find it")
    cuts = Cuts(sample)
    point = cuts.choose(base, scale, offset, precision=precision, recall=recall)
    start = (scale[0], offset[0])
    drawn = _draw(sample, cuts, start, precision=precision, recall=recall, seed=seed)
    values = np.concatenate([scale, offset, *point, *_curve(scale, offset, *point)])
    low, high = (np.quantile(drawn, share, axis=1, method="inverted_cdf") for share in (0.025, 0.975))
    low, high = np.minimum(low, values), np.maximum(high, values)
    return Fit(*(Estimate(float(v), float(a), float(b)) for v, a, b in zip(values, low, high, strict=True)))


def _draw(
    sample: Sample, cuts: Cuts, start: tuple[float, float], *, precision: float, recall: float, seed: Sequence[int]
) -> Floats:
    """(6, NUM_DRAWS): scale, offset, margins and probabilities of block and review, for each draw of images."""
    rng = np.random.default_rng(seed)
    num = len(sample.margins)
    parts = []
    for _ in range(NUM_DRAWS // _DRAWS_AT_ONCE):
        counts = rng.multinomial(num, np.full(num, 1 / num), size=_DRAWS_AT_ONCE)
        weights = counts * sample.weights
        scale, offset = fit_curves(sample, weights, start=start)
        block, review = cuts.choose(weights, scale, offset, precision=precision, recall=recall)
        parts.append(np.stack([scale, offset, block, review, *_curve(scale, offset, block, review)]))
    return np.concatenate(parts, axis=1)


def fit_curves(sample: Sample, weights: Floats, *, start: tuple[float, float] | None = None) -> tuple[Floats, Floats]:
    """Fits scale and offset of ``1 / (1 + exp(-scale * (margin - offset)))`` by Newton's method with a line search.

    Args:
        weights: (B, N) of the images, one fit per row.
        start: scale and offset near those looked for, to begin from.

    Returns:
        (B,) scales and (B,) offsets.
    """
    center, width = sample.margins.mean(), sample.margins.std() or 1.0
    x = (sample.margins - center) / width
    weights = weights / _one_verdict(sample, weights)
    positives = (weights * sample.positive).sum(axis=1, keepdims=True)
    negatives = weights.sum(axis=1, keepdims=True) - positives
    targets = np.where(sample.positive, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    slope, shift = np.zeros(len(weights)), np.log((positives[:, 0] + 1) / (negatives[:, 0] + 1))
    if start is not None:
        slope, shift = np.full(len(weights), start[0] * width), np.full(len(weights), start[0] * (center - start[1]))
    loss = _loss(slope, shift, x, weights, targets)
    for _ in range(_MAX_STEPS):
        step_slope, step_shift, descent = _newton_step(slope, shift, x, weights, targets)
        if descent.max() < 1e-9 * len(x):
            break
        size = np.ones(len(weights))
        for _ in range(30):  # halve the steps that do not lower the loss enough
            tried = _loss(slope + size * step_slope, shift + size * step_shift, x, weights, targets)
            short = tried > loss - 1e-4 * size * descent + 1e-12 * np.abs(loss)
            if not short.any():
                break
            size[short] /= 2
        size[short] = 0
        slope, shift = slope + size * step_slope, shift + size * step_shift
        loss = np.where(short, loss, tried)
    with np.errstate(divide="ignore", invalid="ignore"):
        return slope / width, center - shift / slope * width


def _one_verdict(sample: Sample, weights: Floats) -> Floats:
    """(B, 1) the weight of the one verdict of either kind that Platt adds to the counts.

    Where positive images stand for themselves and negative ones for thousands each, as in a queue of images near a
    threshold with a few drawn at random, a verdict of the mean weight would outweigh all positives, and the curve
    would be that of the added one. So it weighs as much as verdicts of the lighter kind do: Kish's mean weight.
    """
    of_kind = [sample.positive, ~sample.positive]
    totals = np.stack([(weights * kind).sum(axis=1) for kind in of_kind])
    squares = np.stack([(weights * sample.weights * kind).sum(axis=1) for kind in of_kind])
    means = np.divide(squares, totals, out=np.full_like(totals, np.inf), where=totals > 0)  # draws may lack a kind
    lighter: Floats = means.min(axis=0)[:, None]
    return lighter


def _loss(slope: Floats, shift: Floats, x: Floats, weights: Floats, targets: Floats) -> Floats:
    """(B,) cross-entropy."""
    z = slope[:, None] * x + shift[:, None]
    losses: Floats = (weights * (np.logaddexp(0, z) - targets * z)).sum(axis=1)
    return losses


def _newton_step(
    slope: Floats, shift: Floats, x: Floats, weights: Floats, targets: Floats
) -> tuple[Floats, Floats, Floats]:
    """(B,) steps of slope and shift, and how fast the loss falls along them."""
    p = logistic(slope[:, None] * x + shift[:, None])
    residual = weights * (targets - p)
    spread = weights * p * (1 - p)
    g_slope, g_shift = (residual * x).sum(axis=1), residual.sum(axis=1)
    ridge = 1e-10 * len(x)
    h_slope, h_both, h_shift = (
        (spread * x * x).sum(axis=1) + ridge,
        (spread * x).sum(axis=1),
        spread.sum(axis=1) + ridge,
    )
    determinant = h_slope * h_shift - h_both**2
    step_slope = (h_shift * g_slope - h_both * g_shift) / determinant
    step_shift = (h_slope * g_shift - h_both * g_slope) / determinant
    return step_slope, step_shift, step_slope * g_slope + step_shift * g_shift


def logistic(z: Floats) -> Floats:
    """``1 / (1 + exp(-z))`` without overflow."""
    values: Floats = 1 / (1 + np.exp(-np.clip(z, -700, 700)))
    return values


def _curve(scale: Floats, offset: Floats, *margins: Floats) -> list[Floats]:
    """(B,) probabilities at (B,) margins; infinite where the margin is."""
    return [
        np.where(np.isinf(margin), margin, logistic(scale * (np.where(np.isinf(margin), 0, margin) - offset)))
        for margin in margins
    ]


class Cuts:
    """Every margin at which a sample can be cut, from high to low. K: distinct margins."""

    def __init__(self, sample: Sample) -> None:
        self._order = np.argsort(-sample.margins, kind="stable")
        self._falling = sample.margins[self._order]
        self._last = np.flatnonzero(np.append(np.diff(self._falling) != 0, True))  # equal margins fall together
        values = self._falling[self._last]
        # Between a margin and the next one below, so that rounding moves no image across. The lowest: just below it.
        below = np.append(values[1:], values[-1] - 1e-6)
        self.margins: Floats = (values + below) / 2

    def rates(self, weights: Floats, positive: Floats) -> tuple[Floats, Floats]:
        """Precision and recall at each cut, both (B, K).

        Args:
            weights: (B, N) of the images.
            positive: (B, N) or (1, N), how much of each image is positive: its verdict, or its probability.
        """
        ordered = weights[:, self._order]
        found = np.cumsum(ordered * positive[:, self._order], axis=1)[:, self._last]
        flagged = np.cumsum(ordered, axis=1)[:, self._last]
        with np.errstate(invalid="ignore"):  # draws may flag nobody at the first cuts
            return found / flagged, found / found[:, -1:]

    def choose(
        self, weights: Floats, scale: Floats, offset: Floats, *, precision: float, recall: float
    ) -> tuple[Floats, Floats]:
        """(B,) margins to block and to review from, by (B,) curves; infinite: no cut reaches the target."""
        margins = np.empty_like(self._falling)
        margins[self._order] = self._falling
        precisions, recalls = self.rates(weights, logistic(scale[:, None] * (margins - offset[:, None])))
        enough = precisions >= precision - 1e-12
        lowest = enough.shape[1] - 1 - enough[:, ::-1].argmax(axis=1)
        block = np.where(enough.any(axis=1), self.margins[lowest], np.inf)
        return block, self.margins[(recalls >= recall - 1e-12).argmax(axis=1)]


@dataclass(frozen=True)
class Rates:
    """What a threshold catches: precision and recall with 95% intervals; None: nothing to divide by."""

    precision: float | None
    precision_interval: Interval | None
    recall: float | None
    recall_interval: Interval | None
    num_flagged: int
    num_found: int


def rates_at(sample: Sample, flagged: NDArray[np.bool_]) -> Rates:
    """Precision and recall of flagging some of the images."""
    hits = flagged & sample.positive
    precision, precision_interval = _share(sample.weights, hits, flagged)
    recall, recall_interval = _share(sample.weights, hits, sample.positive)
    return Rates(precision, precision_interval, recall, recall_interval, int(flagged.sum()), int(hits.sum()))


def _share(weights: Floats, hits: NDArray[np.bool_], of: NDArray[np.bool_]) -> tuple[float | None, Interval | None]:
    if not of.any():
        return None, None
    total = weights[of].sum()
    share = float(weights[hits].sum() / total)
    return share, wilson(share, float(total**2 / (weights[of] ** 2).sum()))


def wilson(share: float, num: float, confidence: float = 0.95) -> Interval:
    """Wilson's interval of a share (Wilson 1927). ``num``: images, or Kish's effective number of weighted ones."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    middle = (share + z**2 / (2 * num)) / (1 + z**2 / num)
    half = z / (1 + z**2 / num) * float(np.sqrt(share * (1 - share) / num + z**2 / (4 * num**2)))
    return max(0.0, middle - half), min(1.0, middle + half)
