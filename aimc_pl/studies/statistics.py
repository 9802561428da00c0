"""This module estimates the mean of independent runs and the uncertainty of the mean."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import sem, t


def standard_error(values: ArrayLike) -> float:
    """Return the standard error of the mean of runs ``(runs,)``; NaN for fewer than two runs or infinite values."""
    values = np.asarray(values)
    if len(values) < 2 or not np.isfinite(values).all():
        return float("nan")
    return float(sem(values))


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
    mean = float(values.mean())
    low, high = t.interval(confidence, len(values) - 1, mean, standard_error(values))
    return Estimate(mean, float(low), float(high))
