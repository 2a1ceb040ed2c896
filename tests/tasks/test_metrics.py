"""Metrics against values worked out by hand."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from fedex_lora.tasks import metrics

LABELS = np.array([1, 1, 1, 0, 0])
FOUND = np.array([1, 1, 0, 0, 1])  # 2 true positives, 1 false, 1 missed, 1 true negative


def test_classification():
    assert metrics.accuracy(FOUND, LABELS) == pytest.approx(3 / 5)
    assert metrics.f1(FOUND, LABELS) == pytest.approx(2 / 3)
    assert metrics.macro_f1(FOUND, LABELS) == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert metrics.matthews(FOUND, LABELS) == pytest.approx((2 * 1 - 1 * 1) / 6)


def test_predictions_and_labels_are_not_mixed_up():
    found, labels = np.array([0, 0, 0, 1]), np.array([1, 1, 1, 1])
    assert metrics.macro_f1(found, labels) == pytest.approx((0 + 2 / 5) / 2)


def test_correlations():
    found, labels = np.array([1.0, 2.0, 3.0, 10.0]), np.array([0.0, 1.0, 3.0, 2.0])
    centred = (found - 4) @ (labels - 1.5)
    assert metrics.pearson(found, labels) == pytest.approx(centred / math.sqrt(50 * 5))
    assert metrics.spearman(found, labels) == pytest.approx(1 - 6 * 2 / (4 * 15))


def test_what_is_undefined_is_zero_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same, other = np.array([1, 1, 1]), np.array([0, 1, 1])
        assert metrics.matthews(same, other) == 0
        assert metrics.pearson(same, other) == metrics.spearman(other, same) == 0
        assert metrics.f1(np.array([0, 0]), np.array([0, 0])) == 0


def test_a_prediction_that_is_no_number_shows():
    assert math.isnan(metrics.pearson(np.array([1.0, np.nan]), np.array([1.0, 2.0])))
    assert math.isnan(metrics.spearman(np.array([1.0, np.inf]), np.array([1.0, 2.0])))
    assert math.isnan(metrics.perplexity(math.nan))


def test_every_token_counts_the_same():
    loss = metrics.mean_loss([3.0, 1.0], [1, 3])
    assert loss == 1.0 and metrics.perplexity(loss) == pytest.approx(math.e)
    assert metrics.perplexity(math.inf) == math.inf


def test_exact_match_needs_as_many_of_both():
    assert metrics.exact_match(["a ", "b", "C"], ["a", " b", "c"]) == pytest.approx(2 / 3)
    with pytest.raises(ValueError):
        metrics.exact_match(["a"], ["a", "b"])
