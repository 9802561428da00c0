"""These tests compare ensembles of networks with the paper's recursion, and pulsed updates with aihwkit's."""

from itertools import pairwise
from math import inf, sqrt

import pytest
import torch
from aihwkit.nn import AnalogLinear
from torch import Generator, nn

from aimc_pl.devices import soft_bounds
from aimc_pl.studies.ensemble import Crossbars, EnsemblePipeline


def random(*shape, seed=0):
    return torch.randn(*shape, generator=Generator().manual_seed(seed))


@pytest.mark.parametrize(("num_stages", "duplex"), [(1, "half"), (2, "half"), (4, "half"), (4, "full")])
def test_every_copy_follows_the_papers_recursion_with_delayed_signals(num_stages, duplex):
    """Check w ← w − αδxᵀ − (α/τ)|δ||x|ᵀw, where x passed old weights, and δ came back through current ones."""
    sizes, count = [3, 5, 4, 4, 2], 12
    rates, ranges = torch.tensor([0.05, 0.2, 0.1]), torch.tensor([0.7, 2.0, inf])
    first = [random(3, out, size, seed=out) * 0.4 for size, out in pairwise(sizes)]
    x, y = random(count, 3, 1, 3, seed=1), random(count, 3, 1, 2, seed=2)

    layers = [Crossbars(weight.clone(), Generator(), ranges.view(-1, 1, 1)) for weight in first]
    modules = [nn.Sequential(layer, nn.Tanh()) for layer in layers]
    each = 4 // num_stages
    pipeline = EnsemblePipeline(modules, num_stages, rates.view(-1, 1, 1), duplex)
    for inputs, labels in zip(x, y, strict=True):
        pipeline.run([(inputs, lambda out, y=labels: (out - y).square().sum((1, 2)) / 2)])
    pipeline.drain()

    for copy in range(3):
        alpha, tau = float(rates[copy]), float(ranges[copy])
        weights = [[layer[copy].double()] for layer in first]  # indexed by layer and version
        for k in range(count):
            signal, signals = x[k, copy].T.double(), []
            for layer, versions in enumerate(weights):
                late = (num_stages - 1 - layer // each) * (2 if duplex == "full" else 1)
                signals.append(signal)
                signal = torch.tanh(versions[max(0, k - late)] @ signal)
            outputs = [*signals[1:], signal]
            delta = signal - y[k, copy].T.double()
            for layer in reversed(range(4)):
                delta = delta * (1 - outputs[layer] ** 2)
                w = weights[layer][k]
                before = delta
                delta = w.T @ delta
                step = before @ signals[layer].T
                weights[layer].append(w - alpha * step - alpha / tau * step.abs() * w)
        for layer, versions in zip(layers, weights, strict=True):
            torch.testing.assert_close(layer.weight[copy].double(), versions[-1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_stages", [1, 4])
def test_a_batch_sums_samples(num_stages):
    """Check G = Σδxᵀ and S = Σ|δ||x|ᵀ over all samples since the last update."""
    weight, x, error = random(2, 3, 4), random(2, 6, 4, seed=1), random(2, 6, 3, seed=2)
    crossbars = Crossbars(weight.clone(), Generator(), tau=1.5)
    crossbars.note(x[:, :2], error[:, :2])
    crossbars.note(x[:, 2:], error[:, 2:])
    crossbars.update(0.1)
    net = torch.einsum("rbo,rbi->roi", error, x)
    total = torch.einsum("rbo,rbi->roi", error.abs(), x.abs())
    torch.testing.assert_close(crossbars.weight.data, weight - 0.1 * net - 0.1 / 1.5 * total * weight)
    assert not crossbars.pending


def one_update(copies, x, error, rate, weight, **device):
    """Return the crossbars of copies that started from the same weights, after one update."""
    crossbars = Crossbars(weight.expand(copies, -1, -1).clone(), Generator().manual_seed(3), **device)
    crossbars.note(x.expand(copies, -1, -1), error.expand(copies, -1, -1))
    crossbars.update(rate)
    return crossbars


@pytest.mark.slow
@pytest.mark.parametrize(("tau", "step", "spread"), [(0.8, 0.002, 0.0), (0.8, 0.02, 0.3), (2.0, 0.01, 1.0)])
def test_pulsed_updates_have_the_moments_of_the_device(tau, step, spread):
    """Check means and deviations of 20,000 copies at 12 cross-points. The mean is that of Poisson pulses.

    Its growth follows E(1+k)ⁿ = exp(μk). The bounds are 5 standard errors. A random seed would raise a false alarm with
    a probability below 2e-5.
    """
    copies = 20_000
    weight, x, error = random(3, 4) * 0.2, random(2, 4, seed=1), random(2, 3, seed=2)
    rate = 0.05
    after = one_update(copies, x, error, rate, weight, tau=tau, step=step, cycle_to_cycle=spread).weight.data.double()
    net, total = -rate * error.T @ x, rate * error.abs().T @ x.abs()
    for i in range(3):
        for j in range(4):
            up, down = (float(total[i, j] + s * net[i, j]) / (2 * step) for s in (1, -1))
            w, moment = simulated(float(weight[i, j]), tau, step, spread, up, down)
            values = after[:, i, j]
            assert abs(float(values.mean()) - w) < 5 * moment / copies**0.5
            assert abs(float(values.std()) / moment - 1) < 0.03


def simulated(w, tau, step, spread, up, down):
    """Return mean and deviation of the weight by integrating moments, with pulses evenly mixed over unit time."""
    mean, second, parts = w, w * w, 20_000
    for _ in range(parts):
        drift = drift_of_mean = squared = 0.0
        for rate, sign in ((up, 1.0), (down, -1.0)):
            # A pulse changes the weight by w ← w + s·Δ(1 − s·w/τ)(1 + σξ).
            a, b = sign * step, -step / tau
            drift_of_mean += rate * (a + b * mean)
            drift += rate * 2 * (a * mean + b * second)
            squared += rate * (1 + spread**2) * (a * a + 2 * a * b * mean + b * b * second)
        mean += drift_of_mean / parts
        second += (drift + squared) / parts
    return mean, (second - mean * mean) ** 0.5


def test_pulsed_updates_move_on_average_as_aihwkits():
    """Compare the means with those of 150 updates of 200 rows on aihwkit's tile, within 5 standard errors.

    A random seed would raise a false alarm with a probability below 1e-5.
    """
    tau, states, rate = 0.8, 800, 0.05
    weight, x, error = random(1, 4) * 0.2, random(3, 4, seed=1), random(3, 1, seed=2)
    layer = AnalogLinear(4, 200, False, soft_bounds(tau, states, backend="aihwkit").rpu_config)
    tile = layer.analog_module
    tile.set_learning_rate(rate)
    means = []
    for _ in range(150):
        tile.set_weights(weight.expand(200, -1))
        tile.update(x, error.expand(-1, 200).contiguous())
        means.append(tile.get_weights()[0].mean(0))
    theirs = torch.stack(means)
    ours = one_update(20_000, x, error, rate, weight, tau=tau, step=2 * tau / states, cycle_to_cycle=0.3)
    ours = ours.weight.data[:, 0]
    noise = (theirs.var(0) / len(theirs) + ours.var(0) / len(ours)).sqrt()
    assert ((theirs.mean(0) - ours.mean(0)).abs() < 5 * noise).all()
    # The motion must be large compared with that noise.
    assert ((ours.mean(0) - weight[0]).abs() > 10 * noise).all()


@pytest.mark.parametrize("states", [100, 1000])
def test_noise_alone_spreads_weights_by_the_range_over_the_root_of_the_states(states):
    """Check the spread τ·√((1 + σ²)/N), to first order in 1/N, over 20,000 copies within 3 %.

    That is 5 standard errors. A random seed would raise a false alarm with a probability below 1e-6.
    """
    tau, spread, generator = 2.0, 0.3, Generator().manual_seed(1)
    crossbars = Crossbars(
        torch.zeros(20_000, 1, 1), Generator().manual_seed(0), tau, 2 * tau / states, cycle_to_cycle=spread
    )
    for _ in range(60):
        crossbars.note(torch.ones(20_000, 1, 1), torch.randn(20_000, 1, 1, generator=generator).sign())
        crossbars.update(0.05 * tau)
    # The random signs, in steps of a twentieth of the range, add to the spread.
    expected = tau * sqrt((1 + spread**2) / states + 0.05 / 2)
    assert float(crossbars.weight.data.std()) == pytest.approx(expected, rel=0.03)


def test_write_noise_is_added_anew_by_every_update():
    """Check that the write noise of 20,000 copies does not add up over updates, within 4 %.

    That is 5 standard errors. A random seed would raise a false alarm with a probability below 1e-6.
    """
    weight, x, error = torch.zeros(1, 1), torch.ones(1, 1), torch.zeros(1, 1)
    crossbars = one_update(20_000, x, error, 0.1, weight, tau=1.0, step=0.01, write_noise=3.0)
    for _ in range(5):
        assert float(crossbars.weight.data.std()) == pytest.approx(0.03, rel=0.04)
        crossbars.note(x, error.expand(20_000, 1, 1))
        crossbars.update(0.1)


def test_converters_round_and_add_noise():
    """Check that inputs are rounded to steps of 2/(2ᵇ − 2) of the largest, and that outputs get noise of 0.06."""
    x = torch.tensor([[[2.0, 0.9, -0.3]]])
    crossbars = Crossbars(torch.eye(3).expand(20_000, -1, -1).clone(), Generator().manual_seed(0), io_bits=4.0)
    y = crossbars(x).detach()[:, 0] / 2
    # Of the 7 steps from 0 to 1, 0.45 is nearest to step 3 and 0.15 to step 1.
    expected = torch.tensor([1, 3 / 7, -1 / 7])
    out_step = 24 / (2**6 - 2)
    assert torch.allclose(y / out_step, (y / out_step).round(), atol=1e-4)
    # Outputs are rounded in steps of 6.5 deviations, so the mean output is the probability of the next step.
    lower = (expected / out_step).floor() * out_step
    upper_share = 1 - torch.distributions.Normal(expected, 0.06).cdf(lower + out_step / 2)
    share = ((y - lower) / out_step).mean(0)
    assert (share - upper_share).abs().max() < 5 * 0.5 / 20_000**0.5


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ({"tau": 0.0}, "tau must be positive"),
        ({"step": 1.0}, "between 0 and tau"),
        ({"step": 0.0}, "between 0 and tau"),
    ],
)
def test_impossible_devices_are_refused(device, message):
    with pytest.raises(ValueError, match=message):
        Crossbars(torch.zeros(1, 1, 1), Generator(), **device)


def test_exact_backward_uses_the_current_weights():
    x, weight = random(2, 5, 3, seed=1).requires_grad_(), random(2, 4, 3)
    crossbars = Crossbars(weight.clone(), Generator())
    y = crossbars(x)
    crossbars.weight.data.mul_(2)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, torch.ones(2, 5, 4) @ (2 * weight))


def test_modules_that_would_be_left_over_are_refused():
    with pytest.raises(ValueError, match="3 modules cannot be divided evenly into 2 stages"):
        EnsemblePipeline([torch.nn.Identity()] * 3, 2, 0.1)
