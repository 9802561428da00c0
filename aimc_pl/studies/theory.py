"""Bounds on the convergence of analog SGD with and without delay, and fits of their form to runs.

Update k moves the weights by −α·g − (α/τ)|g|⊙w, where g is the loss's gradient for a sample at the weights that the
sample met. Let α be the learning rate, τ the dynamic range, f a loss with an L-Lipschitz gradient, f₀ − f* its gap,
σ² the variance of g summed over the weights, |w| ≤ W < τ and q = W/τ. The paper (arXiv 2410.15155) proves rates of
this form; its body was not at hand, so the constants here are of the proof in ``docs/THEORY.md``.
"""

from math import sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import nnls
from torch import Tensor


def largest_learning_rate(smoothness: float, saturation: float) -> float:
    """(1−q)/(2L(1+q)), up to which the bounds hold.

    Args:
        smoothness: L.
        saturation: q, below 1.

    Raises:
        ValueError: for another saturation.
    """
    return _fill(saturation) / (2 * smoothness * (1 + saturation) ** 2)


def asymptotic_error(variance: float, saturation: float) -> float:
    """2σ²q²/(1−q²), which the bound on the mean squared gradient norm keeps for any number of updates.

    Args:
        variance: σ².
        saturation: q, below 1.

    Raises:
        ValueError: for another saturation.
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
    """An upper bound on the expected squared gradient norm, averaged over the updates.

    Without delay 4(f₀−f*)/(αK(1−q²)) + 2σ²αL(1+q)/(1−q) + 2σ²q²/(1−q²). With delay e² twice as much, and
    6e²/(1−q²) more.

    Args:
        num_updates: K.
        learning_rate: α.
        gap: f₀ − f*.
        smoothness: L.
        variance: σ².
        saturation: q, below 1.
        delay_error: e², what :func:`delay_error` bounds; ``None`` for no delay.

    Raises:
        ValueError: if the learning rate is above :func:`largest_learning_rate`, or the saturation not below 1.
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
    """(L'·d·α·(1+q))²·G², at most the expected squared distance of a delayed gradient from the current one.

    Args:
        staleness: d, the most updates between the weights that a sample met and those it changes.
        learning_rate: α.
        signal_smoothness: L', by which the gradient changes at most with the weights of single layers.
        second_moment: G² ≥ E‖g‖².
        saturation: q.
    """
    return (signal_smoothness * staleness * learning_rate * (1 + saturation)) ** 2 * second_moment


def best_learning_rate(num_updates: int, gap: float, smoothness: float, variance: float, saturation: float) -> float:
    """The α that minimises the bound without delay, √(2(f₀−f*)/(KLσ²))/(1+q); the bound falls with 1/√K then.

    Args:
        num_updates: K.
        gap: f₀ − f*.
        smoothness: L.
        variance: σ².
        saturation: q, below 1.
    """
    best = sqrt(2 * gap / (num_updates * smoothness * variance)) / (1 + saturation)
    return min(best, largest_learning_rate(smoothness, saturation))


def stationary_error(weight: Tensor, magnitude: Tensor, tau: float | Tensor) -> Tensor:
    """Σ(w·E|g|/τ)², the squared gradient norm where the expected motion −α∇f − (α/τ)E|g|⊙w vanishes.

    What is left of the gradient with small steps, exactly and not as a bound.

    Args:
        weight: ``(..., out, in)``.
        magnitude: E|g| at these weights, of the same shape.
        tau: τ.

    Returns:
        One number per leading index.
    """
    return (weight * magnitude / tau).square().sum((-2, -1))


def _fill(saturation: float) -> float:
    if not 0 <= saturation < 1:
        raise ValueError(f"the weights must stay within the range: saturation must be in [0, 1), got {saturation:.3g}")
    return 1 - saturation**2


def fit_exponent(epsilon: ArrayLike, updates: ArrayLike) -> float:
    """p of the power law updates ∝ ε⁻ᵖ that fits best in logarithms.

    Args:
        epsilon: ``(points,)``.
        updates: ``(points,)``.
    """
    return -float(np.polyfit(np.log(epsilon), np.log(updates), 1)[0])


class Complexity(NamedTuple):
    """Updates to reach an error ε: ``dominant``·ε⁻² + ``extra``·ε⁻¹."""

    dominant: float
    extra: float


def fit_complexity(epsilon: ArrayLike, updates: ArrayLike) -> Complexity:
    """The paper's form O(ε⁻² + ε⁻¹), fitted to measured updates with coefficients of at least 0 and relative errors.

    Args:
        epsilon: ``(points,)``.
        updates: ``(points,)``.
    """
    epsilon, updates = np.asarray(epsilon), np.asarray(updates)
    terms = np.stack([epsilon**-2, epsilon**-1], axis=1) / updates[:, None]
    (dominant, extra), _ = nnls(terms, np.ones(len(updates)))
    return Complexity(float(dominant), float(extra))
