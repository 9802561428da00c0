"""This module estimates the mean or the median of independent runs, and its uncertainty."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binom, sem, t


def standard_error(values: ArrayLike) -> float:
    """Return the standard error of the mean of runs ``(runs,)``; NaN for fewer than two runs or infinite values."""
    values = np.asarray(values)
    if len(values) < 2 or not np.isfinite(values).all():
        return float("nan")
    return float(sem(values))


def half_width(values: ArrayLike, confidence: float = 0.95) -> float:
    """Return half the width of Student's confidence interval for the mean of independent runs ``(runs,)``.

    It is NaN if :func:`standard_error` is NaN.

    Args:
        values: one value per run.
        confidence: confidence level of the interval.
    """
    values = np.asarray(values)
    return standard_error(values) * float(t.ppf((1 + confidence) / 2, len(values) - 1))


def extents(values: Iterable[np.ndarray]) -> np.ndarray:
    """Return how far the smallest and the largest of some runs are from their mean, as bars for a figure.

    Args:
        values: for each point of the figure, one value per run.

    Returns:
        An array ``(2, points)``, with NaN for points with an infinite value.
    """
    finite = [each if np.isfinite(each).all() else np.full_like(each, np.nan) for each in values]
    bars = np.array([(each.mean() - each.min(), each.max() - each.mean()) for each in finite]).T
    return np.maximum(bars, 0)  # equal values may differ from their rounded mean


class Estimate(NamedTuple):
    """An estimated number and its confidence interval."""

    value: float
    low: float
    high: float


def estimate(values: ArrayLike, confidence: float = 0.95) -> Estimate:
    """Return the mean of independent runs with Student's confidence interval.

    The interval is NaN if :func:`standard_error` is NaN.

    Args:
        values: one value per run, ``(runs,)``.
        confidence: confidence level of the interval.
    """
    values = np.asarray(values)
    mean, half = float(values.mean()), half_width(values, confidence)
    return Estimate(mean, mean - half, mean + half)


def median_interval(values: ArrayLike, confidence: float = 0.95) -> Estimate:
    """Return the median of independent runs with its confidence interval from order statistics.

    The interval reaches from the k-th smallest to the k-th largest value, with the largest k for which at least
    ``confidence`` of the intervals hold the median of the population. It assumes no distribution. Values of runs that
    gave up may be infinite: only their rank counts. The interval is NaN if there are too few runs (fewer than six for
    95 %), and everything is NaN if a value is.

    Args:
        values: one value per run, ``(runs,)``.
        confidence: confidence level of the interval.
    """
    values = np.sort(np.asarray(values, dtype=float))
    count, nan = len(values), float("nan")
    if not count or np.isnan(values).any():
        return Estimate(nan, nan, nan)
    median = float(values[(count - 1) // 2] + values[count // 2]) / 2
    # The number of values below the population's median is binomial. It is below k in less than half of the rest.
    k = int(binom.ppf((1 - confidence) / 2, count, 0.5))
    return Estimate(median, float(values[k - 1]), float(values[-k])) if k else Estimate(median, nan, nan)
