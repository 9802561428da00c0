"""This module computes bounds on the convergence of analog SGD with and without delay, and fits their form to runs.

Update k moves the weights by −α·g − (α/τ)|g|⊙w, where g is the loss's gradient for a sample, at the weights with which
the sample was processed. Let α be the learning rate, τ the dynamic range, f a loss with an L-Lipschitz gradient,
f₀ − f* its initial gap to the minimum, σ² the variance of g summed over the weights, and |w| ≤ W < τ. The saturation is
q = W/τ.

The paper (arXiv 2410.15155) proves rates of this form. Its body was not available, so the constants here come from the
proof in ``docs/THEORY.md``.
"""

from math import sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import nnls
from torch import Tensor


def largest_learning_rate(smoothness: float, saturation: float) -> float:
    """Return (1−q)/(2L(1+q)), the largest learning rate for which the bounds hold.

    Args:
        smoothness: L, the Lipschitz constant of the loss's gradient.
        saturation: q, at least 0 and below 1.

    Raises:
        ValueError: if the saturation is out of range.
    """
    return _fill(saturation) / (2 * smoothness * (1 + saturation) ** 2)


def asymptotic_error(variance: float, saturation: float) -> float:
    """Return 2σ²q²/(1−q²), which remains of the bound on the mean squared gradient norm after any number of updates.

    Args:
        variance: σ², the variance of g summed over the weights.
        saturation: q, at least 0 and below 1.

    Raises:
        ValueError: if the saturation is out of range.
    """
    return 2 * variance * saturation**2 / _fill(saturation)


def error_bound(
    num_updates: int,
    learning_rate: float,
    gap: float,
    smoothness: float,
    variance: float,
    saturation: float,
    delay_error: float | None = None,
) -> float:
    """Return an upper bound on the expected squared gradient norm, averaged over the updates.

    Without delay, the bound is 4(f₀−f*)/(αK(1−q²)) + 2σ²αL(1+q)/(1−q) + 2σ²q²/(1−q²). With a delay error e², it is
    twice this bound plus 6e²/(1−q²).

    Args:
        num_updates: K, the number of updates.
        learning_rate: α, the learning rate.
        gap: f₀ − f*, the initial gap of the loss to its minimum.
        smoothness: L, the Lipschitz constant of the loss's gradient.
        variance: σ², the variance of g summed over the weights.
        saturation: q, at least 0 and below 1.
        delay_error: e², for which :func:`delay_error` gives a bound; ``None`` for no delay.

    Raises:
        ValueError: if the learning rate is above :func:`largest_learning_rate`, or the saturation is out of range.
    """
    largest = largest_learning_rate(smoothness, saturation)
    if learning_rate > largest:
        raise ValueError(f"the bound holds up to a learning rate of {largest:.3g}, got {learning_rate:.3g}")
    fill = _fill(saturation)
    error = (
        4 * gap / (learning_rate * num_updates * fill)
        + 2 * variance * learning_rate * smoothness * (1 + saturation) / (1 - saturation)
        + asymptotic_error(variance, saturation)
    )
    return error if delay_error is None else 2 * error + 6 * delay_error / fill


def delay_error(
    staleness: int, learning_rate: float, signal_smoothness: float, second_moment: float, saturation: float
) -> float:
    """Return (L'·d·α·(1+q))²·G², a bound on the expected squared distance of a delayed gradient from the current one.

    Args:
        staleness: d, the largest number of updates between the weights with which a sample is processed and the weights
            that it changes.
        learning_rate: α, the learning rate.
        signal_smoothness: L', the Lipschitz constant of the gradient in the weights of single layers.
        second_moment: G² ≥ E‖g‖², a bound on the mean squared norm of g.
        saturation: q = W/τ.
    """
    return (signal_smoothness * staleness * learning_rate * (1 + saturation)) ** 2 * second_moment


def best_learning_rate(num_updates: int, gap: float, smoothness: float, variance: float, saturation: float) -> float:
    """Return the learning rate that minimises the bound without delay.

    It is √(2(f₀−f*)/(KLσ²))/(1+q), but at most :func:`largest_learning_rate`. The bound then falls with 1/√K.

    Args:
        num_updates: K, the number of updates.
        gap: f₀ − f*, the initial gap of the loss to its minimum.
        smoothness: L, the Lipschitz constant of the loss's gradient.
        variance: σ², the variance of g summed over the weights.
        saturation: q, at least 0 and below 1.
    """
    best = sqrt(2 * gap / (num_updates * smoothness * variance)) / (1 + saturation)
    return min(best, largest_learning_rate(smoothness, saturation))


def stationary_error(weight: Tensor, magnitude: Tensor, tau: float | Tensor) -> Tensor:
    """Return Σ(w·E|g|/τ)², the squared gradient norm where the expected motion −α∇f − (α/τ)E|g|⊙w vanishes.

    This is what remains of the gradient with small steps. The value is exact, not a bound.

    Args:
        weight: the weights w, ``(..., out, in)``.
        magnitude: E|g| at these weights, of the same shape.
        tau: τ, the dynamic range.

    Returns:
        One number per leading index.
    """
    return (weight * magnitude / tau).square().sum((-2, -1))


def _fill(saturation: float) -> float:
    if not 0 <= saturation < 1:
        raise ValueError(f"the weights must stay within the range: saturation must be in [0, 1), got {saturation:.3g}")
    return 1 - saturation**2


def fit_exponent(epsilon: ArrayLike, updates: ArrayLike) -> float:
    """Return the exponent p of the power law updates ∝ ε⁻ᵖ that fits best in logarithms.

    Args:
        epsilon: errors ε, ``(points,)``.
        updates: the number of updates to reach each error, ``(points,)``.
    """
    return -float(np.polyfit(np.log(epsilon), np.log(updates), 1)[0])


class Complexity(NamedTuple):
    """The number of updates to reach an error ε, as ``dominant``·ε⁻² + ``extra``·ε⁻¹."""

    dominant: float
    extra: float


def fit_complexity(epsilon: ArrayLike, updates: ArrayLike) -> Complexity:
    """Fit the paper's form O(ε⁻² + ε⁻¹) to measured numbers of updates.

    The coefficients are at least 0, and the fit minimises relative errors.

    Args:
        epsilon: errors ε, ``(points,)``.
        updates: the number of updates to reach each error, ``(points,)``.
    """
    epsilon, updates = np.asarray(epsilon), np.asarray(updates)
    terms = np.stack([epsilon**-2, epsilon**-1], axis=1) / updates[:, None]
    (dominant, extra), _ = nnls(terms, np.ones(len(updates)))
    return Complexity(float(dominant), float(extra))
