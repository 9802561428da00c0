"""These tests check docs/THEORY.md line by line: with symbols, on random instances, and on all paths of short runs."""

from dataclasses import dataclass
from itertools import product
from math import inf, sqrt

import numpy as np
import pytest
import sympy
import torch
from scipy.optimize import brentq

from aimc_pl.studies import theory
from aimc_pl.studies.theory import Layer, Problem

INSTANCES = 5000
BENT = 4 / (3 * sqrt(3))
"""The largest |d²/dw² tanh(w)|."""


def at_most(value, bound):
    """Check an inequality up to rounding."""
    assert np.all(value <= bound + 1e-12 * (1 + np.abs(bound)))


def root_mean_square(values):
    """Return the root of the mean over updates and paths of the squared norm of ``(updates, paths, weights)``."""
    return np.sqrt(np.square(values).sum(-1).mean())


def test_scalar_inequalities():
    """Check the inequalities of the page on random numbers and random distributions of six values."""
    rng = np.random.default_rng(0)
    a, spread = rng.lognormal(0, 2, (2, INSTANCES))
    q = rng.random(INSTANCES)
    gradient, error = rng.normal(0, 3, (2, INSTANCES)) * a
    at_most(np.hypot(gradient + error, spread), np.hypot(gradient, spread) + np.abs(error))
    at_most(a + np.hypot(q * a, spread), (1 + q) * a + spread)
    # S ≥ |g|: its mean, and the variance of an update.
    g = rng.standard_normal((INSTANCES, 6)) * rng.lognormal(0, 1, (INSTANCES, 6)) + rng.normal(0, 2, (INSTANCES, 1))
    extra = rng.exponential(1, g.shape) * rng.integers(0, 2, (INSTANCES, 1))
    share = rng.dirichlet(np.ones(6), INSTANCES)

    def mean(values):
        return (share * values).sum(1)

    s, weight = np.abs(g) + extra, q * rng.choice([-1, 1], INSTANCES)
    variance, decay_variance = mean(g**2) - mean(g) ** 2, mean(s**2) - mean(g) ** 2
    at_most(variance, decay_variance)
    at_most(mean(s), np.hypot(mean(g), np.sqrt(decay_variance)))
    update = -g - s * weight[:, None]
    decay = weight**2 * decay_variance
    at_most(mean(update**2) - mean(update) ** 2, (np.sqrt(variance) + np.sqrt(decay)) ** 2)
    # With αS ≤ τ = 1 an update stays in the range.
    share_of_range = rng.random(s.shape)
    at_most(np.abs(weight[:, None] - share_of_range * (g / s + weight[:, None])), 1)
    h = np.abs(mean(g))
    at_most(mean(update**2), (np.sqrt(h**2 + variance) + np.sqrt(weight**2 * h**2 + decay)) ** 2)


