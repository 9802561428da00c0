"""These tests compare pairs of one-sided devices with aihwkit's own tiles, pulse by pulse and in training."""

from io import BytesIO

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
from aimc_pl.devices.saturation import saturated_fraction
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
    "soft bounds, write noise": SoftBoundsDevice(**RANGE, write_noise_std=10.0),
    "linear, fixed noise": LinearStepDevice(
        **TWO_SIDED | {"dw_min_std": 1.0}, mult_noise=False, gamma_up_dtod=0.0, gamma_down_dtod=0.0
    ),
    "reference": SoftBoundsReferenceDevice(**TWO_SIDED, reference_mean=0.1, reference_std=0.0, slope_up_dtod=0.0),
}


def changes(config, trials, rate=0.4):
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


def both_backends(names, drawn=("phase change",)):
    """Return the cases of a test: all names with mean counts of pulses, and some with pulse trains that are drawn."""
    cases = [pytest.param(name, False, id=name) for name in names]
    return cases + [pytest.param(name, True, id=f"{name}, bits") for name in drawn]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sample_pulses"), both_backends(DEVICES, ["phase change", "reference"]))
def test_single_updates_are_aihwkits_in_mean_and_spread(name, sample_pulses):
    """Compare the changes of P and M from every start: within 2 % in mean and 5 % in standard deviation.

    The comparisons allow 5 standard errors more. One in 1,500,000 random seeds would exceed this in a comparison, of
    which a case has 58.
    """
    config = cell(DEVICES[name])
    torch.manual_seed(0)
    theirs, ours = (changes(one, 150) for one in (config, to_mean_field(config, sample_pulses)))
    agree(theirs.mean(3), ours.mean(3), 0.02, "mean")
    agree(theirs.mean((2, 3)), ours.mean((2, 3)), 0.02, "mean over all starts")
    # The variance of a cross-point, around its own mean: 10 % are 5 % of the standard deviation.
    variances = ((one - one.mean(0)).square().mean(3) for one in (theirs, ours))
    agree(*variances, 0.10, "variance")


REFRESHED = {
    "phase change": cell(PCMPresetDevice(), refresh_every=1, refresh_update=UpdateParameters(desired_bl=31)),
    "never": cell(refresh_every=0),
    "counted in vectors": cell(refresh_every=4, units_in_mbatch=False, refresh_lower_thres=0.1),
    "several within a batch": cell(refresh_every=2, units_in_mbatch=False, refresh_upper_thres=0.5),
    "read by converters": cell(
        perfect=False,
        refresh_every=2,
        refresh_forward=IOParameters(out_noise=0.1, inp_noise=0.05),
        refresh_upper_thres=0.4,
    ),
    "with resets": cell(
        LinearStepDevice(**RANGE, gamma_up_dtod=0.0, reset=0.2, reset_dtod=0.05, reset_std=0.05),
        refresh_every=1,
        refresh_upper_thres=0.3,
        refresh_lower_thres=0.2,
    ),
}


def trajectory(config, trials=16, size=(12, 20)):
    """Return P and M ``(trials, points, 2, out, in)`` on new tiles, while pulses go up and down in turns."""
    granularity = 0.03235 if isinstance(config.device.unit_cell_devices[0], PCMPresetDevice) else 0.02
    x, error = torch.ones(4, size[1]), torch.full((4, size[0]), -0.9999 * granularity)
    found = []
    for _ in range(trials):
        tile = make(config, *size, 1.0)
        tile.set_weights(torch.full(size, 0.3))
        found.append([])
        for n in range(6):
            for _ in range(2):
                # A train of one slot in which nearly all lines fire: a pulse for each of the four vectors.
                tile.update(x, error if n % 2 else -error)
            found[-1].append(pair(tile).clone())
    return torch.stack([torch.stack(points) for points in found]).double()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sample_pulses"), both_backends(REFRESHED))
def test_many_pulses_and_refreshes_are_aihwkits(name, sample_pulses):
    """Compare means and spreads of P and M after 8, 16, … 48 pulses, on 16 new tiles: within 2 % and 5 %.

    The slack is 5 standard errors. With 16 tiles each, one in 43,000 random seeds would exceed this in a comparison, of
    which a case has 30.
    """
    config = REFRESHED[name]
    torch.manual_seed(0)
    theirs, ours = (trajectory(one) for one in (config, to_mean_field(config, sample_pulses)))
    agree(theirs.mean((3, 4)), ours.mean((3, 4)), 0.02, "mean")
    agree(*(one.var((3, 4)) for one in (theirs, ours)), 0.10, "variance within a tile")
    differences = (one[:, :, 0] - one[:, :, 1] for one in (theirs, ours))
    agree(*(one.mean((2, 3)) for one in differences), 0.02, "mean difference")


