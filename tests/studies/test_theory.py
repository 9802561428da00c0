"""These tests check bounds in simulations with known constants, and that fits recover the form of their data."""

from math import inf

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from aimc_pl.studies import theory


def simulate(tau, rate, staleness=0, updates=4000, copies=200, sigma=1.0, size=5, seed=0):
    """Simulate analog SGD on ½Σλ(w − b)² with gradients of ``staleness`` updates ago and noise of ±σ.

    Return the mean squared gradient norm, its mean over the last half, the constants of the bounds, and the largest
    second moment of a gradient.
    """
    rng = np.random.default_rng(seed)
    curvature, target = np.linspace(0.2, 1.0, size), np.linspace(-0.6, 0.8, size)
    history = [np.zeros((copies, size))]
    errors, largest, moments = [], 0.0, []
    for k in range(updates):
        w, old = history[-1], history[max(0, k - staleness) - k - 1]
        errors.append(np.square(curvature * (w - target)).sum(1).mean())
        g = curvature * (old - target) + sigma * rng.choice([-1, 1], w.shape)
        moments.append(np.square(g).sum(1).mean())
        history = [*history[-staleness - 1 :], w - rate * g - rate / tau * np.abs(g) * w]
        largest = max(largest, np.abs(history[-1]).max())
    constants = {
        "gap": float(0.5 * (curvature * target**2).sum()),
        "smoothness": 1.0,
        "variance": size * sigma**2,
        "saturation": largest / tau,
    }
    return np.mean(errors), np.mean(errors[updates // 2 :]), constants, max(moments)


@pytest.mark.slow
@pytest.mark.parametrize("tau", [1.5, 4.0, inf])
@pytest.mark.parametrize("updates", [50, 4000])
def test_the_bound_holds_without_delay(tau, updates):
    error, _, constants, _ = simulate(tau, 0.01, updates=updates)
    bound = theory.error_bound(updates, 0.01, **constants)
    assert error < bound
    # A bound a hundred times as large would say nothing about these quadratics.
    assert bound < 100 * error


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [1, 7, 30])
def test_the_bound_holds_with_delay(staleness):
    error, _, constants, moment = simulate(4.0, 0.01, staleness)
    delay = theory.delay_error(staleness, 0.01, 1.0, moment, constants["saturation"])
    assert error < theory.error_bound(4000, 0.01, **constants, delay_error=delay)
    assert delay == pytest.approx((staleness * 0.01 * (1 + constants["saturation"])) ** 2 * moment)


@pytest.mark.slow
@pytest.mark.parametrize("tau", [1.5, 4.0])
def test_the_error_that_stays_is_the_stationary_one(tau):
    """Compare with w* = λb/(λ + σ/τ), the closed form where noise of ±σ exceeds the gradient, so that E|g| = σ."""
    _, late, constants, _ = simulate(tau, 0.002, updates=12_000)
    curvature, target = np.linspace(0.2, 1.0, 5), np.linspace(-0.6, 0.8, 5)
    w = torch.from_numpy(curvature * target / (curvature + 1 / tau))
    closed = np.square(curvature * (w.numpy() - target)).sum()
    stationary = float(theory.stationary_error(w[None], torch.ones(1, 5), tau))
    assert stationary == pytest.approx(closed, rel=1e-6)
    # The noise of small steps adds at most αLσ²/2.
    assert closed < late < closed + 0.002 * constants["variance"]
    assert stationary < theory.asymptotic_error(constants["variance"], constants["saturation"])


def test_the_bound_in_numbers():
    """Check 4·3/(0.01·100·0.75) + 2·0.7·0.01·2·1.5/0.5 + 2·0.7·0.25/0.75 and, with delay, 2 of it + 6·0.2/0.75."""
    constants = {"gap": 3.0, "smoothness": 2.0, "variance": 0.7, "saturation": 0.5}
    assert theory.error_bound(100, 0.01, **constants) == pytest.approx(16 + 0.084 + 0.4666667)
    assert theory.error_bound(100, 0.01, **constants, delay_error=0.2) == pytest.approx(2 * 16.5506667 + 1.6)


def test_asymptotic_error_is_the_bound_for_many_small_updates():
    constants = {"gap": 3.0, "smoothness": 2.0, "variance": 0.7, "saturation": 0.4}
    limit = theory.error_bound(10**15, 1e-6, **constants)
    assert theory.asymptotic_error(0.7, 0.4) == pytest.approx(limit, rel=1e-4)
    assert theory.asymptotic_error(0.7, 0.0) == 0


@pytest.mark.parametrize("saturation", [0.0, 0.5])
def test_best_learning_rate_minimises_the_bound(saturation):
    constants = {"gap": 3.0, "smoothness": 2.0, "variance": 0.7, "saturation": saturation}
    largest = theory.largest_learning_rate(2.0, saturation)
    for num_updates in (10, 10_000, 1_000_000):
        best = minimize_scalar(
            lambda rate, k=num_updates: theory.error_bound(k, rate, **constants), bounds=(0, largest), method="bounded"
        )
        rate = theory.best_learning_rate(num_updates, **constants)
        assert theory.error_bound(num_updates, rate, **constants) <= best.fun * (1 + 1e-6)
    # With these rates the part above the floor falls with the square root of the number of updates.
    floor = theory.asymptotic_error(0.7, saturation)
    excess = [
        theory.error_bound(k, theory.best_learning_rate(k, **constants), **constants) - floor for k in (10**6, 10**8)
    ]
    assert excess[0] / excess[1] == pytest.approx(10)


def test_too_large_a_learning_rate_is_refused():
    with pytest.raises(ValueError, match=r"up to a learning rate of 0\.0833"):
        theory.error_bound(10, 0.1, gap=1.0, smoothness=2.0, variance=1.0, saturation=0.5)


@pytest.mark.parametrize("saturation", [1.0, 1.5, -0.1])
def test_weights_beyond_the_range_are_refused(saturation):
    constants = {"gap": 1.0, "smoothness": 2.0, "variance": 1.0, "saturation": saturation}
    for bound in (
        lambda: theory.asymptotic_error(1.0, saturation),
        lambda: theory.error_bound(10, 0.001, **constants),
        lambda: theory.best_learning_rate(10, **constants),
    ):
        with pytest.raises(ValueError, match="saturation must be in"):
            bound()


@pytest.mark.parametrize(("dominant", "extra"), [(2.0, 5.0), (3.0, 0.0), (0.0, 7.0)])
def test_fits_recover_what_made_the_data(dominant, extra):
    epsilon = np.geomspace(1, 0.01, 9)
    assert theory.fit_exponent(epsilon, 3 * epsilon**-1.7) == pytest.approx(1.7)
    fitted = theory.fit_complexity(epsilon, dominant * epsilon**-2 + extra / epsilon)
    assert fitted == pytest.approx((dominant, extra), abs=1e-6)