def test_sums_over_weights_and_updates():
    """Check the inequalities of Cauchy and Schwarz and of Minkowski as the page uses them."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        gradient, error = rng.standard_normal((2, 7, 5)) * rng.lognormal(0, 2, (2, 7, 5))
        spread, weight = rng.lognormal(0, 2, 5), rng.random((7, 5)) * 0.9
        t, decay, q = np.square(gradient).sum(1).mean(), np.square(weight * spread).sum(1).mean(), weight.max()
        pull = np.abs(gradient) * weight * np.hypot(gradient, spread)
        at_most(pull.sum(1).mean(), sqrt(t * (q**2 * t + decay)))
        size = root_mean_square(error[:, None])
        at_most(np.abs((gradient * error).sum(1).mean()), sqrt(t) * size)
        # Sensitivities of single layers make one of all layers.
        norms, each = np.abs(error), rng.lognormal(0, 1, 5)
        at_most((each * norms).sum(1) ** 2, (each.sum() * each * norms**2).sum(1))


@pytest.mark.parametrize("count", [2, 5, 30])
def test_decay_variance_of_a_batch(count):
    """Check that ς² of a mean of samples is between σ² and the variance of one sample, and grows with cancellation."""
    rng = np.random.default_rng(0)
    values = rng.normal(0.3, 1, (40_000, count))
    variance, decay = values.mean(1).var(), np.square(np.abs(values).mean(1)).mean() - values.mean(1).mean() ** 2
    one = np.square(values).mean() - values.mean() ** 2
    assert variance == pytest.approx(one / count, rel=0.05)
    assert variance < decay < one
    magnitude = np.abs(values).mean()
    exact = np.square(values).mean() / count + (1 - 1 / count) * magnitude**2 - values.mean() ** 2
    assert decay == pytest.approx(exact, rel=0.02)


def test_closed_forms():
    """Check the updates without delay, the asymptotic error and the extra updates with symbols."""
    a, b, e, gap, smooth, q, omega, noise = sympy.symbols("alpha b epsilon Delta L q omega N", positive=True)
    available = e - sympy.sqrt(e * (q**2 * e + omega**2))
    steps = a * (available - a * smooth / 2 * b)
    best = sympy.solve(sympy.diff(steps, a), a)[0]
    assert sympy.simplify(gap / steps.subs(a, best) - 2 * smooth * gap * b / available**2) == 0
    # The error at which the descent without delay and with small steps vanishes.
    floor = omega**2 / (1 - q**2)
    assert sympy.simplify(floor**2 - floor * (q**2 * floor + omega**2)) == 0
    # Without asymmetry there are exactly two terms.
    digital = (2 * smooth * gap * (e + noise**2) / e**2).expand()
    assert sympy.simplify(digital - (2 * smooth * gap * noise**2 / e**2 + 2 * smooth * gap / e)) == 0
    # Extra updates to first order: descent loses α·P·ε + α²·L·√D·V·N + 4ρGα²·D·N², at the best rate without delay.
    steady, random, longest, bend, order = sympy.symbols("P V D rhoG o", positive=True)
    loss = a * steady * e + a**2 * (smooth * sympy.sqrt(longest) * random * noise + 4 * bend * longest * noise**2)
    rate = e / (smooth * noise**2)
    descent = rate * (e - rate * smooth / 2 * noise**2 - order * loss.subs(a, rate))
    extra = sympy.diff(gap / descent, order).subs(order, 0)
    each = steady + sympy.sqrt(longest) * random / noise + 4 * bend * longest / smooth
    assert sympy.simplify(extra - 4 * gap * each / e) == 0


@dataclass
class Case:
    """A problem with delayed gradients ``delayed(w, old)`` of a loss, its constants, and a run's settings."""

    loss: object
    delayed: object
    smoothness: float
    bend: float
    sensitivity: np.ndarray
    staleness: np.ndarray
    start: np.ndarray
    noise: np.ndarray
    rate: float
    tau: float
    extra: float


def quadratic(rng, size=3):
    """Return a random quadratic ½(w−b)ᵀA(w−b), with part of its gradient at old weights. The loss is above zero."""
    root = rng.standard_normal((size, size))
    matrix, target = root @ root.T / size, rng.normal(0, 1, size)
    old_part = rng.normal(0, 1, (size, size)) * rng.choice([0.1, 1.0])
    columns = np.linalg.norm(old_part, axis=0)
    return Case(
        lambda w: 0.5 * np.einsum("...i,ij,...j", w - target, matrix, w - target),
        lambda w, old: (w - target) @ matrix + (old - w) @ old_part.T,
        np.linalg.norm(matrix, 2),
        0.0,
        np.sqrt(columns * columns.sum()),
        *settings(rng, size),
    )


def log_cosh(rng, size=3):
    """Return Σ log cosh(w − b), whose gradient tanh(w − b) is not linear. All of it is at old weights."""
    target = rng.normal(0, 2, size)
    return Case(
        lambda w: np.log(np.cosh(w - target)).sum(-1),
        lambda w, old: np.tanh(old - target),
        1.0,
        BENT * sqrt(size),
        np.ones(size),
        *settings(rng, size),
    )


def settings(rng, size):
    start = rng.normal(0, 1, size)
    noise = rng.lognormal(-1, 1, size) * rng.choice([0.1, 1.0])
    rate = rng.choice([0.003, 0.02, 0.1])
    return rng.integers(0, 5, size), start, noise, rate, rng.choice([2.5, 8.0, inf]), rng.choice([0.0, 0.5])


