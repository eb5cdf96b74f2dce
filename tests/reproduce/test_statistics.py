"""Means, intervals and paired tests over seeds, against scipy on made-up data."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastdml.reproduce.statistics import (
    difference,
    pairs,
    spread,
    t_quantile,
    two_sided_p,
)

stats = pytest.importorskip("scipy.stats")
SCORES = st.floats(0, 100).map(lambda v: round(v, 2))
PAIRS = st.lists(st.tuples(SCORES, SCORES), min_size=2, max_size=12)


@settings(max_examples=200, deadline=None)
@given(PAIRS)
def test_mean_and_deviation_are_numpys(drawn):
    values = [a for a, _ in drawn]
    n, mean, sd = spread(values)
    assert n == len(values)
    assert mean == pytest.approx(np.mean(values), rel=1e-12, abs=1e-12)
    assert sd == pytest.approx(np.std(values, ddof=1), rel=1e-9, abs=1e-12)


@settings(max_examples=200, deadline=None)
@given(PAIRS)
def test_the_paired_test_and_its_interval_are_scipys(drawn):
    baseline, ours = map(list, zip(*drawn, strict=True))
    assume(len({round(b - a, 6) for a, b in drawn}) > 1)
    found = difference(baseline, ours)
    expected = stats.ttest_rel(ours, baseline)
    low, high = expected.confidence_interval(0.95)
    assert not found.same
    assert found.n == len(drawn)
    assert found.mean == pytest.approx(np.mean(ours) - np.mean(baseline), abs=1e-10)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-7, abs=1e-9)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-7)
    assert found.clear == (not low <= 0 <= high)


@settings(max_examples=300, deadline=None)
@given(t=st.floats(-1e4, 1e4), freedom=st.integers(1, 60))
def test_tails_of_students_t_are_scipys_to_their_last_digits(t, freedom):
    assert two_sided_p(t, freedom) == pytest.approx(2 * stats.t.sf(abs(t), freedom), rel=1e-9)


def test_tails_at_the_ends():
    assert two_sided_p(0.0, 3) == 1.0
    assert two_sided_p(math.inf, 3) == two_sided_p(-math.inf, 3) == 0.0


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 9, 30, 1000])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_quantiles_of_students_t_are_scipys(freedom, level):
    expected = stats.t.ppf((1 + level) / 2, freedom)
    assert t_quantile(freedom, level) == pytest.approx(expected, rel=1e-9)


def test_the_interval_covers_the_true_difference_as_often_as_it_says():
    random = np.random.default_rng(0)
    hard = random.normal(0, 5, (2000, 3))  # what both trainings of a seed have in common
    baseline, ours = (
        hard + random.normal(70, 1, hard.shape),
        hard + random.normal(71, 1, hard.shape),
    )
    found = [difference(list(a), list(b)) for a, b in zip(baseline, ours, strict=True)]
    assert np.mean([d.low <= 1 <= d.high for d in found]) == pytest.approx(0.95, abs=0.015)


def test_one_seed_has_a_mean_and_nothing_else():
    assert spread([71.0]) == (1, 71.0, None)
    assert difference([69.0], [71.0]) == (1, 2.0, None, None, None, False)
    assert not difference([69.0], [71.0]).clear


def test_two_seeds_have_a_wide_interval():
    found = difference([69.0, 70.0], [71.0, 71.0])
    assert found.mean == 1.5
    assert found.high - found.mean == pytest.approx(12.706204736 * 0.5)
    assert found.p == pytest.approx(stats.ttest_rel([71.0, 71.0], [69.0, 70.0]).pvalue)


@pytest.mark.parametrize("gap", [0.0, 0.1])
def test_the_same_difference_in_every_seed_is_no_test(gap):
    """70.1 - 70 and 69.1 - 69 differ in their last bits, which are no spread to divide by."""
    baseline = [70.0, 69.0, 68.3]
    found = difference(baseline, [v + gap for v in baseline])
    assert found.same
    assert found.mean == pytest.approx(gap)
    assert (found.low, found.high, found.p) == (None, None, None)
    assert not found.clear


def test_equal_values_of_one_side_are_a_spread_of_0():
    assert spread([70.0, 70.0, 70.0]) == (3, 70.0, 0.0)
    found = difference([70.0, 70.0, 70.0], [71.0, 72.0, 73.0])
    assert found.p == pytest.approx(stats.ttest_1samp([1.0, 2.0, 3.0], 0).pvalue)


@pytest.mark.parametrize("lost", [None, math.nan, math.inf])
def test_a_training_that_failed_takes_its_pair_with_it(lost):
    baseline, ours = [69.0, 70.0, 68.0, 69.5], [71.0, lost, 70.5, 70.5]
    assert spread(ours).n == 3
    found = difference(baseline, ours)
    assert found == difference([69.0, 68.0, 69.5], [71.0, 70.5, 70.5])
    assert found.n == 3


def test_nothing_left():
    assert spread([None, math.nan]) == (0, None, None)
    assert difference([None, 1.0], [1.0, None]) == (0, None, None, None, None, False)
    assert spread([]) == (0, None, None)


def test_values_of_other_seeds_are_not_paired():
    with pytest.raises(ValueError, match="zip"):
        pairs([1.0, 2.0], [1.0])
