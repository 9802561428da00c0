"""These tests check which classes checkpoints may name, and whether a state dict has the same devices."""

from inspect import signature
from itertools import product
from typing import get_args

import pytest
import torch
from aihwkit.simulator.configs import SoftBoundsDevice, UnitCellRPUConfig
from aihwkit.simulator.configs.compounds import OneSidedUnitCell
from torch import nn
from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals, get_unsafe_globals_in_checkpoint

from aimc_pl.devices import (
    DEVICES,
    Backend,
    ConfiguredDevice,
    analog_layers,
    convert_to_analog,
    make_analog_aware,
    mixed_precision,
    residual_learning,
    soft_bounds,
    tiki_taka,
)
from aimc_pl.devices.algorithms import Material
from aimc_pl.devices.checkpoint import CLASSES, AnalogCheckpoint, check_devices, leave_out_contexts
from aimc_pl.errors import UsageError

CHOICES = {"backend": get_args(Backend), "material": get_args(Material), "digital_buffer": (False, True)}
VARIANTS = {
    f"{name} {' '.join(map(str, values))}": (function, dict(zip(chosen, values, strict=True)))
    for name, function in DEVICES.items()
    for chosen in [[choice for choice in CHOICES if choice in signature(function).parameters]]
    for values in product(*(CHOICES[choice] for choice in chosen))
}
OVER_AIHWKIT = (
    residual_learning(soft_bounds(backend="aihwkit")),
    mixed_precision(soft_bounds(backend="aihwkit")),
    ConfiguredDevice(UnitCellRPUConfig(device=OneSidedUnitCell(unit_cell_devices=[SoftBoundsDevice()]))),
)
"""Algorithms and a pair of one-sided devices on aihwkit's own tiles."""


def network(device, seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))
    convert_to_analog(net, device)
    return net


def train(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    make_analog_aware(optimizer)
    net(torch.rand(5, 1, 4, 4)).square().sum().backward()
    optimizer.step()


@pytest.fixture
def unregistered():
    """Clear the list of classes that torch may load, so that only torch's own remain."""
    registered = get_safe_globals()
    clear_safe_globals()
    yield
    add_safe_globals(registered)


@pytest.mark.slow
@pytest.mark.usefixtures("unregistered")
def test_the_list_is_what_the_catalogue_needs(tmp_path):
    needed = set()
    for device in (*(function(**options) for function, options in VARIANTS.values()), *OVER_AIHWKIT):
        torch.save(network(device).state_dict(), tmp_path / "net.ckpt")
        needed.update(get_unsafe_globals_in_checkpoint(tmp_path / "net.ckpt"))
    assert {f"{cls.__module__}.{cls.__qualname__}" for cls in CLASSES if cls is not AnalogCheckpoint} == needed


def test_the_list_has_classes_only():
    assert all(isinstance(cls, type) for cls in CLASSES)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_trained_network_comes_back(variant, tmp_path):
    function, options = VARIANTS[variant]
    net, other = network(function(**options)), network(function(**options), seed=1)
    train(net)
    state = leave_out_contexts(net.state_dict())
    left_out = [key for key in net.state_dict() if key not in state and not key.endswith(".shared_weights")]
    assert left_out == ["0.analog_module.analog_ctx", "2.analog_module.analog_ctx"]
    assert not [key for key in state if key.endswith((".analog_ctx", ".shared_weights"))]
    torch.save(state, tmp_path / "net.ckpt")
    loaded = torch.load(tmp_path / "net.ckpt")
    check_devices(other, loaded)
    other.load_state_dict(loaded)
    for ours, theirs in zip(analog_layers(other), analog_layers(net), strict=True):
        assert all(map(torch.equal, ours.get_weights(), theirs.get_weights()))


@pytest.mark.parametrize(
    ("saved", "configured", "message"),
    [
        (soft_bounds(tau=9.0), soft_bounds(), "than in the checkpoint: device.w_max is 9.0 there, 1.0 here"),
        (DEVICES["ecram"](), soft_bounds(), "EcRamPresetDevice in a MeanFieldRPUConfig there, SoftBoundsDevice in a"),
        (soft_bounds(backend="aihwkit"), soft_bounds(), "in a SingleRPUConfig there, SoftBoundsDevice in a MeanField"),
        (soft_bounds(backend="bits"), soft_bounds(), "sample_pulses is True there, False here"),
        (
            tiki_taka("EcRam"),
            tiki_taka("ReRamSB"),
            r"unit_cell_devices\[0\] is 'EcRamPresetDevice' there, 'ReRamSBPresetDevice' here",
        ),
        (soft_bounds(perfect_io=True), soft_bounds(), "is_perfect is True there, False here"),
        (None, soft_bounds(), "layer '0' is digital in the checkpoint, and analog here .*: leave out device="),
        (soft_bounds(), None, r"analog in the checkpoint \(SoftBoundsDevice in a .*\), and digital here: set device="),
    ],
)
def test_other_devices_are_refused(saved, configured, message):
    nets = [nn.Sequential(nn.Linear(8, 3)), nn.Sequential(nn.Linear(8, 3))]
    for net, device in zip(nets, (saved, configured), strict=True):
        if device is not None:
            convert_to_analog(net, device)
    with pytest.raises(UsageError, match=message) as error:
        check_devices(nets[1], nets[0].state_dict())
    assert "\n" not in str(error.value)
