"""Recall both ways, against the whole matrix sorted at once."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from vlmflow.evaluation.metrics.retrieval import retrieval_recalls, text_ranks, texts_of


def unit(rng: np.random.Generator, num: int, dim: int = 8) -> NDArray[np.float32]:
    vectors = rng.standard_normal((num, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def naive(
    images: NDArray[np.float32], texts: NDArray[np.float32], image_of: NDArray[np.int64], k: int
) -> tuple[float, float]:
    similar = images @ texts.T
    of_images = [
        bool((image_of[np.argsort(-row, kind="stable")[:k]] == number).any()) for number, row in enumerate(similar)
    ]
    of_texts = [
        int(image_of[number]) in np.argsort(-column, kind="stable")[:k] for number, column in enumerate(similar.T)
    ]
    return float(np.mean(of_images)), float(np.mean(of_texts))


@pytest.mark.parametrize("block_cells", [1, 100, 1 << 24])
def test_recalls_equal_those_of_the_whole_matrix(block_cells: int) -> None:
    rng = np.random.default_rng(0)
    images = unit(rng, 40)
    _, image_of = texts_of([["x"] * (1 + number % 6) for number in range(40)])
    texts = images[image_of] + 1.2 * unit(rng, len(image_of))
    recalls = retrieval_recalls(images, texts, image_of, block_cells=block_cells)
    for k in (1, 5, 10):
        image_to_text, text_to_image = naive(images, texts, image_of, k)
        assert recalls.image_to_text[k] == pytest.approx(image_to_text)
        assert recalls.text_to_image[k] == pytest.approx(text_to_image)
        assert 0 < text_to_image < 1


def test_folds_are_means_over_consecutive_parts() -> None:
    rng = np.random.default_rng(1)
    images, image_of = unit(rng, 50), np.repeat(np.arange(50), 5)
    texts = images[image_of] + unit(rng, 250)
    parts = [
        naive(images[start : start + 10], texts[5 * start : 5 * start + 50], image_of[:50], 1)
        for start in range(0, 50, 10)
    ]
    recalls = retrieval_recalls(images, texts, image_of, folds=5)
    assert (recalls.image_to_text[1], recalls.text_to_image[1]) == pytest.approx(tuple(np.mean(parts, axis=0)))
    assert retrieval_recalls(images, texts, image_of).text_to_image[1] < recalls.text_to_image[1]
    with pytest.raises(ValueError, match="50 images do not part into 7"):
        retrieval_recalls(images, texts, image_of, folds=7)


def test_an_image_without_a_vector_counts_as_missed_and_is_found_by_none() -> None:
    images = np.eye(4, dtype=np.float32)
    images[1] = np.nan
    of_images, of_texts = text_ranks(images, np.eye(4, dtype=np.float32), np.arange(4))
    assert of_images.tolist() == of_texts.tolist() == [0, np.iinfo(np.int64).max, 0, 0]
    recalls = retrieval_recalls(images, np.eye(4, dtype=np.float32), np.arange(4))
    # Of fewer candidates than K too.
    assert recalls.image_to_text == recalls.text_to_image == dict.fromkeys((1, 5, 10), 0.75)


def test_what_is_equally_similar_comes_as_listed_and_wins_nothing() -> None:
    same = np.ones((5, 2), np.float32)
    recalls = retrieval_recalls(same, same, np.arange(5))
    assert recalls.image_to_text[1] == recalls.text_to_image[1] == 0.2
