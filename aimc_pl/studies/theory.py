"""This module computes bounds on the convergence of analog SGD with and without delay, and fits their form to runs.

Update k moves the weights by −α·g − (α/τ)·S⊙w. Let g be the gradient of the samples of the update, and S ≥ |g| the sum
of |δ||x| over them, which for a single sample of a linear layer is |g|. A sample is processed with weights of which
some are older than those that it changes. Let α be the learning rate and τ the dynamic range.

The paper (arXiv 2410.15155) proves rates of this form. The bounds here are those that ``docs/THEORY.md`` proves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, inf, sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq, minimize_scalar, nnls
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """What the bounds need to know of a loss, its samples and the device.

    Raises:
        ValueError: if the saturation is not in [0, 1), or the decay is not 0 at a saturation of 0.
    """

    gap: float
    """f₀ − f*, the loss at the start above its minimum."""

    smoothness: float
    """L, the Lipschitz constant of the loss's gradient."""

    variance: float
    """σ², a bound on the variance of g, summed over the weights."""

    saturation: float = 0.0
    """q, the largest weight relative to τ; 0 without asymmetry."""

    decay: float = 0.0
    """ω², the mean of Σ(wς/τ)² over the updates, where every weight's ς² is at least E S² − (E g)². At most q²Σς²."""

    def __post_init__(self) -> None:
        _check(self.saturation)
        if self.decay > 0 == self.saturation:
            raise ValueError(f"weights that are zero do not decay: saturation is 0, got decay={self.decay:.3g}")

    @property
    def noise(self) -> float:
        """N² = (σ+ω)², a bound on the variance of an update that is divided by α."""
        return update_variance(self.variance, self.decay)


class Layer(NamedTuple):
    """What the bounds need to know of a layer whose signals are delayed."""

    staleness: int
    """d, the largest number of updates between the weights that a sample has met and those that it changes."""

    sensitivity: float
    """L', in ‖e‖² ≤ Σ(L'·motion)², with the motion of every layer over d updates and the error e of the gradient."""

    noise: float
    """N², the :func:`update_variance` of this layer."""


def update_variance(variance: float, decay: float) -> float:
    """Return N² = (σ+ω)², a bound on the variance of −g − S⊙w/τ. For σ² and ω² see :class:`Problem`."""
    return (sqrt(variance) + sqrt(decay)) ** 2


def asymptotic_error(decay: float, saturation: float) -> float:
    """Return ω²/(1−q²), the part of the bounds that no number of updates removes.

    A problem of one weight attains it, so it is the smallest possible. For ω² and q see :class:`Problem`.

    Raises:
        ValueError: if the saturation is out of range.
    """
    _check(saturation)
    return decay / (1 - saturation**2)


def descent(
    error: float, learning_rate: float, problem: Problem, layers: Sequence[Layer] = (), bend: float = inf
) -> float:
    """Return how much the loss falls per update and learning rate, at least, while the squared gradient norm is ε.

    Let ε be the mean over the updates. The returned value times αK is at most the gap, which bounds ε.

    Args:
        error: ε.
        learning_rate: α.
        problem: the constants of the problem.
        layers: all layers with delay.
        bend: ρG: ρ is the Lipschitz constant of the derivative of the delayed gradient in the old weights, and G bounds
            the norm of the loss's gradient. It is 0 on quadratics. With infinity, no derivative is needed.

    Returns:
        The value, or minus infinity where the learning rate is too large for the delay.
    """
    norm, q, smoothness = sqrt(error), problem.saturation, problem.smoothness
    omega, noise = sqrt(problem.decay), sqrt(problem.noise)
    steady = max((layer.staleness * layer.sensitivity for layer in layers), default=0.0)
    random = sqrt(sum(layer.staleness * layer.sensitivity**2 * layer.noise for layer in layers))
    if learning_rate * steady * (1 + q) >= 1:
        return -inf
    # The sizes of the error e of the delayed gradient, of the delayed gradient, and of the mean motion divided by α.
    stale = learning_rate * (steady * ((1 + q) * norm + omega) + random) / (1 - learning_rate * steady * (1 + q))
    delayed = norm + stale
    motion = (1 + q) * delayed + omega
    # The part of e along the gradient of the loss.
    along = norm * stale
    if layers and bend < inf:
        longest = max(layer.staleness for layer in layers)
        window = learning_rate * (longest * motion + sqrt(longest) * noise)
        smooth = learning_rate * (steady * motion * norm + smoothness * window * random) + 4 * bend * window**2
        along = min(along, smooth)
    second_moment = (sqrt(delayed**2 + problem.variance) + sqrt((q * delayed) ** 2 + problem.decay)) ** 2
    return (
        error
        - norm * (sqrt(q**2 * error + problem.decay) + q * stale)
        - along
        - learning_rate * smoothness / 2 * second_moment
    )


