"""Labels calibrated from verdicts: what is set, what is refused, and that decisions keep what was promised."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from vlmflow.errors import CalibrationError
from vlmflow.models import ModelIdentity
from vlmflow.moderation.calibrate import Calibration, CalibrationReport, Targets, _is_shifted, calibrate_labels
from vlmflow.moderation.calibration_report import calibration_html
from vlmflow.moderation.decide import Moderator
from vlmflow.moderation.fit import logistic
from vlmflow.moderation.policy import Logistic, Policy, Thresholds, bind
from vlmflow.moderation.verdicts import Matched

CLIP = ModelIdentity("org/clip", "local", "a" * 64, "[32]", 1)
GUN = {"name": "gun", "prompts": ["a gun"], "review": 0.5, "block": 0.8}
WINE = {"name": "wine", "prompts": ["wine"], "review": 0.6, "block": None}
POLICY = Policy.model_validate(
    {
        "name": "test",
        "version": "1",
        "neutral": ["a banana"],
        "categories": [{"name": "weapons", "labels": [GUN]}, {"name": "alcohol", "labels": [WINE]}],
        "logistic": {"scale": 40.0, "offset": 0.1},
    }
)


def verdicts(num: int = 400, *, wine: int = 400, seed: int = 0) -> tuple[Matched, NDArray[np.float32]]:
    """Images with verdicts on gun by a known curve, and on wine for the first ``wine`` of them."""
    rng = np.random.default_rng(seed)
    margins = rng.normal(0.08, 0.06, (num, 2)).astype(np.float32)
    values = (rng.random((num, 2)) < logistic(30 * (margins.astype(np.float64) - 0.12))).astype(np.int8)
    values[wine:, 1] = -1
    ids = [f"{number:032x}" for number in range(num)]
    return Matched(ids, values, np.ones((num, 2)), False, Counter(), (0.1, 0.1)), margins


def calibrate(matched: Matched, margins: NDArray[np.float32], **options: Any) -> Calibration:
    before, targets = options.pop("before", None), options.pop("targets", Targets())
    return calibrate_labels(POLICY, CLIP, before, matched, margins, targets, **options)


def test_a_calibrated_binding_decides_as_the_report_says() -> None:
    matched, margins = verdicts()
    done = calibrate(matched, margins)
    decisions = Moderator(POLICY, done.binding, None).decide_labels(margins)
    for number, label in enumerate(done.labels):
        assert label.fit is not None
        assert (label.after["block"].num_flagged, label.after["review"].num_flagged) == (
            (decisions[:, number] == 2).sum(),
            (decisions[:, number] >= 1).sum(),
        )
        # The images that decisions block are those above the margin of the fit: no rounding moves one across.
        assert ((decisions[:, number] == 2) == (margins[:, number] > label.fit.block_margin.value)).all()
        assert ((decisions[:, number] >= 1) == (margins[:, number] > label.fit.review_margin.value)).all()
    gun = done.binding.calibration["gun"]
    assert gun.scale == pytest.approx(30, rel=0.3)
    assert gun.offset == pytest.approx(0.12, abs=0.02)


@pytest.mark.parametrize("scale", [150.0, 300.0])
def test_a_recall_of_all_has_a_threshold_that_rounding_moves_no_image_across(scale: float) -> None:
    # Probabilities there are of a millionth and less.
    rng = np.random.default_rng(3)
    margins = rng.normal(0.02, 0.02, (2000, 2)).astype(np.float32)
    margins = np.where(rng.random((2000, 2)) < 0.5, margins, margins + np.float32(0.1)).astype(np.float32)
    values = (rng.random((2000, 2)) < logistic(scale * (margins.astype(np.float64) - 0.1))).astype(np.int8)
    ids = [f"{number:032x}" for number in range(2000)]
    matched = Matched(ids, values, np.ones((2000, 2)), False, Counter(), (0.1, 0.1))
    done = calibrate(matched, margins, targets=Targets(recall=1.0))
    decisions = Moderator(POLICY, done.binding, None).decide_labels(margins)
    for number, label in enumerate(done.labels):
        assert label.fit is not None
        assert ((decisions[:, number] >= 1) == (margins[:, number] > label.fit.review_margin.value)).all()


def test_targets_hold_by_label() -> None:
    matched, margins = verdicts(1000, wine=1000)
    plain = calibrate(matched, margins, targets=Targets(precision=0.8, recall=0.7))
    strict = calibrate(matched, margins, targets=Targets(precision=0.8, recall=0.7, precisions={"gun": 0.97}))
    one, other = plain.binding.thresholds, strict.binding.thresholds
    assert one["wine"] == other["wine"]
    assert (other["gun"].block or 0) > (one["gun"].block or 1)
    assert other["gun"].review == one["gun"].review
    with pytest.raises(CalibrationError, match="target for rifle: no label of test"):
        calibrate(matched, margins, targets=Targets(recalls={"rifle": 0.5}))


@pytest.mark.parametrize("num", [0, 30])
def test_a_label_with_too_few_verdicts_stays_as_it_was_where_the_policy_is_bound(num: int) -> None:
    matched, margins = verdicts(wine=num)
    kept = Thresholds(review=0.3, block=0.9)
    before = bind(POLICY, CLIP, logistic=Logistic(scale=9.0, offset=0.2), thresholds={"wine": kept})
    done = calibrate(matched, margins, before=before)
    assert done.binding.thresholds["wine"] == kept
    assert done.binding.logistic == before.logistic
    assert set(done.binding.calibration) == {"gun"}
    assert "at least 20 are needed" in (done.labels[1].refused or "")


def test_an_unbound_policy_is_not_bound_with_thresholds_never_set_for_the_model_unless_asked() -> None:
    matched, margins = verdicts(wine=30)
    with pytest.raises(CalibrationError, match="never set for it: wine: ") as caught:
        calibrate(matched, margins)
    assert "--accept-uncalibrated" in caught.value.remedy
    done = calibrate(matched, margins, accept_uncalibrated=True)
    assert set(done.binding.thresholds) == {"gun"}
    assert done.labels[1].thresholds == Thresholds(review=0.6, block=None)


def test_without_any_label_there_is_no_calibration() -> None:
    matched, margins = verdicts(24, wine=24)
    with pytest.raises(CalibrationError, match=r"no label of test can be calibrated: gun: .*; wine: "):
        calibrate(matched, margins, accept_uncalibrated=True)


def test_verdicts_of_very_different_weight_are_worth_less_than_their_number() -> None:
    matched, margins = verdicts(60, wine=60)
    values = np.repeat(np.array([[0], [1]], np.int8), 30, axis=0)
    weights = np.full((60, 2), 1.0)
    weights[0] = weights[30] = 1000
    lopsided = Matched(matched.ids, np.hstack([values, values]), weights, True, Counter(), (0, 0))
    with pytest.raises(CalibrationError, match=r"30 positive verdicts \(worth 1.1: weights differ"):
        calibrate(lopsided, margins)


def near_and_random(random_weight: float, num_random: int) -> tuple[Matched, NDArray[np.float32]]:
    """A review queue: near a threshold half of the images have the label, of those drawn at random none."""
    rng = np.random.default_rng(0)
    margins = np.append(rng.normal(0.1, 0.01, 200), rng.normal(0.0, 0.01, num_random)).astype(np.float32)
    values = np.append(margins[:200] > np.median(margins[:200]) + rng.normal(0, 0.005, 200), np.zeros(num_random))
    weights = np.append(np.ones(200), np.full(num_random, random_weight))
    both = (np.repeat(column[:, None], 2, axis=1) for column in (values.astype(np.int8), weights))
    ids = [f"{number:032x}" for number in range(len(margins))]
    return Matched(ids, *both, True, Counter(), (0.5, 0.1)), margins[:, None].repeat(2, axis=1)


def test_a_label_that_no_heavy_verdict_was_positive_of_is_refused_or_warned_of() -> None:
    with pytest.raises(CalibrationError, match="none of the 50 heaviest verdicts is positive, so up to 100% of"):
        calibrate(*near_and_random(20_000, 50))
    known = calibrate(*near_and_random(10, 500))
    assert any("none of the 500 heaviest verdicts is positive: up to" in text for text in known.labels[0].warnings)
    many = calibrate(*near_and_random(2, 2000))
    assert not any("heaviest" in text for text in many.labels[0].warnings)


def test_images_without_a_vector_count_for_nothing() -> None:
    matched, margins = verdicts()
    fewer = margins.copy()
    fewer[::2] = np.nan
    half = Matched(matched.ids[1::2], matched.values[1::2], matched.weights[1::2], False, Counter(), (0, 0))
    one, other = calibrate(matched, fewer), calibrate(half, margins[1::2])
    assert one.binding == other.binding


def test_a_sample_from_the_review_queue_is_warned_of_unless_it_is_weighted() -> None:
    matched, margins = verdicts()
    queue = Matched(matched.ids, matched.values, matched.weights, False, Counter(), (0.9, 0.1))
    assert (
        "90% of the labelled images are flagged at present, of the catalog 10%" in calibrate(queue, margins).warnings[0]
    )
    weighted = Matched(matched.ids, matched.values, matched.weights, True, Counter(), (0.9, 0.1))
    assert calibrate(weighted, margins).warnings == []
    unbound = Matched(matched.ids, matched.values, matched.weights, False, Counter(), (1.0, 1.0))
    assert "it cannot be told whether the labelled ones are a random sample" in calibrate(unbound, margins).warnings[0]
    assert calibrate(matched, margins).warnings == []


@pytest.mark.parametrize(
    ("labelled", "overall", "is_said"),
    [
        (0.084, 0.0042, True),  # those nearest to a threshold, of a catalog of which little is flagged
        (0.0, 0.04, True),
        (0.04, 0.0, True),
        (0.13, 0.08, False),  # at most so by chance
        (0.0075, 0.005, False),
        (0.0, 0.0, False),
        (0.45, 0.53, False),
    ],
)
def test_a_sample_of_a_catalog_of_which_little_is_flagged_is_warned_of_too(
    labelled: float, overall: float, is_said: bool
) -> None:
    matched, margins = verdicts()
    flagged = Matched(matched.ids, matched.values, matched.weights, False, Counter(), (labelled, overall))
    said = calibrate(flagged, margins).warnings
    assert bool(said) == is_said
    if labelled == 0.084:
        assert "8.4% of the labelled images are flagged at present, of the catalog 0.42%" in said[0]


def test_random_samples_are_hardly_ever_taken_for_others() -> None:
    rng = np.random.default_rng(0)
    shares = rng.choice([0.001, 0.002, 0.01, 0.05], 4000)
    nums = rng.choice([40, 100, 400, 1000], 4000)
    found = rng.binomial(nums, shares) / nums
    samples = zip(found.tolist(), shares.tolist(), nums.tolist(), strict=True)
    alarms = [_is_shifted(*sample) for sample in samples if abs(sample[0] - sample[1]) <= 0.1]
    assert sum(alarms) <= 4


def test_review_never_starts_above_block() -> None:
    margins = np.linspace(-0.1, 0.1, 400, dtype=np.float32)[:, None].repeat(2, axis=1)
    holds = (margins > 0).astype(np.int8)  # so easy a label that a tenth of it could be missed without a false alarm
    done = calibrate(Matched(verdicts()[0].ids, holds, np.ones((400, 2)), False, Counter(), (0, 0)), margins)
    gun = done.labels[0]
    assert gun.fit is not None
    assert gun.fit.review.value > gun.fit.block.value
    assert gun.thresholds.review == gun.thresholds.block == round(gun.fit.block.value, 9)
    assert any("nothing is only reviewed" in text for text in gun.warnings)


def test_a_curve_that_does_not_fit_is_warned_of() -> None:
    matched, margins = verdicts(2000, wine=2000)
    values = matched.values.copy()
    # Half of the highest margins are negative after all, which no logistic can follow.
    top = margins[:, 0] > 0.19
    values[top, 0] = np.arange(top.sum()) % 2
    done = calibrate(Matched(matched.ids, values, matched.weights, False, Counter(), (0, 0)), margins)
    assert any("probabilities stray" in text for text in done.labels[0].warnings)
    assert not any("stray" in text or "does not fit" in text for text in done.labels[1].warnings)


def page(done: Calibration, **changes: Any) -> str:
    facts: dict[str, Any] = {"catalog": "c", "verdicts": "v", "policy": "p", "new_policy": "q", "output": "o"}
    facts |= {"model": "m", "num_images": 1, "num_verdicts": 2, "left_out": {}, "is_weighted": False, "warnings": ()}
    return calibration_html(CalibrationReport(labels=tuple(done.labels), **{**facts, **changes}))


def test_the_page_stands_alone_shows_every_label_and_escapes_every_word_from_outside() -> None:
    matched, margins = verdicts(wine=30)
    done = calibrate(matched, margins, accept_uncalibrated=True)
    evil = '"><script>alert(1)</script>'
    names = ("catalog", "verdicts", "policy", "new_policy", "output", "model")
    text = page(done, **dict.fromkeys(names, evil), left_out={evil: 1}, warnings=(evil,))
    assert "<script" not in text
    assert text.count("&lt;script&gt;") == 9  # the policy stands in the title and the heading
    assert "http" not in text.replace("http-equiv", "")
    assert text.count("<svg") == 3  # of gun; wine has no verdicts enough
    assert "weapons/gun" in text
    assert "Left as it was: " in text
    assert f"{done.binding.thresholds['gun'].review:.3f}" in text


def test_the_json_of_a_report_can_be_read_even_where_a_label_never_blocks() -> None:
    matched, margins = verdicts()
    rare = np.where(np.arange(400)[:, None] % 3, 0, matched.values).astype(np.int8)
    done = calibrate(
        Matched(matched.ids, rare, matched.weights, False, Counter(), (0, 0)), margins, targets=Targets(precision=0.999)
    )
    assert done.labels[0].thresholds.block is None
    assert any("never blocks" in text for text in done.labels[0].warnings)
    shown = done.labels[0].model_dump(mode="json")
    assert shown["thresholds"]["block"] is None
    assert "never" in page(done)
