"""These tests compare devices by name, conversion and optimizers with aihwkit used by hand."""

import pytest
import torch
from aihwkit.nn import AnalogConv2d, AnalogLinear
from aihwkit.optim import AnalogSGD
from aihwkit.optim.analog_optimizer import AnalogOptimizerMixin
from aihwkit.simulator.configs import FloatingPointRPUConfig
from aihwkit.simulator.presets import EcRamPreset
from lightning_modules import MLP, loader, make_trainer
from torch import nn
from torch.utils.data import DataLoader

from aimc_pl.devices import (
    DEVICES,
    ConfiguredDevice,
    analog_layers,
    chopped_transfer,
    convert_to_analog,
    describe_updates,
    dynamic_transfer,
    get_device,
    ideal,
    make_analog_aware,
    mixed_precision,
    plot_response,
    reset_pending_updates,
    residual_learning,
    soft_bounds,
    symmetric_point_tracking,
    to_mean_field,
    weight_scaling,
)
from aimc_pl.errors import UsageError
from aimc_pl.strategies import AnalogPipelineStrategy


@pytest.mark.slow
@pytest.mark.parametrize("name", DEVICES)
def test_every_device_trains(name):
    """Check that products follow the digital layer and that updates move weights.

    Bounds that vary from device to device clip some of the weights, and devices of 4 states have a large write noise.
    """
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(20, 10))
    x, digital = torch.randn(5, 20), network[0].weight.detach().clone()
    expected = network(x)
    convert_to_analog(network, name)
    out = network(x)
    assert torch.corrcoef(torch.stack([out.flatten(), expected.flatten()]))[0, 1] > 0.4
    optimizer = AnalogSGD(network.parameters(), lr=0.5)
    # With dynamic_transfer, weights move only after two flips of the signs of each of the 20 columns.
    for _ in range(500 if name == "dynamic_transfer" else 20):
        network(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(network[0].get_weights()[0], digital)


def test_soft_bounds_parameters():
    device = soft_bounds(tau=4.0, num_states=800, cycle_to_cycle=0.1, write_noise=2.0, perfect_io=True).rpu_config
    assert (device.device.w_max, device.device.w_min) == (4.0, -4.0)
    assert device.device.dw_min == pytest.approx(0.01)
    assert device.device.dw_min_std == 0.1
    assert device.device.write_noise_std == 2.0
    assert device.forward.is_perfect
    assert device.backward.is_perfect


def test_soft_bounds_step_is_the_papers():
    """Compare the mean of 400 devices with w' = w + Δw(1 ∓ w/τ), after pulses up and then down, without noise."""
    config = get_device(soft_bounds(tau=0.8, num_states=160, cycle_to_cycle=0.0, perfect_io=True))
    config.update.desired_bl = 1
    config.update.update_management = config.update.update_bl_management = False
    layer = AnalogLinear(1, 400, bias=False, rpu_config=config)
    layer.set_weights(torch.full((400, 1), 0.2))
    layer.analog_module.set_learning_rate(1.0)
    weight = 0.2
    for sign in [1] * 30 + [-1] * 50:
        layer.analog_module.update(torch.ones(1, 1), -sign * torch.ones(1, 400))
        weight += sign * 0.01 * (1 - sign * weight / 0.8)
    assert layer.get_weights()[0].mean() == pytest.approx(weight, abs=2e-3)


@pytest.mark.parametrize(
    "device", ["ideal", FloatingPointRPUConfig(), ConfiguredDevice(FloatingPointRPUConfig()), EcRamPreset()]
)
def test_conversion_keeps_weights_and_names(device):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU(), nn.Flatten()), nn.Linear(16, 2))
    weights = [network[0].weight.detach().flatten(1), network[2].weight.detach()]
    assert convert_to_analog(network, device) == ["0", "2"]
    assert isinstance(network[0], AnalogConv2d)
    assert isinstance(network[2], AnalogLinear)
    assert type(network) is nn.Sequential
    for layer, weight in zip(analog_layers(network), weights, strict=True):
        torch.testing.assert_close(layer.get_weights()[0], weight.clamp(-0.6, 0.6), rtol=1e-5, atol=0.05)


def test_later_keys_win_and_none_stays_digital():
    network = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    convert_to_analog(network, {"*": "soft_bounds", 1: "ecram", "0": None, "[34]": "ideal"}, split_at=["1", "3"])
    kinds = [type(getattr(layer, "analog_module", None)).__name__ for layer in network]
    assert kinds == ["NoneType", "MeanFieldTile", "MeanFieldTile", "FloatingPointTile", "FloatingPointTile"]
    materials = [type(network[i].analog_module.rpu_config.device).__name__ for i in (1, 2)]
    assert materials == ["EcRamPresetDevice"] * 2


