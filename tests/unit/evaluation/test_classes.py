"""Top-k, mean per class, ROC AUC and average precision: against scikit-learn and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score, top_k_accuracy_score

from vlmflow.evaluation.metrics.classes import average_precision, bootstrap, mean_per_class, roc_auc, top_k


def test_auc_and_average_precision_equal_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    for case in range(100):
        num = int(rng.integers(2, 60))
        positive = rng.random(num) < rng.uniform(0.1, 0.9)
        positive[:2] = (True, False)
        scores = rng.standard_normal(num) + positive
        if case % 2:
            scores = scores.round(1)  # ties
        weights = rng.integers(0, 4, num).astype(np.float64)
        weights[:2] = 1
        assert roc_auc(scores, positive) == pytest.approx(roc_auc_score(positive, scores))
        assert average_precision(scores, positive) == pytest.approx(average_precision_score(positive, scores))
        weighted = roc_auc(scores, positive, weights)
        assert weighted == pytest.approx(roc_auc_score(positive, scores, sample_weight=weights))
        weighted = average_precision(scores, positive, weights)
        assert weighted == pytest.approx(average_precision_score(positive, scores, sample_weight=weights))


def test_without_both_kinds_there_is_no_auc() -> None:
    scores, yes = np.array([0.1, 0.2]), np.array([True, True])
    assert roc_auc(scores, yes) is None
    assert roc_auc(np.zeros(0), np.zeros(0, bool)) is None
    assert average_precision(scores, ~yes) is None
    assert average_precision(scores, yes) == 1.0


def test_top_k_equals_scikit_learn_and_a_row_without_scores_is_missed() -> None:
    rng = np.random.default_rng(1)
    scores, truth = rng.standard_normal((200, 9)).astype(np.float32), rng.integers(0, 9, 200)
    for k in (1, 5):
        expected = top_k_accuracy_score(truth, scores, k=k, labels=range(9))
        assert top_k(scores, truth, k).mean() == pytest.approx(expected)
    scores[3] = np.nan
    assert not top_k(scores, truth, 9)[3]
    assert top_k(scores, truth, 9).sum() == 199


def test_mean_per_class_weighs_classes_and_not_images() -> None:
    truth = np.array([0, 0, 0, 2])
    assert mean_per_class(np.array([True, True, False, False]), truth) == pytest.approx((2 / 3 + 0) / 2)


def test_bootstrap_holds_the_value_and_narrows_with_more_images() -> None:
    rng = np.random.default_rng(2)
    widths = []
    for num in (50, 2000):
        positive = rng.random(num) < 0.5
        scores = rng.standard_normal(num) + positive
        interval = bootstrap(roc_auc, scores, positive)
        value = roc_auc(scores, positive)
        assert interval is not None
        assert value is not None
        assert interval[0] < value < interval[1]
        widths.append(interval[1] - interval[0])
    assert widths[1] < widths[0] / 3
    assert bootstrap(roc_auc, np.zeros(0), np.zeros(0, bool)) is None
