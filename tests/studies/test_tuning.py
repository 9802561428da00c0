"""These tests check that learning rates are chosen inside their grid, on a score with a known maximum."""

from math import log2

import pytest

from aimc_pl.studies.rows import read_rows
from aimc_pl.studies.tuning import missing_rate, tune

BEST = {"low": 0.001, "middle": 0.1, "high": 3.0}


def run(task, learning_rate, seed):
    return [{"score": -abs(log2(learning_rate / BEST[task])) + 0.01 * seed}]


def mean(rows):
    return sum(float(row["score"]) for row in rows) / len(rows)


def test_the_grid_grows_until_the_best_rate_is_inside(tmp_path):
    """Check the best rate of a grid of factors of 2, and that each setting tries no rate beyond what it needs."""
    path = tmp_path / "study.csv"
    settings = [{"task": task} for task in BEST]
    rates = tune(run, settings, [7, 8], [0.2, 0.05, 0.1], mean, path, jobs=1)
    assert rates == pytest.approx([0.05 / 2**6, 0.1, 0.2 * 2**4])
    rows = read_rows(path)
    tried = {task: {float(row["learning_rate"]) for row in rows if row["task"] == task} for task in BEST}
    assert tried["middle"] == {0.05, 0.1, 0.2}
    for task, rate in zip(BEST, rates, strict=True):
        assert min(tried[task]) < rate < max(tried[task])
        assert min(tried[task]) >= min(0.05, rate / 2)
        assert max(tried[task]) <= max(0.2, rate * 2)
    assert {row["seed"] for row in rows} == {"7", "8"}
    # A second call takes the same rates from the file.
    assert tune(run, settings, [7, 8], [0.05, 0.1, 0.2], mean, path, jobs=1) == rates
    assert read_rows(path) == rows


def test_a_single_rate_is_taken_as_it_is(tmp_path):
    path = tmp_path / "study.csv"
    assert tune(run, [{"task": "low"}] * 2, [0], [0.3], mean, path, jobs=1) == [0.3, 0.3]
    assert not path.exists()


def test_missing_rates():
    assert missing_rate({0.1: 0.5, 0.2: 0.7, 0.4: 0.6}) is None
    assert missing_rate({0.1: 0.5, 0.2: 0.6, 0.4: 0.7}) == 0.8
    assert missing_rate({0.4: 0.5, 0.2: 0.6, 0.1: 0.7}) == 0.05
