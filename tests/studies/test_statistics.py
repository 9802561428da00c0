"""Intervals cover what they say, and errors that cannot be known are no numbers."""

from math import inf, isnan

import numpy as np
import pytest

from aimc_pl.studies.statistics import estimate, standard_error


@pytest.mark.slow
def test_intervals_cover_the_truth_as_often_as_they_say():
    """2,000 intervals of 95 %: between 93.0 and 97.0 % cover, four standard errors (false alarm 6e-5)."""
    rng = np.random.default_rng(0)
    intervals = [estimate(rng.normal(3.0, 2.0, 5)) for _ in range(2000)]
    covered = np.mean([low < 3.0 < high for _, low, high in intervals])
    assert 0.93 < covered < 0.97
    assert estimate([1.0, 2.0, 4.0]).value == pytest.approx(7 / 3)


def test_one_run_and_infinite_runs_have_no_error():
    assert standard_error([1.0, 3.0]) == pytest.approx(1.0)
    for values in ([1.0], [1.0, inf]):
        assert isnan(standard_error(values))
        value, low, high = estimate(values)
        assert value == np.mean(values)
        assert isnan(low)
        assert isnan(high)
