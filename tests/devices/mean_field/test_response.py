"""These tests compare the motion of weights with pulses applied one by one, and with fine integration in float64."""

import numpy as np
import pytest
import torch
from aihwkit.simulator.configs import SingleRPUConfig
from aihwkit.simulator.configs.devices import (
    ConstantStepDevice,
    ExpStepDevice,
    LinearStepDevice,
    PiecewiseStepDevice,
    PowStepDevice,
    SoftBoundsDevice,
    SoftBoundsReferenceDevice,
)
from scipy.integrate import solve_ivp

from aimc_pl.devices.mean_field.pulses import Counts
from aimc_pl.devices.mean_field.response import Response, response_of

ALIKE = {"w_max_dtod": 0.0, "w_min_dtod": 0.0, "dw_min_dtod": 0.0, "up_down_dtod": 0.0}
DEVICES = {
    "constant": ConstantStepDevice(up_down=0.1),
    "linear": LinearStepDevice(gamma_up=0.4, gamma_down=0.7),
    "soft bounds": SoftBoundsDevice(dw_min=0.004),
    "soft bounds, alike": SoftBoundsDevice(dw_min=0.004, **ALIKE),
    "reference": SoftBoundsReferenceDevice(reference_mean=0.05, reference_std=0.03),
    "reference, alike": SoftBoundsReferenceDevice(dw_min=0.004, **ALIKE),
    "exponential": ExpStepDevice(dw_min=0.004),
    "exponential, complex noise": ExpStepDevice(dw_min=0.004, dw_min_std_add=0.004, dw_min_std_slope=0.05),
    "power": PowStepDevice(dw_min=0.004, pow_gamma=1.7),
    "piecewise": PiecewiseStepDevice(dw_min=0.004, piecewise_up=[1.5, 1.2, 0.9, 0.3], piecewise_down=[0.2, 1, 1.1, 2]),
}
CURVED = ("exponential", "exponential, complex noise", "power", "piecewise")
SIZE = (5, 6)
STEPS = {"compiled": lambda response, *args: response.step(*args), "torch": Response.step}
"""A step on a CPU, which is compiled for linear responses, and as on other devices."""


def drawn(name):
    """Return the device and the parameters of 30 cross-points, as aihwkit draws them."""
    device = DEVICES[name]
    device.construction_seed = 11
    config = SingleRPUConfig(device=device)
    wrapper = config.tile_class(*SIZE, config, False)
    values = wrapper.tile.get_hidden_parameters()
    hidden = dict(zip(wrapper.tile.get_hidden_parameter_names(), values, strict=True))
    if "alike" in name:
        hidden = {key: float(value[0, 0]) for key, value in hidden.items()}
    return device, hidden


def steps(device, hidden):
    """Return the functions of a step up and of a step down, as aihwkit documents them, in float64."""
    p = {key: torch.as_tensor(value).double().expand(SIZE).numpy() for key, value in hidden.items()}
    up, down, low, high = p["dwmin_up"], p["dwmin_down"], p["min_bound"], p["max_bound"]
    reference = p.get("reference", 0.0)
    if isinstance(device, SoftBoundsReferenceDevice):
        return (lambda w: up * (1 - (w + reference) / high)), (lambda w: down * (1 - (w + reference) / low))
    if isinstance(device, ExpStepDevice):

        def z(w):
            return 2 * device.a * w / (high - low) + device.b

        return (
            lambda w: up * np.maximum(1 - device.A_up * np.exp(device.gamma_up * z(w)), 0),
            lambda w: down * np.maximum(1 - device.A_down * np.exp(-device.gamma_down * z(w)), 0),
        )
    if isinstance(device, PowStepDevice):
        return (
            lambda w: up * (np.maximum(high - w, 0) / (high - low)) ** p["gamma_up"],
            lambda w: down * (np.maximum(w - low, 0) / (high - low)) ** p["gamma_down"],
        )
    if isinstance(device, PiecewiseStepDevice):
        nodes = np.linspace(0, 1, 4)
        return (
            lambda w: up * np.interp((w - low) / (high - low), nodes, device.piecewise_up),
            lambda w: down * np.interp((w - low) / (high - low), nodes, device.piecewise_down),
        )
    slope_up, slope_down = p.get("slope_up", 0.0), p.get("slope_down", 0.0)
    return (lambda w: up + slope_up * w), (lambda w: down + slope_down * w)


def poisson(net, total, spread=0.0):
    return Counts(net, total, (net * (1 + spread**2), total * (1 + spread**2)))


