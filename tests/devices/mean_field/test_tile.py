"""These tests run the mean-field tile in aihwkit's layers and compare its updates with those of aihwkit's tiles."""

import pickle
from copy import deepcopy
from io import BytesIO

import pytest
import torch
from aihwkit.nn import AnalogConv1d, AnalogConv2d, AnalogConv3d, AnalogLinear
from aihwkit.nn.conversion import convert_to_analog as aihwkits_conversion
from aihwkit.optim import AnalogSGD
from aihwkit.simulator.configs import MappingParameter, SingleRPUConfig, UnitCellRPUConfig
from aihwkit.simulator.configs.compounds import TransferCompound
from aihwkit.simulator.configs.devices import (
    ConstantStepDevice,
    ExpStepDevice,
    LinearStepDevice,
    PiecewiseStepDevice,
    PowStepDevice,
    SoftBoundsDevice,
    SoftBoundsReferenceDevice,
)
from torch import nn

from aimc_pl.devices import (
    ConfiguredDevice,
    capacitor,
    convert_to_analog,
    dynamic_transfer,
    ecram_mo,
    exp_step,
    idealized,
    linear_step,
    piecewise_step,
    pow_step,
    reram_es,
    reram_hfo2,
    reram_om,
    residual_learning,
    soft_bounds,
    soft_bounds_reference,
    symmetric_point_tracking,
    to_mean_field,
)
from aimc_pl.devices.mean_field import MeanFieldTile, MeanFieldTileArray

ALIKE = {"w_max_dtod": 0.0, "w_min_dtod": 0.0, "dw_min_dtod": 0.0, "up_down_dtod": 0.0}
KINDS = {
    "constant": (ConstantStepDevice, {}),
    "linear": (LinearStepDevice, {"gamma_up": 0.5, "gamma_down": 0.3, "gamma_up_dtod": 0.0, "gamma_down_dtod": 0.0}),
    "soft bounds": (SoftBoundsDevice, {}),
    "reference": (SoftBoundsReferenceDevice, {}),
    "exponential": (ExpStepDevice, {}),
    "power": (PowStepDevice, {"pow_gamma": 1.5, "pow_gamma_dtod": 0.0}),
    "piecewise": (PiecewiseStepDevice, {"piecewise_up": [1.4, 1.0, 0.2], "piecewise_down": [0.3, 0.9, 1.3]}),
}
CASES = {
    "small steps": {"states": 10_000},
    "far from zero": {"w0": -0.6, "batch": 4},
    "high rate": {"rate": 0.1},
    "cut trains": {"rate": 0.05, "length": 5},
    "noisy steps": {"spread": 1.0},
    "one sample": {"batch": 1, "w0": 0.5},
}
SIZE, TRIALS, TILES = 48, 60, 6


def crossbar(kind, states=1200, spread=0.3, length=31):
    cls, options = KINDS[kind]
    device = cls(w_max=1.0, w_min=-1.0, dw_min=2 / states, dw_min_std=spread, **ALIKE, **options)
    config = SingleRPUConfig(device=device)
    config.update.desired_bl = length
    return config