def test_with_copy_inverted_both_devices_are_equal_and_the_second_moves_down():
    """Compare with the recomputation: w = P − M, where −M is a weight of the first device that is moved down."""
    device = LinearStepDevice(
        w_max=2.0, w_min=-1.0, w_max_dtod=0.0, w_min_dtod=0.0, dw_min=0.02, dw_min_std=0.0, up_down=0.3, gamma_down=0.4
    )
    config = to_mean_field(cell(device, copy_inverted=True), sample_pulses=True)
    torch.manual_seed(1)
    tile = make(config, 3, 4, 1.0)
    tile.set_weights(torch.tensor([0.3, -0.4, 0.0])[:, None].repeat(1, 4))
    first, second = tile.tile.get_hidden_parameters().chunk(2)
    assert torch.equal(first, second)
    hidden = dict(zip(tile.tile.crossbar.names, first, strict=True))
    plus = torch.tensor([0.3, 0.0, 0.0])[:, None].repeat(1, 4)
    minus = torch.tensor([0.0, 0.4, 0.0])[:, None].repeat(1, 4)
    granularity = tile.tile.crossbar.granularity
    for sign in (-1, 1, 1):
        tile.update(torch.ones(1, 4), torch.full((1, 3), sign * granularity))
        if sign < 0:
            plus += hidden["dwmin_up"] + hidden["slope_up"] * plus
        else:
            minus += hidden["dwmin_down"] - hidden["slope_down"] * minus
    torch.testing.assert_close(tile.get_weights()[0], plus - minus)


def test_new_weights_are_positive_on_one_device_and_negative_on_the_other():
    tile = make(pcm().rpu_config, 20, 30, 0.1)
    weight = torch.randn(20, 30)
    tile.update(torch.rand(2, 30), torch.randn(2, 20))
    tile.set_weights(weight)
    bounds = [crossbar.bounds[1] for crossbar in tile.tile.crossbars]
    plus, minus = weight.clamp(min=0).minimum(bounds[0]), (-weight).clamp(min=0).minimum(bounds[1])
    assert not torch.equal(*bounds)
    assert torch.equal(pair(tile), torch.stack([plus, minus]))
    assert torch.equal(tile.get_weights()[0], plus - minus)


def test_a_device_at_the_bound_where_it_starts_is_not_saturated():
    layer = AnalogLinear(6, 4, bias=False, rpu_config=pcm().rpu_config)
    layer.set_weights(torch.zeros(4, 6))
    assert saturated_fraction(layer) == 0
    (tile,) = layer.analog_tiles()
    tile.set_weights(torch.full((4, 6), -9.0))
    assert saturated_fraction(layer) == 0.5


def losses(config, seeds=14, steps=60):
    """Return the mean losses of a linear regression in the thirds of training, on new tiles ``(seeds, 3)``."""
    found = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        layer, target = AnalogLinear(6, 4, bias=False, rpu_config=config), torch.randn(4, 6) * 0.3
        optimizer = AnalogSGD(layer.parameters(), lr=0.02)
        found.append([])
        for batch in torch.randn(steps, 10, 6):
            loss = (layer(batch) - batch @ target.T).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found[-1].append(loss.item())
    return torch.tensor(found).view(seeds, 3, -1).mean(2)


LEARNING = {"phase change": PCMPresetDevice(), "soft bounds": SoftBoundsDevice(**RANGE | {"dw_min": 0.005})}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sample_pulses"), both_backends(LEARNING))
def test_learning_is_aihwkits(name, sample_pulses):
    """Compare the loss, which falls to less than a half, over 14 seeds: within 5 standard errors.

    One in 30,000 random seeds would exceed this in one of the three comparisons.
    """
    config = PCMPreset()
    config.device.unit_cell_devices = [LEARNING[name]]
    theirs, ours = (losses(one) for one in (config, to_mean_field(config, sample_pulses)))
    agree(theirs, ours, 0.0, "loss")


