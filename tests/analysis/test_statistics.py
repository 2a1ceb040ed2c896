"""Intervals against SciPy's own, and against how often they are wrong where nothing differs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedex_lora.experiments.analysis.statistics import Paired, estimate, mirrored, what_seeds_show

VALUES = [0.11, 0.02, 0.07, 0.05]


def test_one_task_has_the_interval_of_a_t_test():
    e = estimate({"sst2": VALUES})
    expected = stats.ttest_1samp(VALUES, 0).confidence_interval(0.95)
    assert e.interval == pytest.approx((expected.low, expected.high))
    assert e.mean == pytest.approx(np.mean(VALUES)) and e.basis == "4 seeds"


def test_two_tasks_count_alike_and_have_the_interval_of_welch():
    """The mean of two means has the interval of a difference of means, one mirrored, halved."""
    one, two = VALUES, [0.5, 0.1, 0.2]
    e = estimate({"a": one, "b": two})
    welch = stats.ttest_ind(one, [-v for v in two], equal_var=False).confidence_interval(0.95)
    assert e.mean == pytest.approx((np.mean(one) + np.mean(two)) / 2)
    assert e.interval == pytest.approx((welch.low / 2, welch.high / 2))
    assert e.basis == "2 tasks, 3 to 4 seeds each"


def test_tasks_of_one_seed_are_the_sample():
    e = estimate({"a": [0.1], "b": [0.2, 0.4], "c": [0.3]})
    expected = stats.ttest_1samp([0.1, 0.3, 0.3], 0).confidence_interval(0.95)
    assert e.interval == pytest.approx((expected.low, expected.high))
    assert "tasks are the sample" in e.basis


def test_the_bootstrap_repeats_and_stays_within_the_values():
    e = estimate({"a": VALUES})
    assert e.resampled == estimate({"a": VALUES}).resampled
    low, high = e.resampled  # type: ignore[misc]
    assert min(VALUES) <= low < e.mean < high <= max(VALUES)


@pytest.mark.parametrize("values", [[0.3], [0.25, 0.25, 0.25]])
def test_without_spread_nothing_is_claimed(values):
    pair = Paired("a", "b", estimate({"t": values}))
    assert pair.difference.sign == 0 and pair.outcome == "unknown"
    assert "no spread" in pair.verdict()


def test_equal_scores_are_no_difference():
    assert Paired("a", "b", estimate({"t": [0.0, 0.0]})).outcome == "none"


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=6), st.booleans())
def test_no_verdict_contradicts_the_interval(values, higher):
    e = estimate({"t": values})
    outcome = Paired("a", "b", e, higher).outcome
    if outcome in ("better", "worse"):
        (low, high), better = e.interval, outcome == "better"  # type: ignore[misc]
        assert low > 0 if better is higher else high < 0
    assert Paired("a", "b", mirrored(e), not higher).outcome == outcome


def test_where_nothing_differs_a_claim_is_rare_and_a_bootstrap_alone_would_not_be():
    rng = np.random.default_rng(1)
    every = [estimate({"t": rng.normal(size=3)}) for _ in range(400)]
    claimed = np.mean([e.sign != 0 for e in every])
    resampled = np.mean([e.resampled[0] > 0 or e.resampled[1] < 0 for e in every])
    assert claimed <= 0.08
    assert resampled >= 0.2
    assert "25 %" in what_seeds_show(3) and "nothing tells" in what_seeds_show(1)


def test_lower_is_better_turns_the_verdict():
    e = estimate({"t": [-0.5, -0.51, -0.52]})
    assert Paired("a", "b", e, higher=False).verdict().startswith("a beats b by 0.510")
    assert Paired("a", "b", e).verdict().startswith("b beats a by 0.510")
