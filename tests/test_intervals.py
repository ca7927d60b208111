"""Intervals against a second library and against what they promise."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from intervals import RATIO_LEVEL, paired_ratio, wilson


@given(st.integers(1, 5000), st.data())
def test_wilson_equals_scipys(trials, data):
    successes = data.draw(st.integers(0, trials))
    expected = stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    assert wilson(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-9)


@given(st.integers(1, 200), st.data())
def test_wilson_holds_the_share_and_stays_between_0_and_1(trials, data):
    successes = data.draw(st.integers(0, trials))
    low, high = wilson(successes, trials)
    assert 0 <= low <= successes / trials <= high <= 1


@pytest.mark.parametrize("successes, trials", [(1, 0), (3, 2), (-1, 2)])
def test_impossible_counts_are_refused(successes, trials):
    with pytest.raises(ValueError, match="at least one trial"):
        wilson(successes, trials)


times = st.lists(st.tuples(st.floats(0.01, 100), st.floats(0.01, 100)), min_size=1, max_size=30)


@given(times)
def test_a_ratio_is_the_median_over_pairs_and_swapping_gives_the_reciprocal(pairs):
    before, after = zip(*pairs, strict=True)
    ratio, low, high = paired_ratio(before, after)
    assert ratio == pytest.approx(np.exp(np.median(np.log(after) - np.log(before))))
    assert low <= ratio * (1 + 1e-12) and ratio <= high * (1 + 1e-12)
    assert paired_ratio(after, before) == pytest.approx((1 / ratio, 1 / high, 1 / low), rel=1e-6)


def test_a_ratio_of_medians_would_be_another():
    """The machine is ten times slower during the last pair: each pair tells the same."""
    ratio, low, high = paired_ratio([1, 1, 10], [2, 2, 20])
    assert (ratio, low, high) == pytest.approx((2, 2, 2))


def test_the_interval_is_close_to_scipys_bootstrap():
    generator = np.random.default_rng(3)
    before = generator.lognormal(size=25)
    after = before * generator.lognormal(0.3, 0.2, size=25)
    _, low, high = paired_ratio(before, after)
    logs = np.log(after / before)
    found = stats.bootstrap((logs,), np.median, confidence_level=RATIO_LEVEL, method="percentile", n_resamples=9999)
    expected = np.exp(found.confidence_interval)
    assert (low, high) == pytest.approx(tuple(expected), rel=0.05)


@pytest.mark.parametrize("noise", [stats.norm(), stats.t(1.5), stats.expon(), stats.lognorm(1.5)])
def test_the_interval_holds_the_truth_in_95_of_100_samples_and_more(noise):
    """Simulated pairs around a ratio of 1.3, symmetric, heavy-tailed and one-sided: 1,000 samples of 20 pairs each."""
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        spread = noise.rvs(size=20, random_state=generator) - noise.median()
        _, low, high = paired_ratio(np.ones(20), 1.3 * np.exp(0.1 * np.clip(spread, -50, 50)))
        held += low <= 1.3 <= high
    assert held >= 950


def test_times_that_make_no_pairs_are_refused():
    for before, after in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match="make no pairs"):
            paired_ratio(before, after)
