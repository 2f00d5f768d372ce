"""The accuracy of answers: against values of the challenge's script, and by its published rules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlmflow.evaluation.metrics.vqa import normalize_answer, vqa_accuracy
from vlmflow.evaluation.readers import ReadOptions, read_dataset
from vlmflow.evaluation.score import score_answers

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


@pytest.mark.parametrize("num", range(1, 11))
def test_what_all_answered_is_right_however_few_they_are(num: int) -> None:
    assert vqa_accuracy("red", ["red"] * num) == 1.0
    assert vqa_accuracy("blue", ["red"] * num) == 0.0


def test_of_few_answers_one_counts_by_how_many_of_the_others_gave_it() -> None:
    assert vqa_accuracy("red", ["red", "blue"]) == pytest.approx(1 / 2)
    # Leaving out a red one, one of two is left, twice; leaving out the blue one, both.
    assert vqa_accuracy("red", ["red", "red", "blue"]) == pytest.approx((1 / 2 + 1 / 2 + 1) / 3)


@pytest.mark.parametrize(("answers", "said"), [("Two;Two;Two;Two", "two"), ("The dog;a dog", "dog"), ("Yes", "yes!")])
def test_a_tables_answers_are_spelled_as_what_is_judged(tmp_path: Path, answers: str, said: str) -> None:
    (tmp_path / "q.csv").write_text(f"uri,question,answers\na.png,what?,{answers}\n")
    data = read_dataset("answer", str(tmp_path / "q.csv"), ReadOptions())
    scored = score_answers({"1": said}, data.rows["questions"].to_pylist())
    assert scored.figures["accuracy"].value == 1.0


def test_one_reference_must_be_met() -> None:
    assert vqa_accuracy("The two", ["2"]) == 1.0
    assert vqa_accuracy("three", ["2"]) == 0.0
    with pytest.raises(ValueError, match="without answers"):
        vqa_accuracy("x", [])