def test_a_convolution_counts_its_vectors_and_its_products_see_the_difference():
    config = to_mean_field(cell(SoftBoundsDevice(**RANGE), refresh_every=1))
    layer = AnalogConv2d(2, 3, 3, bias=False, rpu_config=config)
    images = torch.randn(4, 2, 6, 6)
    optimizer = AnalogSGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        weight = layer.get_weights()[0].view(3, 2, 3, 3)
        torch.testing.assert_close(layer(images), nn.functional.conv2d(images, weight))
        layer(images).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not torch.equal(layer.get_weights()[0].view(3, 2, 3, 3), weight)
    (tile,) = layer.analog_tiles()
    plus, minus = pair(tile)
    assert torch.equal(tile.get_weights()[0], plus - minus)
    assert tile.tile.dump_extra()["num_vectors"] == 3 * 4 * 16


def test_an_array_of_tiles_learns():
    config = to_mean_field(cell(SoftBoundsDevice(**RANGE)))
    config.mapping = MappingParameter(max_input_size=5, max_output_size=3)
    layer = AnalogLinear(12, 7, rpu_config=config)
    x = torch.randn(6, 12)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, *layer.get_weights()))
    optimizer = AnalogSGD(layer.parameters(), lr=0.1)
    first = layer(x).square().mean()
    for _ in range(20):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
    assert layer(x).square().mean() < first / 2


@pytest.mark.parametrize("backend", ["mean_field", "bits"])
def test_a_resumed_run_equals_the_uninterrupted_one(backend):
    config = pcm(backend).rpu_config
    config.device.refresh_every, config.device.units_in_mbatch = 35, False
    config.device.refresh_upper_thres = 0.1
    config.device.refresh_lower_thres = 0.05

    def new(seed):
        torch.manual_seed(seed)
        return AnalogLinear(6, 4, rpu_config=config)

    def train(layer, batches):
        optimizer = AnalogSGD(layer.parameters(), lr=0.1)
        for batch in batches:
            optimizer.zero_grad()
            layer(batch).square().sum().backward()
            optimizer.step()

    batches = torch.randn(10, 10, 6)
    whole, other = new(0), new(1)
    train(whole, batches[:5])
    saved = BytesIO()
    torch.save(whole.state_dict(), saved)
    train(whole, batches[5:])
    saved.seek(0)
    other.load_state_dict(torch.load(saved, weights_only=False))
    train(other, batches[5:])
    assert all(torch.equal(a, b) for a, b in zip(whole.get_weights(), other.get_weights(), strict=True))
    assert torch.equal(*(pair(next(layer.analog_tiles())) for layer in (whole, other)))
    assert torch.equal(*(next(layer.analog_tiles()).tile.get_hidden_parameters() for layer in (whole, other)))


def test_the_construction_seed_fixes_both_devices_which_differ():
    config = pcm().rpu_config
    config.device.construction_seed = 5
    one, other = (make(config, 3, 4, 0.1).tile for _ in range(2))
    assert torch.equal(one.get_hidden_parameters(), other.get_hidden_parameters())
    first, second = one.get_hidden_parameters().chunk(2)
    assert not torch.equal(first, second)
    theirs = make(PCMPreset(), 3, 4, 0.1).get_hidden_parameters()
    assert one.get_hidden_parameter_names() == [name for name in theirs if not name.startswith("hidden_weights")]


@pytest.mark.parametrize(
    ("devices", "options", "message"),
    [
        ([ConstantStepDevice(), SoftBoundsDevice()], {}, "one device, or two equal ones"),
        ([ConstantStepDevice(), ConstantStepDevice(dw_min=0.1)], {}, "one device, or two equal ones"),
        ([], {}, "one device, or two equal ones"),
        ([ConstantStepDevice()], {"refresh_every": -1}, "refresh_every must be .* at least 0"),
        ([ConstantStepDevice()], {"refresh_upper_thres": 1.5}, "refresh_upper_thres must be"),
        ([ConstantStepDevice()], {"refresh_lower_thres": -0.5}, "refresh_lower_thres must be"),
        ([SoftBoundsDevice(write_noise_std=1.0)], {"refresh_every": 1}, "write_noise_std=1.0"),
        ([ConstantStepDevice(w_max=0.0)], {"refresh_every": 1}, "w_max .* must be"),
        ([ConstantStepDevice(diffusion=0.1)], {}, "diffusion=0.1"),
    ],
)
def test_what_cannot_be_is_refused(devices, options, message):
    with pytest.raises(UsageError, match=message) as caught:
        to_mean_field(UnitCellRPUConfig(device=OneSidedUnitCell(unit_cell_devices=devices, **options)))
    assert len(str(caught.value)) <= 200
