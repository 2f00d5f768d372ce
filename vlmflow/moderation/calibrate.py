"""Thresholds and probabilities for the labels of a policy, from verdicts on images whose margins are known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from vlmflow.config import Frozen
from vlmflow.errors import CalibrationError
from vlmflow.models.identity import ModelIdentity
from vlmflow.moderation.decide import DECISIONS, Moderator
from vlmflow.moderation.fit import Cuts, Fit, Rates, Sample, fit_label, logistic, rates_at, wilson
from vlmflow.moderation.policy import Binding, Logistic, Policy, Thresholds, bind
from vlmflow.moderation.verdicts import Matched

MIN_VERDICTS = 20  # of each kind; fewer say next to nothing of a curve
_FEW_VERDICTS = 100
_WIDE = 0.2
_MAX_UNSEEN = 0.5  # of a label's images: where most may be unseen, thresholds are those of the few that are not
_SHIFTED = 0.1
_ODDS, _CHANCE = 2, 1e-3  # so far off that it matters, and by chance no more often than that
_NUM_BINS = 10
_NUM_BARS = 24
_MAX_POINTS = 200


class Targets(Frozen):
    """What thresholds are to reach: precision of `block`, recall of `review`; by label where it differs."""

    precision: float = Field(0.95, gt=0, lt=1)
    recall: float = Field(0.9, gt=0, le=1)
    precisions: dict[str, float] = {}
    recalls: dict[str, float] = {}

    def of(self, label: str) -> tuple[float, float]:
        """Precision and recall that a label is to reach."""
        return self.precisions.get(label, self.precision), self.recalls.get(label, self.recall)


class Bin(Frozen):
    """Images of like probability: what was promised, and the share that was positive with its 95% interval.

    ``worth``: their effective number, less than ``num`` where weights differ.
    """

    num: int
    worth: float
    probability: float
    share: float
    low: float
    high: float


class LabelReport(Frozen):
    """What calibration did to one label.

    Attributes:
        refused: why the label was left as it was; None: it was calibrated.
        before, after: what `review` (blocks included) and `block` catch of the verdicts.
        curve: recall and precision of every cut, or of enough of them to draw.
        histogram: edges in margins, then positive and negative images between them.
    """

    label: str
    category: str
    num_positive: int
    num_negative: int
    target_precision: float
    target_recall: float
    refused: str | None = None
    fit: Fit | None = None
    thresholds: Thresholds
    before: dict[str, Rates] = {}
    after: dict[str, Rates] = {}
    curve: tuple[tuple[float, float], ...] = ()
    reliability: tuple[Bin, ...] = ()
    histogram: tuple[tuple[float, ...], tuple[int, ...], tuple[int, ...]] = ((), (), ())
    warnings: tuple[str, ...] = ()


class CalibrationReport(Frozen):
    """What a calibration read, set and wrote.

    Attributes:
        output: the new policy file.
        left_out: verdicts that did not count, by reason.
        warnings: on the verdicts as a whole; those on a label stand with it.
    """

    catalog: str
    verdicts: str
    policy: str
    new_policy: str
    output: str
    model: str
    num_images: int
    num_verdicts: int
    left_out: dict[str, int]
    is_weighted: bool
    labels: tuple[LabelReport, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Calibration:
    """The binding that calibration makes, and what it says of each label."""

    binding: Binding
    labels: list[LabelReport]
    warnings: list[str] = field(default_factory=list)


def calibrate_labels(
    policy: Policy,
    identity: ModelIdentity,
    before: Binding | None,
    matched: Matched,
    margins: NDArray[np.float32],
    targets: Targets,
    *,
    accept_uncalibrated: bool = False,
    seed: int = 0,
) -> Calibration:
    """Calibrates every label that has the verdicts for it; the others stay as they are.

    Args:
        before: the binding that held so far; None: no thresholds were set for this model.
        margins: (N, L) of the images of ``matched``, not a number where one has no vector.
        accept_uncalibrated: labels that no thresholds were ever set for may keep those of the policy.

    Raises:
        CalibrationError: no label has verdicts enough, a target names no label, or without ``accept_uncalibrated`` a
            label would decide by thresholds that were never set for the model.
    """
    _check_targets(policy, targets)
    base = before or bind(policy, identity)
    thresholds, calibration = dict(base.thresholds), dict(base.calibration)
    fits: dict[str, Fit | str] = {}
    for number, ref in enumerate(policy.labels):
        sample = _sample(matched, margins, number)
        precision, recall = targets.of(ref.label)
        try:
            _check_enough(sample)
            fit = fit_label(sample, precision=precision, recall=recall, seed=(seed, number))
        except CalibrationError as error:
            fits[ref.label] = str(error)
            continue
        fits[ref.label] = fit
        thresholds[ref.label] = _thresholds(fit)
        calibration[ref.label] = Logistic(scale=_short(fit.scale.value), offset=_short(fit.offset.value))
    _check_refused(policy, before, fits, accept_uncalibrated)
    binding = bind(policy, identity, logistic=base.logistic, thresholds=thresholds, calibration=calibration)
    old, new = (Moderator(policy, b, None).decide_labels(margins) for b in (base, binding))
    reports = [
        _report(policy, number, fits[ref.label], matched, margins, old[:, number], new[:, number], binding, targets)
        for number, ref in enumerate(policy.labels)
    ]
    return Calibration(binding, reports, _warnings(matched))


def _check_targets(policy: Policy, targets: Targets) -> None:
    known = {ref.label for ref in policy.labels}
    for name, value in [*targets.precisions.items(), *targets.recalls.items()]:
        if name not in known:
            raise CalibrationError(f"target for {name}: no label of {policy.name}", remedy="Name one of its labels.")
        if not 0 < value <= 1:
            raise CalibrationError(f"target for {name}: {value}", remedy="Give a share between 0 and 1.")


def _sample(matched: Matched, margins: NDArray[np.float32], number: int) -> Sample:
    values, column = matched.values[:, number], margins[:, number]
    kept = (values >= 0) & np.isfinite(column)
    weights = matched.weights[kept, number]
    return Sample(
        margins=column[kept].astype(np.float64),
        positive=values[kept] == 1,
        weights=weights / weights.mean() if len(weights) else weights,
    )


def _check_enough(sample: Sample) -> None:
    for name, mask in (("positive", sample.positive), ("negative", ~sample.positive)):
        weights = sample.weights[mask]
        num = len(weights)
        effective = weights.sum() ** 2 / (weights**2).sum() if num else 0.0
        if effective < MIN_VERDICTS:
            counted = f"{num} {name} verdicts" + (
                f" (worth {effective:.1f}: weights differ)" if effective < num - 0.5 else ""
            )
            raise CalibrationError(f"{counted}, at least {MIN_VERDICTS} are needed")
    num, unseen = _unseen(sample)
    if unseen > _MAX_UNSEEN:
        raise CalibrationError(
            f"none of the {num} heaviest verdicts is positive, so up to {unseen:.0%} of the images with the label may "
            "be ones of which nobody has seen any: more images drawn at random are needed"
        )


def _unseen(sample: Sample) -> tuple[int, float]:
    """How many images weigh more than any positive one, and what share of all positives may be among such images.

    In a queue of images near a threshold, with a few drawn at random that stand for the whole catalog, these few may
    hold no positive one: the label may still hold for thousands, wherever nobody looked, and recall counts without
    them. The share is the upper end of its 95% interval.
    """
    known = sample.weights[sample.positive]
    heavier = sample.weights[sample.weights > known.max()]
    if not len(heavier):
        return 0, 0.0
    total = heavier.sum()
    unseen = total * wilson(0.0, float(total**2 / (heavier**2).sum()))[1]
    return len(heavier), float(unseen / (unseen + known.sum()))


def _thresholds(fit: Fit) -> Thresholds:
    block = None if np.isinf(fit.block.value) else _short(fit.block.value)
    review = _short(fit.review.value)
    # An easy label is caught far above its block threshold: what blocks is never allowed, so review is no higher.
    return Thresholds(review=review if block is None else min(review, block), block=block)


def _short(value: float) -> float:
    return float(f"{value:.9g}")


def _check_refused(
    policy: Policy, before: Binding | None, fits: Mapping[str, Fit | str], accept_uncalibrated: bool
) -> None:
    refused = {name: reason for name, reason in fits.items() if isinstance(reason, str)}
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
    if len(refused) == len(fits):
        raise CalibrationError(
            f"no label of {policy.name} can be calibrated: {reasons}", remedy="Label more images, of both kinds."
        )
    if before is None and refused and not accept_uncalibrated:
        raise CalibrationError(
            f"{policy.name} would be bound to the model with thresholds never set for it: {reasons}",
            remedy="Label more images, or accept the policy's own thresholds there with --accept-uncalibrated.",
        )


def _report(
    policy: Policy,
    number: int,
    fit: Fit | str,
    matched: Matched,
    margins: NDArray[np.float32],
    old: NDArray[np.int64],
    new: NDArray[np.int64],
    binding: Binding,
    targets: Targets,
) -> LabelReport:
    ref, label = policy.labels[number], policy.each_label()[number]
    sample = _sample(matched, margins, number)
    kept = (matched.values[:, number] >= 0) & np.isfinite(margins[:, number])
    limits = binding.thresholds.get(ref.label, Thresholds(review=label.review, block=label.block))
    precision, recall = targets.of(ref.label)
    report = LabelReport(
        label=ref.label,
        category=ref.category,
        num_positive=int(sample.positive.sum()),
        num_negative=int((~sample.positive).sum()),
        target_precision=precision,
        target_recall=recall,
        thresholds=Thresholds(review=limits.review, block=limits.block),
    )
    if isinstance(fit, str):
        return report.model_copy(update={"refused": fit})
    filled = report.model_copy(
        update={
            "fit": fit,
            "before": _rates(sample, old[kept]),
            "after": _rates(sample, new[kept]),
            "curve": _pr_curve(sample),
            "reliability": _reliability(sample, fit),
            "histogram": _histogram(sample),
        }
    )
    return filled.model_copy(update={"warnings": tuple(_label_warnings(filled, fit, sample))})


def _rates(sample: Sample, decisions: NDArray[np.int64]) -> dict[str, Rates]:
    return {name: rates_at(sample, decisions >= DECISIONS.index(name)) for name in ("review", "block")}


def _pr_curve(sample: Sample) -> tuple[tuple[float, float], ...]:
    """As counted; thinned to what a drawing shows."""
    precisions, recalls = Cuts(sample).rates(sample.weights[None], sample.positive[None].astype(np.float64))
    kept = np.unique(np.linspace(0, recalls.shape[1] - 1, _MAX_POINTS).astype(int))
    return tuple((round(float(recalls[0, at]), 5), round(float(precisions[0, at]), 5)) for at in kept)


def _reliability(sample: Sample, fit: Fit) -> tuple[Bin, ...]:
    probabilities = logistic(fit.scale.value * (sample.margins - fit.offset.value))
    numbers = np.minimum((probabilities * _NUM_BINS).astype(int), _NUM_BINS - 1)
    bins = []
    for number in np.unique(numbers):
        inside = numbers == number
        weights = sample.weights[inside]
        share = float(np.average(sample.positive[inside], weights=weights))
        worth = float(weights.sum() ** 2 / (weights**2).sum())
        low, high = wilson(share, worth)
        probability = float(np.average(probabilities[inside], weights=weights))
        bins.append(Bin(num=int(inside.sum()), worth=worth, probability=probability, share=share, low=low, high=high))
    return tuple(bins)


def _histogram(sample: Sample) -> tuple[tuple[float, ...], tuple[int, ...], tuple[int, ...]]:
    edges = np.histogram_bin_edges(sample.margins, _NUM_BARS)
    positive, negative = (np.histogram(sample.margins[mask], edges)[0] for mask in (sample.positive, ~sample.positive))
    return tuple(map(float, edges)), tuple(map(int, positive)), tuple(map(int, negative))


def _label_warnings(report: LabelReport, fit: Fit, sample: Sample) -> list[str]:
    found = []
    fewest = min(report.num_positive, report.num_negative)
    if fewest < _FEW_VERDICTS:
        found.append(f"only {fewest} verdicts of one kind: intervals are wide, {_FEW_VERDICTS} or more are better")
    if report.thresholds.block is None:
        found.append(f"no threshold reaches a precision of {report.target_precision:g}: the label never blocks")
    aims = {"block": ("precision", report.target_precision), "review": ("recall", report.target_recall)}
    for name, (kind, target) in aims.items():
        rates = report.after[name]
        interval = rates.precision_interval if kind == "precision" else rates.recall_interval
        if interval is None:
            continue
        if interval[1] < target:
            found.append(
                f"{kind} counted at {name} is at most {interval[1]:.3f}, below the target of {target:g}: "
                "the curve does not fit these verdicts"
            )
        if interval[1] - interval[0] > _WIDE:
            found.append(f"{kind} at {name} is known only to within {interval[0]:.2f} to {interval[1]:.2f}")
    num, unseen = _unseen(sample)
    if unseen > _WIDE:
        found.append(
            f"none of the {num} heaviest verdicts is positive: up to {unseen:.0%} of the images with the label may be "
            "such, and recall counts without them"
        )
    if _strays(report.reliability):
        found.append("probabilities stray from the shares counted in the reliability diagram")
    if fit.block.value < fit.review.value:
        found.append("the label is found so well that review starts where block does: nothing is only reviewed")
    return found


def _strays(bins: tuple[Bin, ...]) -> bool:
    """Whether a share is too far from what was promised: by chance alone in one of 20 labels at most."""
    crowded = [bin_ for bin_ in bins if bin_.worth >= MIN_VERDICTS]
    for bin_ in crowded:
        low, high = wilson(bin_.share, bin_.worth, 1 - 0.05 / len(crowded))
        if not low <= bin_.probability <= high:
            return True
    return False


def _warnings(matched: Matched) -> list[str]:
    labelled, overall = matched.flagged
    if not matched.is_weighted and overall == 1:  # as under a policy that is not bound
        return [
            "every image of the catalog is flagged at present, so it cannot be told whether the labelled ones are a "
            "random sample: if they are not, precision, recall and probabilities are those of the sample"
        ]
    if matched.is_weighted or not _is_shifted(labelled, overall, len(matched.ids)):
        return []
    shown, of_all = (f"{100 * share:.3g}%" for share in matched.flagged)
    return [
        f"{shown} of the labelled images are flagged at present, of the catalog {of_all}: they are no "
        "random sample, so precision, recall and probabilities are those of the sample. Label at random, or give each "
        "row a weight: how many images of the catalog it stands for."
    ]


def _is_shifted(labelled: float, overall: float, num: int) -> bool:
    """Whether ``num`` labelled images are no random sample, by how many are flagged of them and of the catalog.

    Where few are flagged at all, those near a threshold are flagged by a few points more often, which is many times
    as often: whatever is far below a threshold is missing, and recall counts without it.
    """
    if abs(labelled - overall) > _SHIFTED:
        return True
    less, more = sorted((labelled * (1 - overall), overall * (1 - labelled)))
    return more > _ODDS * less and _chance(round(labelled * num), num, overall) < _CHANCE / 2


def _chance(found: int, num: int, share: float) -> float:
    """How likely so few of ``num`` drawn at random are found, or so many, whichever is less: the binomial's tail."""
    share = min(max(share, 1e-9), 1 - 1e-9)
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, num + 1)))])
    counts = np.arange(num + 1)
    log_odds = counts * np.log(share) + (num - counts) * np.log1p(-share)
    chances = np.exp(logs[num] - logs[counts] - logs[num - counts] + log_odds)
    return float(min(chances[: found + 1].sum(), chances[found:].sum()))