def test_analog_layers_stay_as_they_are():
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    convert_to_analog(network, {"0": "ideal"})
    first = network[0]
    assert convert_to_analog(network, "soft_bounds") == ["1"]
    assert network[0] is first
    assert convert_to_analog(network, "soft_bounds") == []


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_plain_optimizer_updates_tiles_as_aihwkits(make):
    networks = []
    for _ in range(2):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        convert_to_analog(network, {"0": "ideal"})
        networks.append(network)
    optimizers = [make(networks[0].parameters(), lr=0.1), AnalogSGD(networks[1].parameters(), lr=0.1)]
    before = optimizers[0]
    make_analog_aware(optimizers[0])
    assert optimizers[0] is before
    assert isinstance(optimizers[0], make)
    assert isinstance(optimizers[0], AnalogOptimizerMixin)
    x = torch.randn(6, 4)
    for network, optimizer in zip(networks, optimizers, strict=True):
        network(x).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(networks[0][0].get_weights()[0], networks[1][0].get_weights()[0])
    if make is torch.optim.SGD:
        torch.testing.assert_close(networks[0][2].weight, networks[1][2].weight)


def test_digital_optimizer_is_left_alone():
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    make_analog_aware(optimizer)
    assert type(optimizer) is torch.optim.SGD


EXACT = soft_bounds(perfect_io=True)
MAXIMIZED = {
    "pulses": (lambda: EXACT, 512),
    "several tiles": (lambda: EXACT, 3),
    "aihwkit's tile": (ideal, 512),
    "residual learning": (lambda: residual_learning(EXACT), 512),
    "mixed precision": (lambda: mixed_precision(EXACT), 512),
}


@pytest.mark.parametrize("scale", [1.0, 20.0])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("case", MAXIMIZED)
def test_an_optimizer_that_maximizes_goes_up(case, make, scale):
    """Compare a convolution and a linear layer with the same that minimize the negative, bit for bit.

    The second group of the optimizer does the opposite. The backward runs within the step.
    """
    device, most_inputs = MAXIMIZED[case]
    results = []
    x = torch.randn(6, 2, 5)
    for sign in (1, -1):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Flatten(), nn.Linear(9, 2), nn.Linear(2, 2))
        config = device().rpu_config
        config.mapping.max_input_size = most_inputs
        convert_to_analog(network, {"0": config, "2": config})
        last = network[3]
        first = [parameter for layer in network[:3] for parameter in layer.parameters()]
        groups = [{"params": first, "maximize": sign == 1}, {"params": last.parameters(), "maximize": sign == -1}]
        optimizer = make(groups, lr=0.01)
        make_analog_aware(optimizer, scale)

        def closure(network=network, optimizer=optimizer, sign=sign):
            optimizer.zero_grad()
            loss = sign * network(x).square().sum()
            loss.backward()
            return loss

        start = [layer.get_weights()[0].clone() for layer in analog_layers(network)]
        for _ in range(3):
            optimizer.step(closure)
        results.append([*(layer.get_weights()[0] for layer in analog_layers(network)), last.weight.detach()])
        assert not any(map(torch.equal, results[-1][:2], start))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_an_optimizer_of_aihwkit_that_maximizes_is_refused():
    """Check that it is refused for layers that learn by pulses only. In mixed precision it does maximize."""
    network = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    convert_to_analog(network, {"0": soft_bounds(), "1": mixed_precision()})
    make_analog_aware(AnalogSGD(network[1].parameters(), lr=0.1, maximize=True))
    with pytest.raises(UsageError, match="maximize=True of AnalogSGD does not reach layers that learn by pulses"):
        make_analog_aware(AnalogSGD(network.parameters(), lr=0.1, maximize=True))


def test_reset_drops_pending_updates():
    network = nn.Sequential(nn.Linear(4, 3))
    convert_to_analog(network, "ideal")
    weight = network[0].get_weights()[0].clone()
    network(torch.randn(2, 4)).sum().backward()
    reset_pending_updates(network)
    AnalogSGD(network.parameters(), lr=0.1).step()
    assert torch.equal(network[0].get_weights()[0], weight)


