"""The accuracy of answers: against values of the challenge's script, and by its published rules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlmflow.evaluation.metrics.vqa import normalize_answer, vqa_accuracy

# [answer, ten people's answers, accuracy]: 600 generated cases, as `VQAEval` of the challenge counted them, in the copy
# that salesforce-lavis 1.0.2 ships.
REFERENCE = json.loads((Path(__file__).parent / "vqa_reference.json").read_text(encoding="utf-8"))


def test_accuracies_equal_the_challenges_script() -> None:
    assert len(REFERENCE) == 600
    assert 50 < sum(expected > 0 for *_, expected in REFERENCE) < 600
    for answer, given, expected in REFERENCE:
        assert vqa_accuracy(answer, given) == pytest.approx(expected, abs=1e-4), (answer, given)


@pytest.mark.parametrize(
    ("answer", "normalised"),
    [
        ("", ""),
        ("The Dog.", "dog"),
        ("two dogs", "2 dogs"),
        ("none", "0"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("1,000", "1000"),  # beside a number with a comma every sign vanishes
        ("3.5", "3.5"),
        ("red/white", "red white"),
        ("red / white", "red white"),
        ("t-shirt", "t shirt"),
        ("don't", "don't"),
        ("a\ttwo\nan", "2"),
        ("café?", "café"),
    ],
)
def test_normalised(answer: str, normalised: str) -> None:
    assert normalize_answer(answer) == normalised


def test_an_answer_counts_by_how_many_gave_it() -> None:
    given = ["yes"] * 2 + ["no"] * 8
    # Leaving out one who said yes, one remains: 1/3, twice; leaving out another, two: 2/3, eight times.
    assert vqa_accuracy("yes", given) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert vqa_accuracy("no", given) == 1.0
    assert vqa_accuracy("maybe", given) == 0.0
    assert vqa_accuracy(None, given) == 0.0


def test_one_reference_must_be_met() -> None:
    assert vqa_accuracy("The two", ["2"]) == 1.0
    assert vqa_accuracy("three", ["2"]) == 0.0
    with pytest.raises(ValueError, match="without answers"):
        vqa_accuracy("x", [])