class Paths:
    """All equally likely paths of a short run whose noise is up or down in each update, with exact expectations."""

    def __init__(self, case, updates=8):
        signs = np.array(list(product((-1, 1), repeat=updates)))
        w = np.broadcast_to(case.start, (len(signs), len(case.start)))
        self.weights, steps, means, hs, decays, errors, olds = [w], [], [], [], [], [], []
        for k in range(updates):
            ages = np.minimum(case.staleness, k)
            old = np.stack([self.weights[k - age][:, i] for i, age in enumerate(ages)], -1)
            h = case.delayed(w, old)
            both = [self.step(case, w, h + sign * case.noise) for sign in (-1, 1)]
            squares = [np.square(np.abs(h + sign * case.noise) + case.extra) for sign in (-1, 1)]
            decays.append(np.mean(squares, 0) - h**2)
            means.append(np.mean(both, 0))
            step = self.step(case, w, h + signs[:, k, None] * case.noise)
            w = w + step
            olds.append(old)
            hs.append(h)
            errors.append(h - case.delayed(self.weights[-1], self.weights[-1]))
            steps.append(step)
            self.weights.append(w)
        self.before = np.array(self.weights[:-1])
        self.steps, self.means, self.h, self.error = (np.array(each) for each in (steps, means, hs, errors))
        self.gradient = self.h - self.error
        self.olds = np.array(olds)
        self.saturation = np.abs(self.weights).max() / case.tau
        # ω² of each weight.
        self.decay = np.square(self.before / case.tau).mean((0, 1)) * np.array(decays).max((0, 1))

    @staticmethod
    def step(case, w, g):
        return -case.rate * (g + (np.abs(g) + case.extra) * w / case.tau)


@pytest.mark.slow
@pytest.mark.parametrize("make", [quadratic, log_cosh])
def test_every_line_of_the_proof_on_all_paths(make):
    """Compare both sides of each inequality, with exact expectations over the 256 paths of random runs."""
    rng = np.random.default_rng(0)
    checked, tightest = 0, inf
    for _ in range(250):
        case = make(rng)
        paths = Paths(case)
        if paths.saturation >= 0.95:
            continue
        checked += 1
        q, rate, smoothness = paths.saturation, case.rate, case.smoothness
        before, gradient, error, means = paths.before, paths.gradient, paths.error, paths.means
        variances = case.noise**2
        problem = Problem(np.mean(case.loss(before[0])), smoothness, variances.sum(), q, paths.decay.sum())
        layers = [
            Layer(int(d), float(s), theory.update_variance(v, c))
            for d, s, v, c in zip(case.staleness, case.sensitivity, variances, paths.decay, strict=True)
        ]
        # The mean motion, its noise and the second moment, as means over the updates.
        t, error_size = np.square(gradient).sum(-1).mean(), root_mean_square(error)
        along, pull = (gradient * means).sum(-1).mean() / rate, sqrt(t * (q**2 * t + problem.decay))
        at_most(along, -t - (gradient * error).sum(-1).mean() + pull + q * sqrt(t) * error_size)
        at_most(along, -t + pull + (1 + q) * sqrt(t) * error_size)
        at_most(root_mean_square(paths.steps - means), rate * sqrt(problem.noise))
        delayed = root_mean_square(paths.h)
        at_most(delayed, sqrt(t) + error_size)
        second = sqrt(delayed**2 + problem.variance) + sqrt((q * delayed) ** 2 + problem.decay)
        at_most(root_mean_square(paths.steps), rate * second)
        # The loss after every update.
        after = case.loss(before + paths.steps)
        linear = case.loss(before) + (gradient * paths.steps).sum(-1)
        at_most(after, linear + smoothness / 2 * np.square(paths.steps).sum(-1))
        # The error of delayed gradients, by the motion of every layer over its own staleness.
        at_most(np.square(error).sum(-1), (case.sensitivity**2 * np.square(before - paths.olds)).sum(-1))
        motion, longest = root_mean_square(means) / rate, case.staleness.max()
        steady = (case.staleness * case.sensitivity).max()
        spread = sqrt(sum(d * s**2 * v for d, s, v in layers))
        at_most(error_size, rate * (steady * motion + spread))
        at_most(motion, (1 + q) * delayed + sqrt(problem.decay))
        # The motion in the longest window, and the part of the error along the gradient.
        start = np.array([paths.weights[max(0, k - longest)] for k in range(len(before))])
        window = rate * (longest * motion + sqrt(longest * problem.noise))
        for moved in (before, paths.olds):
            at_most(root_mean_square(moved - start), window)
        smooth = rate * (steady * motion * sqrt(t) + smoothness * window * spread) + 4 * case.bend * window**2
        at_most(np.abs((gradient * error).sum(-1).mean()), smooth)
        # The theorem.
        at_most(theory.descent(t, rate, problem, layers, case.bend) * rate * len(before), problem.gap)
        for bend in (inf, case.bend):
            whole = theory.error_bound(len(before), rate, problem, layers, bend)
            at_most(t, whole)
        tightest = min(tightest, whole / t)
    assert checked > 150
    assert tightest < 3


