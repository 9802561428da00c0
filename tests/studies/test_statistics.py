"""These tests check that confidence intervals cover the truth as often as claimed, and that unknown errors are NaN."""

from math import comb, inf, isnan, nan

import numpy as np
import pytest

from aimc_pl.studies.statistics import estimate, extents, half_width, median_interval, standard_error


@pytest.mark.slow
def test_intervals_cover_the_truth_as_often_as_they_say():
    """Check that between 93.0 and 97.0 % of 2,000 intervals of 95 % cover the truth.

    The bounds are four standard errors. A random seed would raise a false alarm with a probability of 6e-5.
    """
    rng = np.random.default_rng(0)
    intervals = [estimate(rng.normal(3.0, 2.0, 5)) for _ in range(2000)]
    covered = np.mean([low < 3.0 < high for _, low, high in intervals])
    assert 0.93 < covered < 0.97
    assert estimate([1.0, 2.0, 4.0]).value == pytest.approx(7 / 3)


def test_one_run_and_infinite_runs_have_no_error():
    assert standard_error([1.0, 3.0]) == pytest.approx(1.0)
    assert half_width([1.0, 3.0]) == pytest.approx(12.7062, rel=1e-5)  # Student's t of one degree of freedom
    assert half_width([2.0, 2.0, 2.0]) == 0
    for values in ([1.0], [1.0, inf]):
        assert isnan(standard_error(values))
        assert isnan(half_width(values))
        value, low, high = estimate(values)
        assert value == np.mean(values)
        assert isnan(low)
        assert isnan(high)


def test_bars_reach_from_the_smallest_to_the_largest_run():
    bars = extents([np.array([1.0, 2.0, 6.0]), np.array([1.0, inf, 2.0])])
    np.testing.assert_allclose(bars, [[2.0, np.nan], [3.0, np.nan]])


@pytest.mark.parametrize("count", range(6, 31))
def test_intervals_of_the_median_are_as_narrow_as_their_coverage_allows(count):
    """Check the order statistics by the exact coverage 1 − 2·Σ C(n,j)/2ⁿ over j below k."""
    median, low, high = median_interval(np.random.default_rng(count).permutation(count))
    k = int(low) + 1  # the k-th smallest of 0, 1, 2, …
    assert median == (count - 1) / 2
    assert high == count - k

    def coverage(k):
        return 1 - 2 * sum(comb(count, j) for j in range(k)) / 2**count

    assert coverage(k) >= 0.95 > coverage(k + 1)


def test_runs_that_gave_up_count_by_their_rank():
    reached = list(range(1, 11))
    assert median_interval(reached) == (5.5, 2, 9)
    assert median_interval([*reached[:8], inf, inf]) == (5.5, 2, inf)
    assert median_interval([*reached[:5], *[inf] * 5]) == (inf, 2, inf)
    assert median_interval([inf] * 10) == (inf, inf, inf)
    few = median_interval([1.0, 2.0, 4.0])
    assert few.value == 2
    assert isnan(few.low)
    assert isnan(few.high)
    assert all(map(isnan, median_interval([])))
    assert all(map(isnan, median_interval([1.0, nan])))