def error_bound(
    num_updates: int, learning_rate: float, problem: Problem, layers: Sequence[Layer] = (), bend: float = inf
) -> float:
    """Return an upper bound on the expected squared gradient norm, averaged over the updates.

    It is the error whose :func:`descent` would use up the gap of the loss. It is infinite where the learning rate is
    too large. For the other arguments see :func:`descent`.

    Args:
        num_updates: K, the number of updates.
        learning_rate: α, the learning rate.
        problem: the constants of the problem.
        layers: all layers with delay.
        bend: ρG.
    """

    def excess(error: float) -> float:
        return descent(error, learning_rate, problem, layers, bend) - problem.gap / (learning_rate * num_updates)

    # The excess, divided by the error, grows with the error. So it changes its sign once.
    largest = 1.0
    while excess(largest) <= 0:
        largest *= 4
        if largest > 1e30:
            return inf
    smallest = largest
    while excess(smallest) > 0 and smallest > 1e-30:
        smallest /= 4
    # scipy's annotations give brentq another type than it has with full_output=False.
    return float(brentq(excess, smallest, largest, xtol=1e-14 * largest))  # pyright: ignore[reportArgumentType]


class Reach(NamedTuple):
    """How an error is reached."""

    updates: float
    """The number of updates."""

    learning_rate: float
    """The learning rate."""


def updates_bound(error: float, problem: Problem, layers: Sequence[Layer] = (), bend: float = inf) -> Reach:
    """Return a number of updates that suffices for an error, and the learning rate for which it is smallest.

    For the other arguments see :func:`descent`.

    Args:
        error: ε, the expected squared gradient norm, averaged over the updates.
        problem: the constants of the problem.
        layers: all layers with delay.
        bend: ρG.

    Raises:
        ValueError: if the error is not above :func:`asymptotic_error`.
    """
    floor = asymptotic_error(problem.decay, problem.saturation)
    if error <= floor:
        raise ValueError(f"the bound says nothing about errors up to {floor:.3g}, got {error:.3g}")
    # Without delay the descent falls linearly with the learning rate. Delay makes the best rate smaller.
    at_zero, at_one = descent(error, 0.0, problem), descent(error, 1.0, problem)
    best = at_zero / (at_zero - at_one) / 2

    def updates(shrinking: float) -> float:
        rate = best * exp(-shrinking)
        fall = descent(error, rate, problem, layers, bend)
        return problem.gap / (rate * fall) if fall > 0 else 1e300

    found = minimize_scalar(updates, bounds=(-1e-9, 15), method="bounded", options={"xatol": 1e-6})
    return Reach(float(found.fun), float(best * exp(-found.x)))


def update_noise_error(smoothness: float, variance: float, update_noise: float) -> float:
    """Return the error that no learning rate gets below where every update adds noise: (v+√(v²+4vσ²))/2, v = L²·nσᵤ².

    This is about Lσσᵤ√n. It holds without asymmetry and delay, and is exact for a parabola.

    Args:
        smoothness: L, the Lipschitz constant of the loss's gradient.
        variance: σ², the variance of the gradient, summed over the weights.
        update_noise: nσᵤ², the variance of what an update adds, summed over the weights.
    """
    v = smoothness**2 * update_noise
    return (v + sqrt(v**2 + 4 * v * variance)) / 2


def rounding_variance(bits: int, w_max: float = 1.0) -> float:
    """Return s²/12, the variance of rounding to one of 2ᵇ − 1 weights between ±``w_max`` with a step of s.

    It applies where other noise carries a weight over about half a step. Below that, rounding undoes small updates.
    """
    return (w_max / (2 ** (bits - 1) - 1)) ** 2 / 12


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


def _check(saturation: float) -> None:
    if not 0 <= saturation < 1:
        raise ValueError(f"the weights must stay within the range: saturation must be in [0, 1), got {saturation:.3g}")


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
