"""What independent runs say about their mean."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import sem, t


def standard_error(values: ArrayLike) -> float:
    """Of the mean of independent runs ``(runs,)``; no number for a single run or infinite values."""
    values = np.asarray(values)
    if len(values) < 2 or not np.isfinite(values).all():
        return float("nan")
    return float(sem(values))


class Estimate(NamedTuple):
    """A number and its confidence interval."""

    value: float
    low: float
    high: float


def estimate(values: ArrayLike, confidence: float = 0.95) -> Estimate:
    """Mean of independent runs with Student's interval, which is no number where the standard error is none.

    Args:
        values: ``(runs,)``.
        confidence: of the interval.
    """
    values = np.asarray(values)
    mean = float(values.mean())
    low, high = t.interval(confidence, len(values) - 1, mean, standard_error(values))
    return Estimate(mean, float(low), float(high))