def changes(config, w0, rate, x, error):
    """Return the weight changes ``(trials, SIZE²)`` of a tile whose cross-points all see the same inputs and errors."""
    weights = []
    # Each of aihwkit's tiles has a table of random numbers, whose mean is up to ±1 % of the spread.
    for _ in range(TILES):
        tile = config.tile_class(SIZE, SIZE, config, False)
        tile.set_learning_rate(rate)
        for _ in range(TRIALS // TILES):
            tile.set_weights(torch.full((SIZE, SIZE), w0))
            tile.update(x[:, None].repeat(1, SIZE), error[:, None].repeat(1, SIZE))
            weights.append(tile.get_weights()[0].flatten() - w0)
    return torch.stack(weights).double()


def compare(config, sample_pulses, w0, rate, x, error, of_mean, of_std):
    """Compare the mean and the standard deviation of weight changes on both tiles.

    They must agree within the tolerances plus 4.5 standard errors. One in 150,000 random seeds would exceed these in a
    comparison. The cross-points of a row or column share its pulses, so only trials are independent.
    """
    torch.manual_seed(0)
    theirs = changes(config, w0, rate, x, error)
    ours = changes(to_mean_field(config, sample_pulses), w0, rate, x, error)
    for tolerance, statistic in ((of_mean, lambda c: c.mean(1)), (of_std, lambda c: (c - c.mean()).square().mean(1))):
        a, b = statistic(theirs), statistic(ours)
        slack = 4.5 * float((a.var() / TRIALS + b.var() / TRIALS).sqrt())
        # The relative error of a variance is twice that of the standard deviation.
        allowed = tolerance * (1 if statistic(theirs).equal(theirs.mean(1)) else 2) * float(a.mean().abs())
        assert abs(float(b.mean() - a.mean())) <= allowed + slack


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_updates_are_aihwkits_in_mean_and_spread(kind, name):
    """Check 42 cases: the mean within 2 %, the standard deviation within 5 %."""
    case = {"w0": 0.2, "rate": 0.02, "batch": 8, "states": 1200, "spread": 0.3, "length": 31} | CASES[name]
    generator = torch.Generator().manual_seed(7)
    x = torch.rand(case["batch"], generator=generator) * 0.9 + 0.1
    error = torch.randn(case["batch"], generator=generator) * 0.5 + 0.5
    config = crossbar(kind, case["states"], case["spread"], case["length"])
    compare(config, False, case["w0"], case["rate"], x, error, 0.02, 0.05)


CATALOGUE = {
    "exp_step": exp_step(gamma=3.0, backend="aihwkit"),
    "exp_step, write noise": exp_step(gamma=1.0, write_noise=20.0, backend="aihwkit"),
    "exp_step, not alike": exp_step(device_to_device=0.2, backend="aihwkit"),
    "exp_step, complex noise": ConfiguredDevice(
        SingleRPUConfig(device=ExpStepDevice(dw_min=0.002, dw_min_std_add=0.003, dw_min_std_slope=0.02))
    ),
    "pow_step": pow_step(gamma=3.0, backend="aihwkit"),
    "pow_step, write noise": pow_step(gamma=0.5, write_noise=20.0, backend="aihwkit"),
    "pow_step, not alike": pow_step(device_to_device=0.2, backend="aihwkit"),
    "piecewise_step": piecewise_step(backend="aihwkit"),
    "piecewise_step, not alike": piecewise_step(device_to_device=0.2, backend="aihwkit"),
    "capacitor": capacitor(backend="aihwkit"),
    "ecram_mo": ecram_mo(backend="aihwkit"),
    "idealized": idealized(backend="aihwkit"),
    "reram_om": reram_om(backend="aihwkit"),
    "reram_hfo2": reram_hfo2(backend="aihwkit"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CATALOGUE)
def test_devices_of_the_catalogue_are_aihwkits(name):
    """Check the mean within 2 % and the standard deviation within 5 %, on tiles with the same cross-points."""
    config = deepcopy(CATALOGUE[name].rpu_config)
    config.device.construction_seed = 17
    sample_pulses = name.startswith(("reram_om", "reram_hfo2"))
    x, error = torch.tensor([0.9, 0.35, 0.6, 0.5]), torch.tensor([0.63, -0.3, 0.47, 0.72])
    compare(config, sample_pulses, 0.1, 0.05, x, error, 0.02, 0.05)


@pytest.mark.parametrize("sample_pulses", [False, True])
def test_write_noise_keeps_the_mean_where_few_pulses_come(sample_pulses):
    """Check 1.3 pulses per cross-point, and write noise of 10 steps: the mean within 2 %, the deviation within 5 %."""
    config = soft_bounds(num_states=200, write_noise=10.0, backend="aihwkit").rpu_config
    x, error = torch.tensor([0.9, 0.35, 0.6, 0.5]), torch.tensor([0.63, 0.3, 0.47, 0.72])
    compare(config, sample_pulses, 0.1, 0.01, x, error, 0.02, 0.05)


@pytest.mark.parametrize("is_chain", [False, True])
def test_weights_leak_as_aihwkits(is_chain):
    options = {"lifetime": 10.0, "reset": -0.1, "construction_seed": 3} | ALIKE
    varied = {"lifetime_dtod": 0.3, "reset_dtod": 0.1}
    # aihwkit draws the cross-points of the second crossbar of a chain from another seed.
    device = LinearStepDevice(**options) if is_chain else LinearStepDevice(**options, **varied)
    config = SingleRPUConfig(device=device)
    if is_chain:
        config = UnitCellRPUConfig(device=TransferCompound(unit_cell_devices=[device, deepcopy(device)], gamma=0.5))
    tiles = [c.tile_class(4, 6, c, False) for c in (config, to_mean_field(config))]
    for tile in tiles:
        tile.set_weights(torch.full((4, 6), 0.3))
        for _ in range(3):
            tile.post_update_step()
    theirs, ours = (tile.get_weights()[0] for tile in tiles)
    torch.testing.assert_close(ours, theirs)
    assert float((ours - 0.3).abs().max()) > 0.01


@pytest.mark.parametrize("sample_pulses", [False, True])
def test_cross_points_on_a_line_of_the_error_share_its_pulses(sample_pulses):
    """Check the variance of the mean of a row, of 2,880 rows on each tile, within 5 standard errors.

    One in 1,000,000 random seeds would exceed this bound.
    """
    config, x, error = crossbar("constant"), torch.tensor([0.9, 0.4]), torch.tensor([0.05, 0.08])
    torch.manual_seed(0)
    rows = [
        changes(c, 0.0, 0.01, x, error).view(TRIALS * SIZE, SIZE).mean(1).var()
        for c in (config, to_mean_field(config, sample_pulses))
    ]
    assert float(rows[1] / rows[0]) == pytest.approx(1, abs=5 * 2 * (TRIALS * SIZE) ** -0.5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["constant", "soft bounds", "reference"])
@pytest.mark.parametrize("states", [20, 100])
def test_sampled_pulses_are_aihwkits_for_coarse_steps(kind, states):
    """Check steps of 1 % and of 5 % of the range, and the share of cross-points that no pulse reaches."""
    config = crossbar(kind, states, spread=0.1)
    x, error = torch.tensor([0.8, 0.3, 0.5]), torch.tensor([0.6, -0.5, 0.4])
    compare(config, True, 0.3, 0.04, x, error, 0.02, 0.05)
    torch.manual_seed(0)
    unmoved = [
        (changes(c, 0.3, 0.04, x, error).abs() < 1e-9).double().mean(1) for c in (config, to_mean_field(config, True))
    ]
    slack = 4.5 * float(sum(u.var() / TRIALS for u in unmoved).sqrt())
    assert float(unmoved[0].mean()) > 0.01
    assert abs(float(unmoved[0].mean() - unmoved[1].mean())) <= slack


def test_a_batch_that_moves_weights_far_is_applied_in_order():
    """Check that many pulses up and then as many down end near the lower bound, and the reverse near the upper."""
    config = to_mean_field(crossbar("soft bounds", states=200))
    ends = []
    for error in ([-1.0, 1.0], [1.0, -1.0]):
        tile = config.tile_class(1, 1, config, False)
        tile.set_learning_rate(0.2)
        tile.update(torch.ones(60, 1), torch.tensor(error).repeat_interleave(30)[:, None])
        ends.append(float(tile.get_weights()[0]))
    assert ends[0] < -0.5
    assert ends[1] > 0.5


def trained(config, layer_of, x, steps=3, seed=0):
    torch.manual_seed(seed)
    layer = layer_of(config)
    optimizer = AnalogSGD(layer.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
    return layer


def nearly_digital():
    """Return a config with perfect products and steps so small that their noise is about 1e-6."""
    device = ConstantStepDevice(w_max=100, w_min=-100, dw_min=1e-11, dw_min_std=0.0, **ALIKE)
    config = to_mean_field(SingleRPUConfig(device=device))
    config.forward.is_perfect = config.backward.is_perfect = True
    config.update.desired_bl = 10**13
    return config


LAYERS = {
    "linear": (lambda c: AnalogLinear(6, 4, True, c), (5, 6)),
    "linear of images": (lambda c: AnalogLinear(6, 4, False, c), (5, 3, 6)),
    "conv1d": (lambda c: AnalogConv1d(3, 4, 3, padding=1, rpu_config=c), (2, 3, 8)),
    "conv2d": (lambda c: AnalogConv2d(3, 4, 3, stride=2, padding=1, rpu_config=c), (2, 3, 8, 7)),
    "conv3d": (lambda c: AnalogConv3d(2, 3, 2, rpu_config=c), (2, 2, 4, 5, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("digital_bias", [True, False])
@pytest.mark.parametrize("tiles", [1, 2])
def test_layers_of_aihwkit_compute_and_train_as_digital_ones(name, digital_bias, tiles):
    """Check outputs, input gradients and the update of SGD."""
    layer_of, shape = LAYERS[name]
    config = nearly_digital()
    config.mapping = MappingParameter(
        digital_bias=digital_bias, max_input_size=512 if tiles == 1 else 5, max_output_size=512 if tiles == 1 else 3
    )
    torch.manual_seed(0)
    layer = layer_of(config)
    digital = type(layer).to_digital(layer)
    x = torch.randn(shape)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    outputs = [layer(inputs[0]), digital(inputs[1])]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    optimizers = AnalogSGD(layer.parameters(), lr=0.1), torch.optim.SGD(digital.parameters(), lr=0.1)
    for output, optimizer in zip(outputs, optimizers, strict=True):
        output.square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-5, atol=1e-5)
    weight, bias = layer.get_weights()
    torch.testing.assert_close(weight.view_as(digital.weight), digital.weight.data, rtol=1e-4, atol=1e-5)
    if bias is not None:
        torch.testing.assert_close(bias.flatten(), digital.bias.data, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["conv1d", "conv2d", "conv3d"])
@pytest.mark.parametrize("max_size", [512, 7])
def test_converted_convolutions_train_as_aihwkits_unfolding_ones(name, max_size):
    """Check that converted layers, which compute on images, equal aihwkit's, which unfold images, up to rounding."""
    layer_of, shape = LAYERS[name]
    config = nearly_digital()
    config.mapping = MappingParameter(max_input_size=max_size, max_output_size=max_size)
    x = torch.randn(shape)
    torch.manual_seed(0)
    unfolding = layer_of(config)
    network = nn.Sequential(type(unfolding).to_digital(unfolding))
    convert_to_analog(network, config)
    kind = MeanFieldTile if max_size == 512 else MeanFieldTileArray
    assert isinstance(network[0].analog_module, kind)
    torch.testing.assert_close(network(x), unfolding(x), rtol=1e-5, atol=1e-5)
    before = unfolding.get_weights()[0]
    for module in (unfolding, network):
        optimizer = AnalogSGD(module.parameters(), lr=0.3)
        module(x).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(network[0].get_weights()[0], unfolding.get_weights()[0], rtol=1e-4, atol=1e-4)
    assert float((unfolding.get_weights()[0] - before).abs().max()) > 0.01


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("algorithm", ["analog SGD", "residual learning", "choppers", "tracking"])
def test_seeds_copies_pickles_and_state_dicts(name, algorithm):
    layer_of, shape = LAYERS[name]
    device = soft_bounds_reference(device_to_device=0.3, write_noise=5.0)
    config = {
        "analog SGD": lambda: device,
        "residual learning": lambda: residual_learning(device, digital_buffer=name == "conv2d"),
        "choppers": lambda: dynamic_transfer(device, chop_prob=1.0),
        "tracking": lambda: symmetric_point_tracking(device, chop_prob=0.5),
    }[algorithm]().rpu_config
    x = torch.randn(shape)
    layer, again, other = (trained(config, layer_of, x, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(layer.get_weights()[0], again.get_weights()[0])
    assert not torch.equal(layer.get_weights()[0], other.get_weights()[0])
    file = BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=False))
    before = torch.get_rng_state()
    copies = [deepcopy(layer), pickle.loads(pickle.dumps(layer)), other]
    assert torch.equal(torch.get_rng_state(), before)
    results = []
    for copy in (layer, *copies):
        optimizer = AnalogSGD(copy.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            copy(x).square().mean().backward()
            optimizer.step()
        results.append((copy(x), copy.get_weights()[0]))
    for result in results[1:]:
        assert torch.equal(result[0], results[0][0])
        assert torch.equal(result[1], results[0][1])


def test_devices_are_those_that_aihwkit_draws():
    config = crossbar("soft bounds")
    config.device.w_max_dtod, config.device.construction_seed = 0.3, 17
    theirs = config.tile_class(4, 5, config, False)
    mine = to_mean_field(config).tile_class(4, 5, to_mean_field(config), False)
    assert list(mine.get_hidden_parameters()) == list(theirs.get_hidden_parameters())
    for name, values in theirs.get_hidden_parameters().items():
        torch.testing.assert_close(mine.get_hidden_parameters()[name], values)
    # A mean-field tile accepts the cross-points of an aihwkit tile, and clips weights in the same way.
    mine = to_mean_field(crossbar("soft bounds")).tile_class(4, 5, to_mean_field(crossbar("soft bounds")), False)
    mine.set_hidden_parameters(theirs.get_hidden_parameters())
    for tile in (mine, theirs):
        tile.set_weights(torch.full((4, 5), 3.0))
    torch.testing.assert_close(mine.get_weights()[0], theirs.get_weights()[0])


@pytest.mark.parametrize("algorithm", [None, residual_learning])
def test_write_noise_of_a_tile_that_was_never_programmed_is_seeded(algorithm):
    """Check that the weights without write noise begin at 0, as the weights do. aihwkit draws them without a seed."""
    device = soft_bounds(write_noise=5.0)
    config = (algorithm(device) if algorithm else device).rpu_config
    weights = []
    for _ in range(2):
        torch.manual_seed(0)
        tile = config.tile_class(4, 5, config, False)
        for crossbar in tile.tile.crossbars:
            assert not crossbar.extra()["persistent_weights"].any()
        for _ in range(5):
            tile.update(torch.ones(2, 5), torch.ones(2, 4))
        weights.append(torch.stack([crossbar.weight for crossbar in tile.tile.crossbars]))
    assert weights[0].any()
    assert torch.equal(*weights)


def test_write_noise_shows_where_pulses_came():
    """Check where write noise appears, and that the persistent weights stay without it.

    The standard deviation of 2,500 values has a standard error of 1.4 %.
    """
    config = soft_bounds(num_states=1000, cycle_to_cycle=0.0, write_noise=10.0).rpu_config
    torch.manual_seed(0)
    tile = config.tile_class(50, 50, config, False)
    tile.set_weights(torch.zeros(50, 50))
    assert float(tile.get_weights()[0].std()) == pytest.approx(0.02, rel=0.07)
    before = tile.get_weights()[0]
    tile.set_learning_rate(0.1)
    x = torch.cat([torch.ones(1, 25), torch.zeros(1, 25)], 1)
    tile.update(x, torch.full((1, 50), -1.0))
    after = tile.get_weights()[0]
    assert torch.equal(after[:, 25:], before[:, 25:])
    assert not (after[:, :25] == before[:, :25]).any()
    persistent = tile.get_hidden_parameters()["persistent_weights"]
    assert float(persistent[:, 25:].abs().max()) == 0
    assert float((after - persistent)[:, :25].std()) == pytest.approx(0.02, rel=0.1)


def test_output_scaling_and_input_range_are_learned():
    config = soft_bounds(perfect_io=True).rpu_config
    config.mapping.weight_scaling_omega = 0.5
    config.mapping.learn_out_scaling = True
    config.mapping.weight_scaling_columnwise = True
    torch.manual_seed(0)
    digital = nn.Linear(6, 4)
    layer = AnalogLinear.from_digital(digital, config)
    x = torch.randn(3, 6)
    torch.testing.assert_close(layer(x), digital(x), rtol=1e-4, atol=1e-4)
    layer(x).square().sum().backward()
    assert next(layer.analog_tiles()).out_scaling_alpha.grad.abs().sum() > 0


def test_autocast_computes_in_float32():
    torch.manual_seed(0)
    layer = AnalogLinear(6, 4, True, linear_step(perfect_io=True).rpu_config)
    x = torch.randn(5, 6)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        half = layer(x.bfloat16())
    assert out.dtype == half.dtype == torch.float32
    assert torch.equal(out, expected)
    torch.testing.assert_close(half, layer(x.bfloat16().float()))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile reads .grad
# Dynamo warns that it does not trace aihwkit's context manager.
@pytest.mark.slow
def test_compiled_networks_train():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    convert_to_analog(network, soft_bounds(perfect_io=True))
    compiled = torch.compile(network, backend="eager")
    x = torch.randn(4, 6)
    torch.testing.assert_close(compiled(x), network(x))
    optimizer, before = AnalogSGD(network.parameters(), lr=0.5), network[0].get_weights()[0]
    compiled(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(network[0].get_weights()[0], before)


def test_aihwkits_own_conversion_works():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(32, 3))
    analog = aihwkits_conversion(deepcopy(network), soft_bounds(perfect_io=True).rpu_config)
    x = torch.randn(2, 1, 6, 6)
    torch.testing.assert_close(analog(x), network(x), rtol=1e-4, atol=1e-5)


def test_first_layers_are_not_asked_for_errors_nobody_needs():
    layer = AnalogLinear(6, 4, False, soft_bounds().rpu_config)
    state = layer.analog_module.tile.dump_extra()["generator"]
    out = layer(torch.randn(3, 6))
    after_forward = layer.analog_module.tile.dump_extra()["generator"]
    assert not torch.equal(state, after_forward)
    out.sum().backward()
    assert torch.equal(layer.analog_module.tile.dump_extra()["generator"], after_forward)


def test_weights_stay_where_the_context_points():
    layer = AnalogLinear(6, 4, False, soft_bounds().rpu_config)
    tile = layer.analog_module
    address = tile.analog_ctx._raw_data().data_ptr()
    trained_layer = layer(torch.randn(3, 6))
    trained_layer.sum().backward()
    AnalogSGD(layer.parameters(), lr=0.1).step()
    tile.set_weights(torch.rand(4, 6))
    assert tile.analog_ctx._raw_data().data_ptr() == address == tile.tile.get_weights(as_ref=True).data_ptr()
    assert torch.equal(tile.analog_ctx.enable_data_view().data, tile.get_weights()[0])


def test_a_batch_without_errors_moves_nothing():
    layer = AnalogLinear(6, 4, False, soft_bounds().rpu_config)
    before = layer.get_weights()[0]
    layer.analog_module.update(torch.randn(3, 6), torch.zeros(3, 4))
    assert torch.equal(layer.get_weights()[0], before)


@pytest.mark.parametrize("algorithm", [None, residual_learning])
def test_a_learning_rate_may_be_a_tensor(algorithm):
    weights = []
    for rate in (0.25, torch.tensor(0.25)):
        torch.manual_seed(0)
        network, device = nn.Sequential(nn.Linear(4, 3)), soft_bounds()
        convert_to_analog(network, algorithm(device) if algorithm else device)
        optimizer = AnalogSGD(network.parameters(), lr=rate)
        for _ in range(3):
            network(torch.rand(5, 4)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(network[0].get_weights()[0])
    assert torch.equal(*weights)


def test_a_learning_rate_of_zero_moves_nothing():
    for managed in (True, False):
        config = soft_bounds().rpu_config
        config.update.update_management = config.update.update_bl_management = managed
        layer = AnalogLinear(6, 4, False, config)
        before = layer.get_weights()[0]
        layer.analog_module.set_learning_rate(0.0)
        layer.analog_module.update(torch.randn(3, 6), torch.randn(3, 4))
        assert torch.equal(layer.get_weights()[0], before)


@pytest.mark.parametrize("backend", ["mean_field", "bits"])
@pytest.mark.parametrize("make", [soft_bounds, reram_es])
def test_errors_that_are_no_numbers_raise_nothing(make, backend):
    """Check that NaN as an error raises nothing, as in a digital layer.

    Expected counts make the weights NaN. In drawn pulse trains no line fires, so the weights stay.
    """
    layer = AnalogLinear(6, 4, False, make(backend=backend).rpu_config)
    layer.analog_module.update(torch.randn(3, 6), torch.full((3, 4), float("nan")))
    if make is soft_bounds:
        assert layer.get_weights()[0].isnan().any() == (backend == "mean_field")
    layer(torch.randn(3, 6))
