"""Curves, thresholds and intervals of one label: held against known truths and a plain optimiser."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmflow.errors import CalibrationError
from vlmflow.moderation.fit import Cuts, Floats, Sample, fit_curves, fit_label, logistic, rates_at, wilson

SCALE, OFFSET, MEAN, WIDTH = 30.0, 0.12, 0.08, 0.06


def draw(seed: int, num: int) -> Sample:
    """Margins from a normal distribution, verdicts from a known curve over them."""
    rng = np.random.default_rng(seed)
    margins = rng.normal(MEAN, WIDTH, num)
    return Sample(margins, rng.random(num) < logistic(SCALE * (margins - OFFSET)), np.ones(num))


def sample_of(margins: list[float], positive: list[bool]) -> Sample:
    return Sample(np.array(margins), np.array(positive), np.ones(len(margins)))


def truth(precision: float, recall: float) -> dict[str, float]:
    """The cuts at which the distribution itself has this precision and recall, by summing over a fine grid."""
    grid = np.linspace(MEAN - 6 * WIDTH, MEAN + 6 * WIDTH, 200_001)
    density = np.exp(-0.5 * ((grid - MEAN) / WIDTH) ** 2)
    probability = logistic(SCALE * (grid - OFFSET))
    found = np.cumsum((density * probability)[::-1])[::-1]
    flagged = np.cumsum(density[::-1])[::-1]
    block = grid[np.argmax(found / flagged >= precision)]
    review = grid[np.flatnonzero(found / found[0] >= recall)[-1]]
    known = {"scale": SCALE, "offset": OFFSET, "block_margin": block, "review_margin": review}
    return known | {"block": logistic(SCALE * (block - OFFSET)), "review": logistic(SCALE * (review - OFFSET))}


@pytest.mark.parametrize("num_seeds", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_intervals_of_95_percent_hold_known_thresholds_for_at_least_90_percent_of_seeds(num_seeds: int) -> None:
    known = truth(0.95, 0.9)
    held = dict.fromkeys(known, 0)
    for seed in range(num_seeds):
        fit = fit_label(draw(seed, 300), precision=0.95, recall=0.9, seed=[seed])
        for name, value in known.items():
            estimate = getattr(fit, name)
            held[name] += estimate.low <= value <= estimate.high
    assert min(held.values()) >= 0.9 * num_seeds, held


def test_intervals_narrow_as_verdicts_grow_and_lie_about_the_value() -> None:
    few, many = (fit_label(draw(3, num), precision=0.9, recall=0.9, seed=[0]) for num in (200, 3200))
    for name in ("scale", "offset", "block", "review"):
        one, other = getattr(few, name), getattr(many, name)
        assert one.low <= one.value <= one.high
        assert 2 < (one.high - one.low) / (other.high - other.low) < 8  # a factor of 4, give or take


def test_the_same_seed_gives_the_same_fit() -> None:
    one, same, other = (fit_label(draw(1, 200), precision=0.9, recall=0.9, seed=[seed]) for seed in (7, 7, 8))
    assert one == same
    assert (one.scale.value, one.scale.low) != (other.scale.value, other.scale.low)
    assert one.scale.value == other.scale.value


def targets_of(sample: Sample, weights: Floats) -> Floats:
    positives, negatives = (weights * sample.positive).sum(), (weights * ~sample.positive).sum()
    targets: Floats = np.where(sample.positive, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    return targets


@settings(max_examples=40, deadline=None)
@given(
    margins=st.lists(st.floats(-1, 1).map(lambda value: round(value, 3)), min_size=4, max_size=30, unique=True),
    data=st.data(),
)
def test_the_fit_is_the_maximum_of_platt_s_smoothed_likelihood(margins: list[float], data: st.DataObject) -> None:
    positive = data.draw(st.lists(st.booleans(), min_size=len(margins), max_size=len(margins)))
    weights = np.array(data.draw(st.lists(st.integers(1, 4), min_size=len(margins), max_size=len(margins))), np.float64)
    sample = sample_of(margins, positive)
    scale, offset = fit_curves(sample, weights[None])
    if scale[0] == 0 or not np.isfinite(offset[0]):
        return
    # At the maximum, targets and probabilities balance, plainly and times the margin.
    gap = weights * (targets_of(sample, weights) - logistic(scale[0] * (sample.margins - offset[0])))
    assert abs(gap.sum()) < 1e-4 * len(margins)
    assert abs((gap * sample.margins).sum()) < 1e-4 * len(margins)


def test_separable_verdicts_have_a_finite_fit() -> None:
    margins = [0.01 * number for number in range(60)]
    fit = fit_label(sample_of(margins, [m > 0.295 for m in margins]), precision=0.95, recall=0.9, seed=[0])
    assert 0 < fit.scale.value < 1e4
    assert fit.offset.value == pytest.approx(0.295, abs=0.01)


def test_a_label_whose_margins_fall_with_it_is_refused() -> None:
    sample = draw(0, 300)
    upside_down = Sample(-sample.margins, sample.positive, sample.weights)
    with pytest.raises(CalibrationError, match="do not go with the label"):
        fit_label(upside_down, precision=0.9, recall=0.9, seed=[0])


def test_a_precision_out_of_reach_never_blocks() -> None:
    sample = draw(0, 300)
    rare = Sample(sample.margins, sample.positive & (np.arange(300) % 4 == 0), sample.weights)
    fit = fit_label(rare, precision=0.999, recall=0.9, seed=[0])
    assert fit.block.value == fit.block_margin.value == float("inf")
    assert np.isfinite(fit.review.value)


def test_weights_stand_for_images() -> None:
    sample = draw(5, 200)
    weights = np.where(np.arange(200) % 2, 1.0, 3.0)
    copies = np.repeat(np.arange(200), weights.astype(int))
    repeated = Sample(sample.margins[copies], sample.positive[copies], np.ones(len(copies)))
    one = fit_curves(Sample(sample.margins, sample.positive, weights), weights[None])
    two = fit_curves(repeated, repeated.weights[None])
    np.testing.assert_allclose(np.ravel(one), np.ravel(two), rtol=0.05)  # less what one verdict is worth
    flagged = sample.margins > 0.1
    by_weight = rates_at(Sample(sample.margins, sample.positive, weights), flagged)
    assert by_weight.precision == pytest.approx(rates_at(repeated, flagged[copies]).precision)
    assert by_weight.recall == pytest.approx(rates_at(repeated, flagged[copies]).recall)


def near_and_random(scale: float, weight: float) -> Sample:
    """60 positive and 40 negative images by a threshold, and 50 of which each stands for many, all of them negative."""
    rng = np.random.default_rng(0)
    near, far = np.sort(rng.normal(0.1, 1.5 / scale, 100)), rng.normal(0.0, 0.03, 50)
    positive = rng.random(100) < logistic(scale * (near - 0.1) + 0.5)
    weights = np.append(np.ones(100), np.full(50, weight))
    return Sample(np.append(near, far), np.append(positive, np.zeros(50, np.bool_)), weights / weights.mean())


@pytest.mark.parametrize("weight", [20.0, 20_000.0])
def test_one_verdict_more_does_not_outweigh_all_that_the_label_holds_for(weight: float) -> None:
    sample = near_and_random(200.0, weight)
    scale, offset = fit_curves(sample, sample.weights[None])
    expected = (sample.weights * logistic(scale[0] * (sample.margins - offset[0]))).sum()
    assert expected == pytest.approx(sample.weights[sample.positive].sum(), rel=0.05)
    assert 80 < scale[0] < 800


def test_the_unit_of_weights_does_not_count() -> None:
    sample = near_and_random(200.0, 300.0)
    other = Sample(sample.margins, sample.positive, 7 * sample.weights)
    np.testing.assert_allclose(fit_curves(sample, sample.weights[None]), fit_curves(other, other.weights[None]))


def test_equal_margins_are_cut_together_and_cuts_lie_between_margins() -> None:
    sample = sample_of([0.3, 0.2, 0.2, 0.1], [True, True, False, False])
    cuts = Cuts(sample)
    np.testing.assert_allclose(cuts.margins, [0.25, 0.15, 0.1], atol=1e-5)
    precision, recall = cuts.rates(np.ones((1, 4)), sample.positive[None].astype(float))
    np.testing.assert_allclose(precision[0], [1, 2 / 3, 0.5])
    np.testing.assert_allclose(recall[0], [0.5, 1, 1])


def test_thresholds_are_the_cuts_at_which_the_expected_rates_reach_their_targets() -> None:
    sample = draw(9, 500)
    fit = fit_label(sample, precision=0.9, recall=0.8, seed=[0])
    probability = logistic(fit.scale.value * (sample.margins - fit.offset.value))
    above = np.sort(probability)[::-1]
    blocked = int((probability >= fit.block.value).sum())
    assert above[:blocked].mean() >= 0.9 > above[: blocked + 1].mean()
    reviewed = int((probability >= fit.review.value).sum())
    assert above[:reviewed].sum() >= 0.8 * above.sum() > above[: reviewed - 1].sum()


def test_rates_have_wilson_s_intervals_and_nothing_where_there_is_nothing() -> None:
    # Wilson (1927) for 8 of 10, from the formula by hand.
    np.testing.assert_allclose(wilson(0.8, 10), [0.4902, 0.9433], atol=1e-4)
    assert wilson(1.0, 20)[1] == 1.0
    none = rates_at(sample_of([0.1, 0.2], [True, False]), np.array([False, False]))
    assert (none.precision, none.precision_interval, none.recall) == (None, None, 0.0)
