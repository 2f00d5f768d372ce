"""Margins and decisions: independent of the batch, by the worst view, and failing closed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vlmflow import schema
from vlmflow.errors import PolicyError
from vlmflow.models import ModelIdentity
from vlmflow.moderation.decide import Moderation, Moderator
from vlmflow.moderation.policy import Logistic, Policy, Thresholds, bind
from vlmflow.moderation.prompts import PromptVectors, encode_prompts
from vlmflow.moderation.scoring import Scorer

DIM = 48
IDENTITY = ModelIdentity("org/clip", "local", "a" * 64, "[32]", 1)
POLICY = Policy.model_validate(
    {
        "name": "test",
        "version": "1",
        "temperature": 0.05,
        "neutral": ["a banana"],
        "categories": [
            {
                "name": "weapons",
                "labels": [
                    {"name": "gun", "prompts": ["a gun", "two guns"], "review": 0.5, "block": 0.8},
                    {"name": "knife", "prompts": ["a knife"], "review": 0.5, "block": 0.8},
                ],
            },
            {"name": "alcohol", "labels": [{"name": "wine", "prompts": ["wine"], "review": 0.5, "block": None}]},
        ],
        "logistic": {"scale": 1.0, "offset": 0.0},
    }
)


class FakeEmbedder:
    """Each text has a place of its own in space."""

    dim = 8

    def __init__(self) -> None:
        self.texts: list[str] = []

    def embed_images(self, pixels: Any) -> NDArray[np.float32]:
        raise NotImplementedError

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.texts += texts
        return np.eye(self.dim, dtype=np.float32)[: len(texts)]


def unit_vectors(num: int, *, seed: int = 0, dim: int = DIM) -> NDArray[np.float32]:
    vectors = np.random.default_rng(seed).normal(size=(num, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def random_prompts(temperature: float = 0.05) -> PromptVectors:
    return PromptVectors(unit_vectors(17, seed=1), unit_vectors(23, seed=2), temperature, "digest")


def by_hand(vectors: NDArray[np.float32], prompts: PromptVectors) -> NDArray[np.float64]:
    wide = vectors.astype(np.float64)
    neutral = np.exp(wide @ prompts.neutral.T.astype(np.float64) / prompts.temperature)
    offset = prompts.temperature * np.log(neutral.mean(axis=1, keepdims=True))
    return wide @ prompts.labels.T.astype(np.float64) - offset


# Prompts that make the margin of an image equal to the entry of its vector: one axis a label, the last neutral.
AXES = PromptVectors(np.eye(3, 4, dtype=np.float32), np.eye(1, 4, 3, dtype=np.float32), 1.0, "digest")


def moderate(
    margins: Sequence[Sequence[Sequence[float]]],
    *,
    views: Sequence[str] = ("squash", "center", "tile"),
    bound: bool = True,
    logistic: Logistic | None = None,
    thresholds: dict[str, Thresholds] | None = None,
    calibration: dict[str, Logistic] | None = None,
) -> Moderation:
    """Moderates images given the margins of gun, knife and wine in each of their views."""
    flat = [view for image in margins for view in image]
    vectors = np.array([[*view, 0.0] for view in flat], np.float32).reshape(-1, 4)
    offsets = np.concatenate([[0], np.cumsum([len(image) for image in margins])])
    names = [views[i] for image in margins for i in range(len(image))]
    binding = bind(POLICY, IDENTITY, logistic=logistic, thresholds=thresholds, calibration=calibration)
    return Moderator(POLICY, binding if bound else None, AXES).moderate(vectors, names, offsets)


@settings(max_examples=60, deadline=None)
@given(order=st.permutations(range(150)), size=st.integers(1, 150))
def test_margins_are_equal_to_the_bit_in_every_batch_and_order(order: list[int], size: int) -> None:
    vectors, scorer = unit_vectors(150), Scorer(random_prompts())
    whole = scorer.score(vectors)
    parts = [scorer.score(vectors[order[start : start + size]]) for start in range(0, 150, size)]
    assert np.concatenate(parts).tobytes() == whole[order].tobytes()


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(60)), size=st.integers(1, 60))
def test_labels_and_decisions_are_equal_in_every_batch_and_order(order: list[int], size: int) -> None:
    images = [[[value / 10 - 3, value % 7 - 3.3, 0.1]] for value in range(60)]
    whole = moderate(images)
    parts = [moderate([images[i] for i in order[start : start + size]]) for start in range(0, 60, size)]
    assert pa.concat_arrays([part.labels for part in parts]).equals(whole.labels.take(pa.array(order)))
    assert [d for part in parts for d in part.decision.to_pylist()] == whole.decision.take(pa.array(order)).to_pylist()


@pytest.mark.parametrize("temperature", [1.0, 0.05, 0.001])
def test_margins_are_what_the_formula_says(temperature: float) -> None:
    prompts = random_prompts(temperature)
    vectors = unit_vectors(70)
    expected = by_hand(vectors, prompts) if temperature > 0.01 else None
    margins = Scorer(prompts).score(vectors)
    if expected is None:  # nearly the best neutral prompt, which the plain formula overflows on
        nearest = (vectors @ prompts.neutral.T).max(axis=1, keepdims=True)
        expected = vectors @ prompts.labels.T - nearest
    np.testing.assert_allclose(margins, expected, atol=5e-3 if temperature < 0.01 else 1e-6)


def test_no_vectors_give_no_margins_and_another_dimension_is_refused() -> None:
    assert Scorer(random_prompts()).score(unit_vectors(0)).shape == (0, 17)
    with pytest.raises(ValueError, match="against prompts of 48 dimensions"):
        Scorer(random_prompts()).score(unit_vectors(3, dim=12))


def test_a_label_s_vector_is_the_mean_over_its_prompts_in_the_order_of_the_file() -> None:
    embedder = FakeEmbedder()
    prompts = encode_prompts(POLICY, embedder)
    assert embedder.texts == ["a gun", "two guns", "a knife", "wine", "a banana"]
    np.testing.assert_array_equal(prompts.labels[0, :3], [0.5, 0.5, 0])
    np.testing.assert_array_equal(prompts.labels[1:], np.eye(8)[[2, 3]])
    np.testing.assert_array_equal(prompts.neutral, np.eye(8)[[4]])


def test_archived_prompt_vectors_come_back_to_the_bit() -> None:
    prompts = random_prompts(0.07)
    again = PromptVectors.from_bytes(prompts.to_bytes())
    assert (again.temperature, again.digest) == (0.07, "digest")
    assert again.labels.tobytes() == prompts.labels.tobytes()
    assert again.neutral.tobytes() == prompts.neutral.tobytes()
    with pytest.raises(PolicyError, match="cannot be read"):
        PromptVectors.from_bytes(b"not a file")


def test_block_prevails_over_review_and_review_over_allow() -> None:
    result = moderate([[[-5, -5, -5]], [[1, -5, -5]], [[1, 5, -5]], [[-5, -5, 9]]])
    assert result.decision.to_pylist() == ["allow", "review", "block", "review"]
    assert result.reason.to_pylist() == [None, "weapons/gun", "weapons/knife", "alcohol/wine"]


def test_of_equal_decisions_the_highest_score_is_the_reason() -> None:
    assert moderate([[[3, 4, 9]]]).reason.to_pylist() == ["weapons/knife"]


def test_the_worst_view_decides_per_label_and_is_stored() -> None:
    result = moderate([[[-5, 1, -5]], [[-5, -1, -2], [3, -2, -2], [2, -3, -1]]])
    assert [[label["view"] for label in labels] for labels in result.labels.to_pylist()] == [
        ["squash", "squash", "squash"],
        ["center", "squash", "tile"],
    ]
    assert result.labels.to_pylist()[1][0]["margin"] == 3
    assert result.decision.to_pylist() == ["review", "block"]


def test_a_score_at_the_threshold_reaches_it() -> None:
    result = moderate([[[0, -5, -5]]], thresholds={"gun": Thresholds(review=0.5, block=0.9)})
    assert result.labels.to_pylist()[0][0]["score"] == 0.5
    assert result.decision.to_pylist() == ["review"]


def test_what_was_set_for_the_model_replaces_what_the_policy_says() -> None:
    result = moderate(
        [[[1, -5, -5]]],
        logistic=Logistic(scale=2.0, offset=1.0),
        thresholds={"gun": Thresholds(review=0.2, block=0.5)},
        calibration={"gun": Logistic(scale=1.0, offset=1.0)},
    )
    gun, knife, wine = result.labels.to_pylist()[0]
    assert (gun["score"], gun["probability"], gun["decision"]) == (0.5, 0.5, "block")
    assert (gun["review_threshold"], gun["block_threshold"]) == (pytest.approx(0.2), 0.5)
    assert knife["probability"] is None
    assert wine["block_threshold"] is None


def test_thresholds_are_compared_with_the_probability_where_a_label_is_calibrated_else_with_the_score() -> None:
    calibration = {"gun": Logistic(scale=1.0, offset=2.0)}
    limits = {"gun": Thresholds(review=0.5, block=0.9)}
    # Of gun: scores 0.82, 0.92 and 1.0; probabilities 0.38, 0.62 and 0.95.
    images: list[list[list[float]]] = [[[1.5, -5, -5]], [[2.5, -5, -5]], [[5, -5, -5]], [[2.5, 2.0, -5]]]
    result = moderate(images, thresholds=limits, calibration=calibration)
    assert result.decision.to_pylist() == ["allow", "review", "block", "block"]
    assert [labels[0]["probability"] >= 0.5 for labels in result.labels.to_pylist()] == [False, True, True, True]
    both = moderate([[[2.5, 0.6, -5]]], calibration=calibration)  # gun 0.62 against knife 0.65, by score 0.92
    assert both.reason.to_pylist() == ["weapons/knife"]
    assert moderate(images[:3], thresholds=limits).decision.to_pylist() == ["review", "block", "block"]


def test_stored_margins_decide_as_vectors_do_under_a_calibration() -> None:
    images = [[[value / 10 - 3, value % 7 - 3.3, 0.1]] for value in range(60)]
    calibration = {"gun": Logistic(scale=2.7, offset=0.31), "wine": Logistic(scale=0.4, offset=-0.2)}
    online = moderate(images, calibration=calibration)
    margins = np.array([[label["margin"] for label in labels] for labels in online.labels.to_pylist()], np.float32)
    moderator = Moderator(POLICY, bind(POLICY, IDENTITY, calibration=calibration), None)
    stored = moderator.decide(margins, pa.array(["squash"] * 180))
    assert stored.labels.equals(online.labels)
    assert stored.decision.equals(online.decision)
    assert stored.reason.equals(online.reason)


def test_an_image_without_vectors_is_reviewed_as_unscored() -> None:
    result = moderate([[], [[-5, -5, -5]], []])
    assert result.decision.to_pylist() == ["review", "allow", "review"]
    assert result.reason.to_pylist() == ["unscored", None, "unscored"]
    assert [labels is None for labels in result.labels.to_pylist()] == [True, False, True]


def test_a_view_that_is_no_number_is_reviewed_whatever_the_others_say() -> None:
    result = moderate([[[float("nan"), -5, -5], [-5, -5, -5]]])
    assert result.decision.to_pylist() == ["review"]
    assert result.reason.to_pylist() == ["unscored"]
    assert result.labels.to_pylist()[0][0]["score"] is None


def test_an_unscored_label_does_not_lower_a_block() -> None:
    moderator = Moderator(POLICY, bind(POLICY, IDENTITY), AXES)
    far = np.array([[np.nan, 9.0, -9.0], [np.nan, -9.0, -9.0]], np.float32)
    result = moderator.decide(far, pa.array(["squash"] * 6))
    assert result.decision.to_pylist() == ["block", "review"]
    assert result.reason.to_pylist() == ["weapons/knife", "unscored"]
    assert [label["decision"] for label in result.labels[0].as_py()] == ["review", "block", "allow"]
    assert result.labels[0].as_py()[0]["score"] is None


def test_unbound_everything_is_reviewed_and_still_scored() -> None:
    result = moderate([[[-5, -5, -5]], [[9, -5, -5]], []], bound=False)
    assert result.decision.to_pylist() == ["review"] * 3
    assert result.reason.to_pylist() == ["unbound", "unbound", "unscored"]
    assert result.labels.to_pylist()[1][0]["score"] == pytest.approx(0.99988, abs=1e-4)


def test_no_images_give_no_rows_of_the_right_types() -> None:
    result = moderate([])
    assert result.labels.type.value_type == schema.LABEL
    assert len(result.labels) == len(result.decision) == len(result.reason) == 0


def test_prompts_of_another_policy_are_refused() -> None:
    with pytest.raises(ValueError, match="17 label vectors for the 3 labels"):
        Moderator(POLICY, None, random_prompts())