def start():
    torch.manual_seed(3)
    return torch.rand(SIZE) * 0.3 - 0.15


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("pulses", [0.5, 4.0, 60.0])
@pytest.mark.parametrize("step", STEPS)
def test_mean_motion_solves_the_differential_equation(name, pulses, step):
    device, hidden = drawn(name)
    response = response_of(device, hidden, whole_pulses=False)
    weight = response.clip(start())
    before = weight.double().numpy().copy()
    ups, downs = torch.rand(SIZE) * pulses, torch.rand(SIZE) * pulses
    up, down = steps(device, hidden)

    def motion(_, w):
        w = w.reshape(SIZE)
        return (ups.double().numpy() * up(w) - downs.double().numpy() * down(w)).ravel()

    expected = solve_ivp(motion, (0, 1), before.ravel(), rtol=1e-9, atol=1e-12).y[:, -1].reshape(SIZE)
    low, high = (torch.as_tensor(b).double().expand(SIZE).numpy() for b in response.bounds)
    counts = poisson(ups - downs, ups + downs)
    STEPS[step](response, weight, counts, response.steepness * float(counts.total.max()), torch.zeros(SIZE))
    # The code integrates curved steps in a few substeps.
    tolerance = 2e-5 if name not in CURVED else 2e-3 * np.abs(expected - before).max() + 1e-6
    np.testing.assert_allclose(weight.numpy(), np.clip(expected, low, high), atol=tolerance)


@pytest.mark.parametrize("name", [name for name in DEVICES if name not in CURVED])
@pytest.mark.parametrize("pulses", [1, 7, 40])
@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("step", STEPS)
def test_whole_pulses_are_single_steps(name, pulses, direction, step):
    """Check that pulses in one direction are applied one after the other, however coarse the steps are."""
    device, hidden = drawn(name)
    for key in ("dwmin_up", "dwmin_down", "slope_up", "slope_down"):
        if key in hidden:
            hidden[key] = hidden[key] * 20
    weight, count = start(), torch.full(SIZE, float(pulses))
    response = response_of(device, hidden, whole_pulses=True)
    up, down = steps(device, hidden)
    weight = response.clip(weight)
    expected = weight.double().numpy().copy()
    low, high = (torch.as_tensor(b).double().expand(SIZE).numpy() for b in response.bounds)
    for _ in range(pulses):
        expected = np.clip(expected + up(expected) if direction > 0 else expected - down(expected), low, high)
    counts = Counts(direction * count, count, (torch.zeros(SIZE), torch.zeros(SIZE)))
    STEPS[step](response, weight, counts, response.steepness * pulses, torch.zeros(SIZE))
    np.testing.assert_allclose(weight.numpy(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("step", STEPS)
def test_deviation_of_few_pulses(name, step):
    """Compare the variance at a fixed weight with U·up²(1 + σ²) + D·down²(1 + σ²).

    U and D are the mean numbers of pulses, which are Poisson. Some devices take σ relative to the step at weight 0, and
    some to the sum of the step, a constant, and a multiple of the weight.
    """
    device, hidden = drawn(name)
    response = response_of(device, hidden, whole_pulses=False)
    weight = response.clip(start())
    w = weight.double().numpy().copy()
    ups, downs = torch.rand(SIZE) / 50, torch.rand(SIZE) / 50
    up, down = steps(device, hidden)
    sigma = device.dw_min_std
    fixed = not getattr(device, "mult_noise", True)
    added = getattr(device, "dw_min_std_add", 0.0) + getattr(device, "dw_min_std_slope", 0.0) * np.abs(w)
    of_up, of_down = (
        (np.asarray(torch.as_tensor(hidden[key])) if fixed else step(w) + added) * sigma
        for key, step in (("dwmin_up", up), ("dwmin_down", down))
    )
    u, d = ups.double().numpy(), downs.double().numpy()
    expected = u * (up(w) ** 2 + of_up**2) + d * (down(w) ** 2 + of_down**2)
    counts = poisson(ups - downs, ups + downs, response.spread)
    noisy = weight.clone()
    STEPS[step](response, weight, counts, 0.0, torch.zeros(SIZE))
    STEPS[step](response, noisy, counts, 0.0, torch.ones(SIZE))
    np.testing.assert_allclose((noisy - weight).numpy() ** 2, expected, rtol=0.05)


@pytest.mark.parametrize("make", [ExpStepDevice, PowStepDevice, PiecewiseStepDevice, SoftBoundsDevice])
def test_stuck_cross_points_stay(make):
    device = make(construction_seed=5, corrupt_devices_prob=1.0)
    config = SingleRPUConfig(device=device)
    wrapper = config.tile_class(*SIZE, config, False)
    hidden = dict(zip(wrapper.tile.get_hidden_parameter_names(), wrapper.tile.get_hidden_parameters(), strict=True))
    response = response_of(device, hidden, whole_pulses=False)
    weight = response.clip(start())
    before = weight.clone()
    ones = torch.ones(SIZE)
    variance = response.move(weight, poisson(ones, ones * 3), 0.0)
    torch.testing.assert_close(response.clip(weight), before)
    assert torch.isfinite(variance).all()