def simulate(tau, rate, staleness=0, updates=4000, copies=200, sigma=1.0, size=5, seed=0, samples=1):
    """Simulate analog SGD on ½Σλ(w − b)² with gradients of ``staleness`` updates ago, and noise of ±σ per sample.

    Return the mean squared gradient norm, its mean over the last half, and the problem.
    """
    rng = np.random.default_rng(seed)
    curvature, target = np.linspace(0.2, 1.0, size), np.linspace(-0.6, 0.8, size)
    history = [np.zeros((copies, size))]
    errors, largest, squares = [], 0.0, []
    for k in range(updates):
        w, old = history[-1], history[max(0, k - staleness) - k - 1]
        errors.append(np.square(curvature * (w - target)).sum(1).mean())
        g = curvature * (old - target) + sigma * rng.choice([-1, 1], (samples, *w.shape))
        magnitude = np.abs(g).mean(0)
        history = [*history[-staleness - 1 :], w - rate * g.mean(0) - rate / tau * magnitude * w]
        largest = max(largest, np.abs(history[-1]).max())
        squares.append(np.square(w).sum(1).mean())
    variance = size * sigma**2
    gap = float(0.5 * (curvature * target**2).sum())
    # The variance of one sample bounds E S² − (E g)² of a mean of several.
    problem = Problem(gap, 1.0, variance / samples, largest / tau, np.mean(squares) * sigma**2 / tau**2)
    return np.mean(errors), np.mean(errors[updates // 2 :]), problem


@pytest.mark.slow
@pytest.mark.parametrize("tau", [1.5, 4.0, inf])
@pytest.mark.parametrize(("updates", "samples"), [(50, 1), (4000, 1), (1000, 8)])
def test_the_bound_holds_without_delay(tau, updates, samples):
    error, _, problem = simulate(tau, 0.01, updates=updates, samples=samples)
    bound = theory.error_bound(updates, 0.01, problem)
    assert error < bound < 2.6 * error  # docs/THEORY.md names the largest ratio


@pytest.mark.slow
@pytest.mark.parametrize("tau", [4.0, inf])
@pytest.mark.parametrize("staleness", [1, 7, 30])
def test_the_bound_holds_with_delay(tau, staleness):
    """Compare with a run of one layer. Its delayed gradient is linear, so that nothing bends."""
    error, _, problem = simulate(tau, 0.005, staleness)
    layers = [Layer(staleness, 1.0, problem.noise)]
    bound = theory.error_bound(4000, 0.005, problem, layers, bend=0.0)
    assert error < bound < 4.8 * error  # docs/THEORY.md names the largest ratio
    assert bound <= theory.error_bound(4000, 0.005, problem, layers)


@pytest.mark.slow
@pytest.mark.parametrize("tau", [1.5, 4.0])
def test_the_error_that_stays_is_the_stationary_one(tau):
    """Compare with w* = λb/(λ + σ/τ), the closed form where noise of ±σ exceeds the gradient, so that E|g| = σ."""
    _, late, problem = simulate(tau, 0.002, updates=12_000)
    curvature, target = np.linspace(0.2, 1.0, 5), np.linspace(-0.6, 0.8, 5)
    w = torch.from_numpy(curvature * target / (curvature + 1 / tau))
    closed = np.square(curvature * (w.numpy() - target)).sum()
    stationary = float(theory.stationary_error(w[None], torch.ones(1, 5), tau))
    assert stationary == pytest.approx(closed, rel=1e-6)
    # The noise of small steps adds at most αLσ²/2.
    assert closed < late < closed + 0.002 * problem.variance
    assert stationary < theory.asymptotic_error(float(w.square().sum()) / tau**2, problem.saturation) < 1.2 * stationary


@pytest.mark.parametrize("saturation", [0.1, 0.5, 0.9])
def test_one_weight_attains_the_asymptotic_error(saturation):
    """Check that where g = ±√(∇²+σ²) with mean ∇, the expected motion vanishes at the error q²σ²/(1−q²)."""
    variance = 0.7
    gradient = sqrt(theory.asymptotic_error(saturation**2 * variance, saturation))
    magnitude = sqrt(gradient**2 + variance)
    up = (1 + gradient / magnitude) / 2
    assert up * magnitude - (1 - up) * magnitude == pytest.approx(gradient)
    assert up * (magnitude - gradient) ** 2 + (1 - up) * (-magnitude - gradient) ** 2 == pytest.approx(variance)
    # The weight −qτ is pulled to zero by as much as the gradient pushes it away.
    assert gradient - saturation * magnitude == pytest.approx(0)


def test_the_bound_in_numbers():
    """Solve t = 0.1·K⁻¹… by hand: without asymmetry t = (2Δ/(αK) + αLσ²)/(2 − αL)."""
    assert theory.error_bound(100, 0.1, Problem(3.0, 2.0, 0.7, 0.0)) == pytest.approx((0.6 + 0.14) / 1.8)
    # With q = 0.5, σ² = 0.7 and ω² = 0.2.
    problem = Problem(3.0, 2.0, 0.7, 0.5, 0.2)
    assert problem.noise == pytest.approx(0.9 + 2 * sqrt(0.14))
    expected = 2.0 - sqrt(2.0 * 0.7) - 0.01 * (sqrt(2.7) + sqrt(0.7)) ** 2
    assert theory.descent(2.0, 0.01, problem) == pytest.approx(expected)
    # Layers of d = 2, 1 and L' = 1, 3: P = 3, V² = 2·0.5 + 9·0.2. The first form of e along the gradient.
    layers = [Layer(2, 1.0, 0.5), Layer(1, 3.0, 0.2)]
    norm = sqrt(2.0)
    stale = 0.01 * (3 * (1.5 * norm + sqrt(0.2)) + sqrt(2.8)) / (1 - 0.045)
    delayed = norm + stale
    second = sqrt(delayed**2 + 0.7) + sqrt(0.25 * delayed**2 + 0.2)
    expected = 2.0 - norm * sqrt(0.7) - 1.5 * norm * stale - 0.01 * second**2
    assert theory.descent(2.0, 0.01, problem, layers) == pytest.approx(expected)
    assert theory.descent(2.0, 0.01, problem, layers, bend=1e6) == pytest.approx(expected)
    # The second form, with ρG = 0.1.
    motion = 1.5 * delayed + sqrt(0.2)
    window = 0.01 * (2 * motion + sqrt(2) * sqrt(problem.noise))
    along = 0.01 * (3 * motion * norm + 2 * window * sqrt(2.8)) + 0.4 * window**2
    assert theory.descent(2.0, 0.01, problem, layers, bend=0.1) == pytest.approx(expected + norm * stale - along)


def test_the_asymptotic_error_is_the_bound_for_many_small_updates():
    problem = Problem(3.0, 2.0, 0.7, 0.4, 0.05)
    limit = theory.error_bound(10**15, 1e-6, problem, [Layer(9, 1.0, problem.noise)])
    assert theory.asymptotic_error(0.05, 0.4) == pytest.approx(limit, rel=1e-3)
    assert theory.asymptotic_error(0.0, 0.0) == 0


@pytest.mark.parametrize("saturation", [0.0, 0.3])
@pytest.mark.parametrize("staleness", [0, 3])
def test_the_updates_to_an_error_are_those_of_the_best_rate(saturation, staleness):
    problem = Problem(3.0, 2.0, 0.7, saturation, saturation**2 * 0.5)
    layers = [Layer(staleness, 2.0, problem.noise)] if staleness else []
    floor = theory.asymptotic_error(problem.decay, saturation)
    for above in (0.1, 0.02):
        error = floor + above
        updates, rate = theory.updates_bound(error, problem, layers, bend=0.0)
        assert theory.error_bound(round(updates), rate, problem, layers, bend=0.0) == pytest.approx(error, rel=0.01)
        # No other rate does better.
        bounds = [
            theory.error_bound(round(updates), rate * c, problem, layers, bend=0.0) for c in (0.7, 0.95, 1.05, 1.4)
        ]
        assert min(bounds) > error
        if not staleness:
            available = error - saturation * sqrt(error * (error + 0.5))
            second = (sqrt(error + 0.7) + saturation * sqrt(error + 0.5)) ** 2
            closed = 2 * 2 * 3 * second / available**2
            assert updates == pytest.approx(closed, rel=1e-6)


def test_delay_adds_updates_in_proportion_to_staleness_and_leaves_the_dominant_term():
    """Compare with 4Δ(P + √D·V/N + 4ρGD/L)/ε, which is 4Δ(2L' + 4ρG/L)d/ε for one layer."""
    problem = Problem(3.0, 2.0, 0.7, 0.0)
    for error, staleness, bend in product((1e-4, 1e-5), (1, 3, 9), (0.0, 0.5)):
        alone = theory.updates_bound(error, problem).updates
        extra = theory.updates_bound(error, problem, [Layer(staleness, 1.5, 0.7)], bend).updates - alone
        assert extra == pytest.approx(4 * 3 * (2 * 1.5 + 4 * bend / 2) * staleness / error, rel=0.1)
        assert extra / alone < 0.02


def test_delay_adds_updates_in_the_first_form():
    """Compare with 4Δ·V·ε^(−3/2), where V = L'·√(d·σ²) for one layer."""
    problem = Problem(3.0, 2.0, 0.7, 0.0)
    for error, staleness in product((1e-6, 1e-7), (1, 4, 16)):
        alone = theory.updates_bound(error, problem).updates
        extra = theory.updates_bound(error, problem, [Layer(staleness, 1.5, 0.7)]).updates - alone
        assert extra == pytest.approx(4 * 3 * 1.5 * sqrt(staleness * 0.7) * error**-1.5, rel=0.02)


def test_delay_costs_more_near_the_asymptotic_error():
    """Compare with 4Δ·P(1+q)√ε·((1+q)√ε+ω)/A², the part of a short delay's mean motion."""
    problem = Problem(3.0, 2.0, 0.7, 0.3, 0.05)
    for above in (1.01, 1.03):
        error = above * theory.asymptotic_error(0.05, 0.3)
        short = Layer(2, 1e-6, 0.0)
        extra = (
            theory.updates_bound(error, problem, [short], 0.0).updates - theory.updates_bound(error, problem).updates
        )
        available = theory.descent(error, 0.0, problem)
        norm = sqrt(error)
        expected = 4 * 3 * 2e-6 * 1.3 * norm * (1.3 * norm + sqrt(0.05)) / available**2
        assert extra == pytest.approx(expected, rel=0.05)


def test_too_large_a_learning_rate_has_no_bound():
    problem = Problem(1.0, 2.0, 1.0, 0.5, 0.25)
    assert theory.error_bound(10, 0.5, problem) == inf
    assert theory.error_bound(10, 0.05, problem, [Layer(14, 1.0, 1.0)]) == inf
    assert theory.error_bound(10, 0.05, problem) < inf


@pytest.mark.parametrize("saturation", [1.0, 1.5, -0.1])
def test_weights_beyond_the_range_are_refused(saturation):
    for bound in (lambda: theory.asymptotic_error(1.0, saturation), lambda: Problem(1.0, 2.0, 1.0, saturation)):
        with pytest.raises(ValueError, match="saturation must be in"):
            bound()


def test_what_the_bounds_cannot_say_is_refused():
    with pytest.raises(ValueError, match=r"saturation is 0, got decay=0\.1"):
        Problem(1.0, 2.0, 1.0, 0.0, 0.1)
    with pytest.raises(ValueError, match=r"errors up to 0\.333, got 0\.3"):
        theory.updates_bound(0.3, Problem(1.0, 2.0, 1.0, 0.5, 0.25))


def test_noise_of_updates_hides_small_errors():
    """Check with symbols that the error is the smallest of a parabola, and the one at which the updates diverge."""
    a, smooth, variance, added = sympy.symbols("alpha L s n", positive=True)
    # The stationary error of a parabola, E(w−b)²·L² with w' = w − α(L(w − b) + noise) + added noise.
    stationary = smooth**2 * (a**2 * variance + added) / (1 - (1 - a * smooth) ** 2)
    numbers = {smooth: 2.0, variance: 0.7, added: 0.003}
    best = [root for root in sympy.solve(sympy.diff(stationary.subs(numbers), a), a) if 0 < root < 1]
    error = theory.update_noise_error(2.0, 0.7, 0.003)
    assert float(stationary.subs(numbers).subs(a, best[0])) == pytest.approx(error)
    # The descent less (L/2α)·n at the best rate vanishes there too.
    rate = error / (2.0 * (error + 0.7))
    assert theory.descent(error, rate, Problem(1.0, 2.0, 0.7)) == pytest.approx(2.0 / 2 / rate * 0.003)
    assert theory.update_noise_error(2.0, 0.7, 3e-9) == pytest.approx(2 * sqrt(0.7 * 3e-9), rel=1e-3)


@pytest.mark.parametrize(("num_weights", "expected"), [(1, 0.0143), (100, 0.158)])
def test_where_noise_of_updates_costs_as_much_as_that_of_gradients(num_weights, expected):
    """Compare with the root of v(ε + σ²)(ε + 2σ²) = σ²ε², for σᵤ² = 10⁻⁴, L = 1 and σ² = 1."""
    v = num_weights * 1e-4

    def extra(error):
        """Return the updates that the noise adds, in units of those for the gradient's variance."""
        rate = error / (error + 1)
        fall = theory.descent(error, rate, Problem(1.0, 1.0, 1.0))
        return (1 / (rate * (fall - v / 2 / rate)) - 1 / (rate * fall)) / (2 / error**2)

    crossing = brentq(lambda error: v * (error + 1) * (error + 2) - error**2, 1e-6, 1.0)
    assert crossing == pytest.approx(expected, rel=0.005)
    assert extra(crossing) == pytest.approx(1)
    assert extra(1.01 * crossing) < 1 < extra(0.99 * crossing)
    assert theory.update_noise_error(1.0, 1.0, v) < crossing


@pytest.mark.parametrize("bits", [3, 6])
def test_rounding_adds_its_variance_to_noise_of_half_a_step(bits):
    """Compare with 200,000 rounded numbers. Their variance has a standard error of 0.4 %."""
    step = 1 / (2 ** (bits - 1) - 1)
    exact = 0.2 + 0.5 * step * np.random.default_rng(0).standard_normal(200_000)
    added = np.round(exact / step) * step - 0.2
    assert added.var() == pytest.approx(0.25 * step**2 + theory.rounding_variance(bits), rel=0.03)
    assert added.mean() == pytest.approx(0, abs=0.01 * step)


@pytest.mark.parametrize("depth", [1, 3])
def test_constants_of_a_chain_of_rotations(depth):
    """Check that at the minimum of ½‖W…W − R‖² L is the depth, and the variance is 64ν² per layer of 8x8."""
    torch.manual_seed(0)
    skew = torch.randn(8, 8, dtype=torch.float64)
    root = torch.matrix_exp((skew - skew.T) / 9)
    target = torch.linalg.matrix_power(root, depth)
    at = root.expand(depth, 8, 8).reshape(-1)

    def chain(w):
        return torch.linalg.multi_dot([torch.eye(8, dtype=w.dtype), *w.view(depth, 8, 8)])

    hessian = torch.autograd.functional.hessian(lambda w: (chain(w) - target).square().sum() / 2, at)
    assert float(torch.linalg.eigvalsh(hessian)[-1]) == pytest.approx(depth)
    # The gradient of a sample (x, Rx + νz) is the Jacobian times νzxᵀ, whose covariance for Gaussian x and z is ν².
    jacobian = torch.autograd.functional.jacobian(chain, at).view(8, 8, -1)
    assert float(jacobian.square().sum()) == pytest.approx(64 * depth)

    def delayed(old):
        """Return the gradient of all layers if the forward has met old weights, and the backward the current ones."""
        old, now = old.view(depth, 8, 8), at.view(depth, 8, 8)
        eye = torch.eye(8, dtype=old.dtype)
        before = [torch.linalg.multi_dot([eye, eye, *old[:m].flip(0)]) for m in range(depth)]
        after = [torch.linalg.multi_dot([eye, eye, *now[m + 1 :].flip(0)]) for m in range(depth)]
        error = old[-1] @ before[-1] - target
        return torch.stack([b.T @ error @ f.T for b, f in zip(after, before, strict=True)]).flatten()

    in_old = torch.autograd.functional.jacobian(delayed, at)
    assert float(torch.linalg.matrix_norm(in_old, 2)) == pytest.approx(depth)


@pytest.mark.parametrize(("dominant", "extra"), [(2.0, 5.0), (3.0, 0.0), (0.0, 7.0)])
def test_fits_recover_what_made_the_data(dominant, extra):
    epsilon = np.geomspace(1, 0.01, 9)
    assert theory.fit_exponent(epsilon, 3 * epsilon**-1.7) == pytest.approx(1.7)
    fitted = theory.fit_complexity(epsilon, dominant * epsilon**-2 + extra / epsilon)
    assert fitted == pytest.approx((dominant, extra), abs=1e-6)
