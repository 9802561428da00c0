"""These tests check the scaling of weights to the range of their devices."""

import pytest
import torch
from torch import nn

from aimc_pl.devices import (
    analog_layers,
    constant_step,
    convert_to_analog,
    ideal,
    make_analog_aware,
    mixed_precision,
    residual_learning,
    soft_bounds,
    weight_scaling,
)
from aimc_pl.errors import UsageError


def analog(network, device):
    torch.manual_seed(0)
    convert_to_analog(network, device)
    return network


def on_the_crossbar(network):
    (layer,) = analog_layers(network)
    (tile,) = layer.analog_tiles()
    return tile.tile.get_weights()


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 5))


@pytest.mark.parametrize("backend", ["mean_field", "bits", "aihwkit"])
@pytest.mark.parametrize("algorithm", [None, residual_learning, mixed_precision])
def test_products_are_those_of_the_weights(linear, backend, algorithm):
    x = torch.randn(7, 30)
    expected, weight = linear(x), linear[0].weight.clone()
    device = soft_bounds(perfect_io=True, backend=backend)
    network = analog(linear, weight_scaling(algorithm(device) if algorithm else device, 0.5))
    torch.testing.assert_close(network(x), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(network[0].get_weights()[0], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("omega", [0.3, 1.0])
def test_the_largest_weight_is_omega(linear, omega):
    weights = on_the_crossbar(analog(linear, weight_scaling(soft_bounds(), omega)))
    torch.testing.assert_close(weights.abs().amax(1), torch.full((5,), omega))


def test_one_factor_for_all_outputs(linear):
    weight = linear[0].weight.detach().clone()
    weights = on_the_crossbar(analog(linear, weight_scaling(soft_bounds(), 0.6, columnwise=False)))
    torch.testing.assert_close(weights, weight * 0.6 / weight.abs().max())


def test_noise_shrinks_with_the_weights():
    """Compare the noise of outputs with and without scaling.

    The spread of 20,000 numbers is known to 0.5 %, and 3 % are allowed: fewer than one false alarm in 10⁸.
    """
    x = torch.ones(20_000, 40)
    spreads = []
    for device in (soft_bounds(), weight_scaling(soft_bounds(), 0.2)):
        layer = nn.Linear(40, 1, bias=False)
        nn.init.constant_(layer.weight, 0.01)
        network = analog(nn.Sequential(layer), device)
        spreads.append(float(network(x).detach().std()))
    assert spreads[0] / spreads[1] == pytest.approx(0.2 / 0.01, rel=0.03)


@pytest.mark.parametrize("columnwise", [False, True])
def test_an_update_is_that_of_aihwkit(columnwise):
    """Compare the sum of 4,000 updates by tiny steps with that on aihwkit's tile.

    A weight that moves most has a spread of 1.2 %, and 6 % are allowed: one false alarm in 10⁴ for 150 weights.
    """
    x, error = torch.rand(1, 30).expand(4000, 30), torch.linspace(-1, 1, 5).expand(4000, 5)
    changes = []
    for backend in ("aihwkit", "mean_field"):
        torch.manual_seed(0)
        device = constant_step(num_states=10**6, cycle_to_cycle=0.0, perfect_io=True, backend=backend)
        config = weight_scaling(device, 0.6, columnwise).rpu_config
        network = nn.Sequential(nn.Linear(30, 5, bias=False))
        network[0].weight.data.mul_(torch.arange(1, 6)[:, None])
        convert_to_analog(network, config)
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-5)
        make_analog_aware(optimizer)
        before = network[0].get_weights()[0].clone()
        network(x).backward(error)
        optimizer.step()
        changes.append(network[0].get_weights()[0] - before)
    largest = float(changes[0].abs().max())
    assert largest > 0.01
    torch.testing.assert_close(changes[1], changes[0], rtol=0.0, atol=0.06 * largest)


def test_by_name(linear):
    weights = on_the_crossbar(analog(linear, "weight_scaling"))
    torch.testing.assert_close(weights.abs().amax(1), torch.full((5,), 0.6))
    assert repr(weight_scaling(soft_bounds(tau=0.8), 0.5)) == "weight_scaling(device=soft_bounds(tau=0.8), omega=0.5)"


@pytest.mark.parametrize(
    ("device", "omega", "message"),
    [
        (soft_bounds(tau=0.5), 0.6, r"omega=0.6 is beyond the bound of the device, 0.5: choose a smaller omega"),
        (mixed_precision(soft_bounds(tau=0.5)), 0.6, "beyond the bound"),
        (residual_learning(soft_bounds(tau=0.5)), 0.6, "beyond the bound"),
        (ideal(), 0.0, "omega"),
        (ideal(), float("nan"), "omega"),
    ],
)
def test_refusals(device, omega, message):
    with pytest.raises(UsageError, match=message):
        weight_scaling(device, omega)
