"""These tests compare pairs of one-sided devices with aihwkit's own tiles, pulse by pulse and in training."""

from copy import deepcopy

import pytest
import torch
from aihwkit.nn import AnalogConv2d, AnalogLinear
from aihwkit.optim import AnalogSGD
from aihwkit.simulator.configs import (
    ConstantStepDevice,
    IOParameters,
    MappingParameter,
    SoftBoundsDevice,
    UnitCellRPUConfig,
    UpdateParameters,
)
from aihwkit.simulator.configs.compounds import OneSidedUnitCell
from aihwkit.simulator.configs.devices import (
    ExpStepDevice,
    LinearStepDevice,
    PiecewiseStepDevice,
    PowStepDevice,
    SoftBoundsReferenceDevice,
)
from aihwkit.simulator.presets import PCMPreset, PCMPresetDevice
from torch import nn

from aimc_pl.devices import MeanFieldRPUConfig, pcm, to_mean_field
from aimc_pl.errors import UsageError

ALIKE = {"w_max_dtod": 0.0, "w_min_dtod": 0.0, "dw_min_dtod": 0.0, "up_down_dtod": 0.0}
STARTS = (-1.9, -1.0, -0.2, 0.0, 0.2, 1.0, 1.9)
"""Weights of devices whose largest weight is 2."""


def cell(device=None, perfect=True, **options):
    """Return the configuration of a pair, whose reads and products are exact by default."""
    device = device or PCMPresetDevice(**ALIKE, reset_dtod=0.0)
    config = UnitCellRPUConfig(device=OneSidedUnitCell(unit_cell_devices=[device], **options))
    for io in (config.forward, config.backward, config.device.refresh_forward):
        io.is_perfect = perfect
    return config


def make(config, outputs, inputs, rate):
    tile = config.tile_class(outputs, inputs, config, False)
    tile.set_learning_rate(rate)
    return tile


def pair(tile):
    """Return the weights P and M of the two devices. aihwkit's first device is M."""
    if isinstance(tile.rpu_config, MeanFieldRPUConfig):
        return torch.stack([crossbar.weight for crossbar in tile.tile.crossbars])
    named = tile.get_hidden_parameters()
    return torch.stack([named["hidden_weights_1"], named["hidden_weights_0"]])


RANGE = {"w_max": 2.0, "w_min": 0.0, "dw_min": 0.02, "dw_min_std": 0.3} | ALIKE
TWO_SIDED = RANGE | {"w_min": -2.0}
DEVICES = {
    "phase change": PCMPresetDevice(**ALIKE),
    "exponential": ExpStepDevice(**TWO_SIDED),
    "power": PowStepDevice(**RANGE, pow_gamma_dtod=0.0, pow_up_down_dtod=0.0),
    "piecewise": PiecewiseStepDevice(**RANGE, piecewise_up=[1.5, 1.2, 0.9, 0.3], piecewise_down=[0.2, 1, 1.1, 2]),
    "constant": ConstantStepDevice(**RANGE),
    "soft bounds": SoftBoundsDevice(**RANGE),
    "linear, fixed noise": LinearStepDevice(**TWO_SIDED, mult_noise=False, gamma_up_dtod=0.0, gamma_down_dtod=0.0),
    "reference": SoftBoundsReferenceDevice(**TWO_SIDED, reference_mean=0.1, reference_std=0.0, slope_up_dtod=0.0),
}


def changes(config, trials, rate=0.1):
    """Return the changes of P and M by single updates ``(trials, 2, out, in)`` from every start, up and down."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.tensor([start for start in STARTS for _ in range(2)])[:, None].repeat(1, 40)
    error = (torch.rand(1, len(weight), generator=generator) + 0.2) * torch.tensor([1.0, -1.0]).repeat(len(STARTS))
    x = torch.rand(1, 40, generator=generator)
    tile, found = make(config, *weight.shape, rate), []
    for _ in range(trials):
        tile.set_weights(weight)
        before = pair(tile).clone()
        tile.update(x, error)
        found.append(pair(tile) - before)
    return torch.stack(found).double()


def agree(theirs, ours, tolerance, what):
    """Compare means over the trials along the first dimension, with 5 standard errors of slack."""
    slack = 5 * (theirs.var(0) / len(theirs) + ours.var(0) / len(ours)).sqrt() + 1e-6
    a, b = theirs.mean(0), ours.mean(0)
    excess = (b - a).abs() - tolerance * a.abs() - slack
    assert (excess <= 0).all(), f"{what}: {a.flatten()} {b.flatten()}"


@pytest.mark.slow
@pytest.mark.parametrize("sample_pulses", [False, True], ids=["mean field", "bits"])
@pytest.mark.parametrize("name", DEVICES)
def test_single_updates_are_aihwkits_in_mean_and_spread(name, sample_pulses):
    """Compare the changes of P and M from every start: within 2 % in mean and 5 % in standard deviation.

    The comparisons allow 5 standard errors more. One in 1,500,000 random seeds would exceed this in a comparison, of
    which a case has 56.
    """
    config = cell(DEVICES[name])
    torch.manual_seed(0)
    trials = 300
    theirs, ours = (changes(one, trials) for one in (config, to_mean_field(config, sample_pulses)))
    agree(theirs.mean(3), ours.mean(3), 0.02, "mean")
    # The variance of a cross-point, around its own mean: 10 % are 5 % of the standard deviation.
    variances = ((one - one.mean(0)).square().mean(3) for one in (theirs, ours))
    agree(*variances, 0.10, "variance")