def test_response_is_drawn(tmp_path):
    figure = plot_response(get_device("soft_bounds"), "soft_bounds", num_pulses=50)
    mean = figure.axes[0].lines[-1].get_ydata()
    assert len(mean) == 200
    # The pulses go up, down, up and down.
    assert mean[49] > mean[0] < mean[149]
    assert mean[99] < mean[49]
    figure.savefig(tmp_path / "response.png")


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), None),
        (
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
            "at the learning rate 0.1: the momentum of SGD applies to",
        ),
        (
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-4),
            "the momentum and weight_decay of SGD apply to digital parameters only",
        ),
        (lambda p: torch.optim.AdamW(p, lr=1e-3), "at the learning rate 0.001: the update rule of AdamW applies to"),
        (
            lambda p: torch.optim.Adam(
                [{"params": p[:1]}, {"params": p[1:2], "lr": 0.2}, {"params": p[2:], "lr": 5.0}]
            ),
            "at the learning rate 0.001 and 0.2: the update rule of Adam applies to",
        ),
    ],
)
def test_what_analog_layers_do_not_take_from_the_optimizer_is_said(make, line):
    network = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False), nn.LayerNorm(2))
    convert_to_analog(network, {"0": "soft_bounds", "1": "soft_bounds"})
    optimizer = make([*network.parameters()])
    make_analog_aware(optimizer)
    said = describe_updates(network, optimizer)
    assert said is None if line is None else said.startswith("2 analog layers learn by pulses, ") and line in said


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (torch.optim.SGD, None),
        (torch.optim.AdamW, "1 analog layer learns by pulses, at the learning rate 0.1: the update rule of AdamW "),
    ],
)
def test_a_learning_rate_of_their_own_leaves_the_name_of_the_optimizer(make, line):
    network = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    convert_to_analog(network, {"0": "soft_bounds"})
    optimizer = make(network.parameters(), lr=1e-3)
    make_analog_aware(optimizer, lr_scale=100)
    said = describe_updates(network, optimizer)
    assert said is None if line is None else said.startswith(line)


def test_a_learning_rate_of_their_own_is_refused_when_it_comes_too_late():
    network = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    convert_to_analog(network, "soft_bounds")
    ours = torch.optim.SGD(network.parameters(), lr=1e-3)
    for _ in range(2):
        make_analog_aware(ours, lr_scale=100)
    theirs = AnalogSGD(network.parameters(), lr=1e-3)
    make_analog_aware(theirs)
    for optimizer, scale in ((ours, 1.0), (theirs, 100)):
        with pytest.raises(UsageError, match=f"lr_scale={scale:g} comes too late for AnalogSGD, which updates"):
            make_analog_aware(optimizer, lr_scale=scale)


@pytest.mark.parametrize("name", DEVICES)
def test_a_device_shows_the_call_that_makes_it(name):
    assert repr(DEVICES[name]()) == f"{name}()"


def test_a_device_shows_what_differs_from_the_defaults():
    device = residual_learning(soft_bounds(4.0, backend="bits"), gamma=0.2, transfer_lr=1.0)
    assert repr(device) == "residual_learning(device=soft_bounds(tau=4.0, backend='bits'), gamma=0.2)"
    assert repr(eval(repr(device)).rpu_config) == repr(device.rpu_config)
    assert repr(ConfiguredDevice(EcRamPreset())) == "ConfiguredDevice(EcRamPresetDevice)"
    assert repr(ConfiguredDevice(FloatingPointRPUConfig())) == "ConfiguredDevice(FloatingPointDevice)"


@pytest.mark.parametrize("device", ["soft_bounds", 3, EcRamPreset()])
@pytest.mark.parametrize(
    "around", [residual_learning, chopped_transfer, dynamic_transfer, symmetric_point_tracking, weight_scaling]
)
def test_what_is_no_device_is_refused(around, device):
    with pytest.raises(UsageError, match=r"device must be a device such as soft_bounds\(\), or Conf.*, got "):
        around(device)


@pytest.mark.parametrize("around", [ConfiguredDevice, to_mean_field])
def test_what_is_no_configuration_is_refused(around):
    with pytest.raises(UsageError, match=r"config must be .*such as SingleRPUConfig\(\), got 'ECRAM'"):
        around("ECRAM")


def test_devices_are_drawn_however_they_are_given():
    for device in ("soft_bounds", soft_bounds(), soft_bounds().rpu_config):
        assert len(plot_response(device, num_pulses=2).axes[0].lines) == 9
    with pytest.raises(UsageError, match=r"ideal\(\) is not updated by pulses"):
        plot_response(ideal())


def test_a_second_fit_on_another_device_is_refused():
    """A comparison of devices on one module would compare the first with itself."""
    module = MLP()
    data = DataLoader([(x.float(), y) for x, y in loader(module).dataset], batch_size=8)

    def fit(device):
        strategy = AnalogPipelineStrategy(1, "none", 1, device=device)
        make_trainer(strategy, precision="32-true", max_steps=1).fit(module, data)

    fit(soft_bounds(tau=0.6))
    fit(soft_bounds(tau=0.6))
    fit(None)
    with pytest.raises(UsageError, match=r"'net\.0' is on soft_bounds\(tau=0\.6\) already, and device= asks for resid"):
        fit(residual_learning(soft_bounds(tau=0.6)))
