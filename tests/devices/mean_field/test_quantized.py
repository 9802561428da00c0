"""These tests compare the idealised update, noise and rounding, with its formula in float64."""

from copy import deepcopy
from itertools import pairwise

import pytest
import torch
from torch import nn

from aimc_pl.devices import convert_to_analog, make_analog_aware, noisy_quantized
from aimc_pl.errors import UsageError


def stepped(device, layer, x, learning_rate, updates=1):
    """Return the weights before and after updates whose loss is the sum of all outputs."""
    torch.manual_seed(0)
    net = nn.Sequential(layer)
    convert_to_analog(net, device)
    optimizer = torch.optim.SGD(net.parameters(), lr=learning_rate)
    make_analog_aware(optimizer)
    weights = [net[0].get_weights()[0]]
    for _ in range(updates):
        net(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        weights.append(net[0].get_weights()[0])
    return weights


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("is_convolution", [False, True])
def test_an_update_is_the_gradient_rounded(bits, is_convolution):
    torch.manual_seed(1)
    layer = nn.Conv2d(3, 4, 2, bias=False) if is_convolution else nn.Linear(12, 4, bias=False)
    x = torch.randn(5, 3, 2, 2) if is_convolution else torch.randn(5, 12)
    initial = layer.weight.detach().double().flatten(1)
    before, after = stepped(noisy_quantized(0.0, bits), layer, x, 0.05)
    step = 1 / (2 ** (bits - 1) - 1)
    torch.testing.assert_close(before.double(), (initial / step).round() * step)
    gradient = x.double().flatten(1).sum(0).expand(4, 12)
    expected = ((before - 0.05 * gradient).clamp(-1, 1) / step).round() * step
    torch.testing.assert_close(after.double(), expected)
    assert len(after.unique()) <= 2**bits - 1


def test_noise_has_its_deviation_and_comes_with_every_update():
    """Check 40,000 weights within 5 standard errors. One in 2,000,000 random seeds would exceed this bound."""
    weights = stepped(noisy_quantized(0.01, 20), nn.Linear(200, 200, bias=False), torch.zeros(1, 200), 0.1, updates=2)
    for before, after in pairwise(weights):
        assert float((after - before).std()) == pytest.approx(0.01, rel=5 / 80_000**0.5)
        assert float((after - before).mean()) == pytest.approx(0, abs=5 * 0.01 / 200)


def test_the_same_seed_gives_the_same_run_and_a_learning_rate_of_zero_nothing():
    layer = nn.Linear(6, 4)
    assert torch.equal(*(stepped(noisy_quantized(), deepcopy(layer), torch.ones(2, 6), 0.1)[1] for _ in range(2)))
    still = stepped(noisy_quantized(), nn.Linear(6, 4), torch.ones(2, 6), 0.0)
    assert torch.equal(*still)


def test_what_cannot_be_is_refused():
    for options, message in (({"bits": 1}, "bits must"), ({"std": -1.0}, "std must"), ({"w_max": 0.0}, "w_max must")):
        with pytest.raises(UsageError, match=message):
            noisy_quantized(**options)
