"""These tests compare tiles of several crossbars with aihwkit's compounds, and with a recomputation step by step."""

from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
from aihwkit.nn import AnalogLinear
from aihwkit.optim import AnalogSGD
from aihwkit.simulator.configs import (
    ConstantStepDevice,
    IOParameters,
    SingleRPUConfig,
    SoftBoundsDevice,
    SoftBoundsReferenceDevice,
    UnitCellRPUConfig,
    UpdateParameters,
)
from aihwkit.simulator.configs.compounds import (
    BufferedTransferCompound,
    ChoppedTransferCompound,
    DynamicTransferCompound,
    TransferCompound,
)
from aihwkit.simulator.parameters.enums import BoundManagementType, NoiseManagementType
from lightning_modules import MLP, loader, make_trainer
from torch import nn
from torch.utils.data import DataLoader

from aimc_pl.callbacks import DeviceNoise, ReadNoise, WriteNoise
from aimc_pl.devices import (
    ConfiguredDevice,
    MeanFieldRPUConfig,
    chopped_transfer,
    convert_to_analog,
    make_analog_aware,
    mixed_precision,
    noisy_quantized,
    pcm,
    residual_learning,
    soft_bounds,
    symmetric_point_tracking,
    tiki_taka,
    to_mean_field,
)
from aimc_pl.errors import UsageError
from aimc_pl.strategies import AnalogPipelineStrategy

ALIKE = {"w_max_dtod": 0.0, "w_min_dtod": 0.0, "dw_min_dtod": 0.0, "up_down_dtod": 0.0}
SIZE, TRIALS = 10, 60


def read_noise():
    return IOParameters(noise_management=NoiseManagementType.NONE, bound_management=BoundManagementType.NONE)


def compound(kind=TransferCompound, device=SoftBoundsDevice, crossbars=2, read=None, **options):
    devices = [device(w_max=1.0, w_min=-1.0, dw_min=0.01, dw_min_std=0.3, **ALIKE) for _ in range(crossbars)]
    settings = {"transfer_forward": read or read_noise(), "units_in_mbatch": True, "transfer_lr": 0.5} | options
    return UnitCellRPUConfig(device=kind(unit_cell_devices=devices, **settings))


def weights_of(config, steps, x, error, rate):
    """Return the weights of all crossbars, ``(trials, crossbars, out, in)``, after some updates."""
    found, tile = [], None
    for _ in range(TRIALS):
        if tile is None or not isinstance(config, MeanFieldRPUConfig):  # aihwkit's digital buffers keep their values
            tile = config.tile_class(SIZE, SIZE, config, False)
        tile.set_weights(torch.full((SIZE, SIZE), 0.2))
        tile.set_learning_rate(rate)
        for _ in range(steps):
            tile.update(x, error)
        if isinstance(config, MeanFieldRPUConfig):
            crossbars = [crossbar.weight.clone() for crossbar in tile.tile.crossbars]
        else:
            named = tile.get_hidden_parameters()
            crossbars = [values.clone() for name, values in named.items() if name.startswith("hidden_weights")]
        found.append(torch.stack([*crossbars, tile.get_weights()[0]]))
    return torch.stack(found).double()


def chopped(kind=ChoppedTransferCompound, **options):
    settings = {"units_in_mbatch": False, "fast_lr": 0.05, "transfer_lr": 1.0} | options
    return compound(kind, SoftBoundsReferenceDevice, **settings)


CASES = {
    "version 1": compound(),
    "residual learning": compound(gamma=0.3),
    "reference devices": compound(device=SoftBoundsReferenceDevice, gamma=0.3),
    "exact reading": compound(gamma=0.3, read=IOParameters(is_perfect=True)),
    "three crossbars": compound(crossbars=3, gamma=0.3, transfer_every_vec=[1.0, 3.0, 0.0]),
    "several columns": compound(n_reads_per_transfer=3, gamma=0.2),
    "two transfers in a batch": compound(transfer_every=0.5, gamma=0.2),
    "counted in vectors": compound(transfer_every=3, units_in_mbatch=False, gamma=0.2),
    "rates of their own": compound(
        transfer_lr=0.05, fast_lr=0.1, scale_fast_lr=False, scale_transfer_lr=False, gamma_vec=[0.4, 0.8]
    ),
    "version 2": compound(BufferedTransferCompound, transfer_lr=1.0),
    "version 2, seen": compound(BufferedTransferCompound, transfer_lr=1.0, gamma=0.2),
    "version 2, remembering": compound(
        BufferedTransferCompound, transfer_lr=1.0, gamma=0.2, forget_buffer=False, momentum=0.2, thres_scale=2.0
    ),
    "chopped": chopped(in_chop_prob=0.5, out_chop_prob=0.3, momentum=0.3),
    "chopped regularly, seen": chopped(in_chop_prob=0.5, in_chop_random=False, gamma=0.3, forget_buffer=False),
    "chopped, scaled to the errors": chopped(
        in_chop_prob=0.3, auto_scale=True, correct_gradient_magnitudes=True, fast_lr=0.3, transfer_lr=0.3
    ),
    "dynamic": chopped(DynamicTransferCompound, in_chop_prob=0.5, transfer_lr=2.0, auto_scale=True, fast_lr=0.3),
    "dynamic, random and capped": chopped(
        DynamicTransferCompound,
        in_chop_prob=0.5,
        in_chop_random=True,
        transfer_lr=8.0,
        forget_buffer=False,
        buffer_cap=0.5,
        momentum=0.2,
        tail_weightening=1.5,
        experimental_correct_accumulation=True,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_crossbars_are_aihwkits_in_mean_and_spread(name):
    """Compare the mean change of every column and the spread of every crossbar: within 2 % and 5 %.

    The comparisons allow 5 standard errors more. One in 1,500,000 random seeds would exceed this in a comparison, of
    which a case has at most 44.
    """
    config, generator = CASES[name], torch.Generator().manual_seed(7)
    x = torch.rand(4, SIZE, generator=generator) * 0.9 + 0.1
    error = torch.randn(4, SIZE, generator=generator) * 0.4 + 0.3
    torch.manual_seed(0)
    updates = 12 if isinstance(config.device, ChoppedTransferCompound) else 25  # with four transfers, or mostly one
    theirs, ours = (weights_of(one, updates, x, error, 0.05) for one in (config, to_mean_field(config)))
    assert theirs.shape == ours.shape
    start = torch.zeros(theirs.shape[1], 1, 1)
    start[-2] = 0.2 / ((config.device.gamma_vec or [1.0])[-1])
    start[-1] = 0.2
    for tolerance, statistic in (
        (0.02, lambda w: (w - start).mean(2)),
        (0.10, lambda w: (w - w.mean(0)).square().mean((2, 3))),
    ):
        a, b = statistic(theirs), statistic(ours)
        slack = 5 * ((a.var(0) + b.var(0)) / TRIALS).sqrt() + 1e-9
        assert ((b.mean(0) - a.mean(0)).abs() <= tolerance * a.mean(0).abs() + slack).all()


def nearly_digital(step=1e-11):
    """Return a device without noise. With the default step, updates are exact to about 1e-5."""
    return ConstantStepDevice(w_max=100, w_min=-100, dw_min=step, dw_min_std=0.0, **ALIKE)


def exact(kind, steps, **options):
    long = UpdateParameters(desired_bl=10**13)
    config = UnitCellRPUConfig(
        device=kind(
            unit_cell_devices=[nearly_digital(), *map(nearly_digital, steps)],
            transfer_forward=IOParameters(is_perfect=True),
            **options,
        ),
        forward=IOParameters(is_perfect=True),
        backward=IOParameters(is_perfect=True),
        update=long,
    )
    return to_mean_field(config)


@pytest.mark.parametrize("reads", [1, 2])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("gamma", [0.0, 0.25])
def test_residual_learning_equals_the_recomputation(gamma, every, reads):
    """Check W and P of a layer of 3 inputs after each of 8 mini-batches against the algorithm as it is written."""
    long = UpdateParameters(desired_bl=10**13)
    options = {"gamma": gamma, "transfer_every": every, "n_reads_per_transfer": reads, "transfer_lr": 2.0}
    config = exact(TransferCompound, [1e-11], transfer_update=long, **options)
    torch.manual_seed(0)
    start = torch.randn(4, 3)
    tile = config.tile_class(4, 3, config, False)
    tile.set_weights(start)
    tile.set_learning_rate(0.1)
    w, p, column = start.clone(), torch.zeros(4, 3), 0
    for step in range(1, 9):
        x, error = torch.randn(5, 3), torch.randn(5, 4)
        torch.testing.assert_close(tile.tile(x), x @ (w + gamma * p).T, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(tile.tile.backward(error), error @ (w + gamma * p), rtol=1e-4, atol=1e-4)
        tile.update(x, error)
        p -= 0.1 * error.T @ x
        for _ in range(reads if step % every == 0 else 0):
            w[:, column] += 0.1 * 2.0 * p[:, column]
            column = (column + 1) % 3
        for crossbar, expected in zip(tile.tile.crossbars, (p, w), strict=True):
            torch.testing.assert_close(crossbar.weight, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("number", [3, 4])
def test_multi_tile_residual_learning_equals_the_recomputation(number):
    """Check all crossbars of a layer of 3 inputs after each of 9 mini-batches against the algorithm as written."""
    perfect = IOParameters(is_perfect=True)
    one = SingleRPUConfig(
        device=nearly_digital(), forward=perfect, backward=perfect, update=UpdateParameters(desired_bl=10**13)
    )
    every, gamma = [1.0, 2.0, 3.0][: number - 1], 0.3
    device = residual_learning(
        ConfiguredDevice(to_mean_field(one)), gamma, transfer_lr=2.0, transfer_every=every, num_crossbars=number
    )
    torch.manual_seed(0)
    tile = device.rpu_config.tile_class(4, 3, device.rpu_config, False)
    tile.set_weights(torch.randn(4, 3))
    tile.set_learning_rate(0.1)
    weights = [crossbar.weight.clone() for crossbar in reversed(tile.tile.crossbars)]  # W₀ first
    columns = [0] * number
    for step in range(1, 10):
        x, error = torch.randn(5, 3), torch.randn(5, 4)
        seen = sum(gamma**n * weight for n, weight in enumerate(weights))
        torch.testing.assert_close(tile.tile(x), x @ seen.T, rtol=1e-4, atol=1e-4)
        tile.update(x, error)
        weights[-1] -= 0.1 * error.T @ x
        for n, period in zip(range(number - 1, 0, -1), every, strict=True):
            if step % period == 0:
                weights[n - 1][:, columns[n]] += 0.1 * 2.0 * weights[n][:, columns[n]]
                columns[n] = (columns[n] + 1) % 3
        for crossbar, expected in zip(reversed(tile.tile.crossbars), weights, strict=True):
            torch.testing.assert_close(crossbar.weight, expected, rtol=1e-4, atol=1e-4)
    assert all(weight.any() for weight in weights)


@pytest.mark.parametrize("forget", [True, False])
def test_the_digital_buffer_equals_the_recomputation(forget):
    """Check that W moves by whole steps of 0.01, at most one at a time, and that the rest waits in the buffer."""
    one = UpdateParameters(desired_bl=1, update_bl_management=False, update_management=False)
    options = {"thres_scale": 3.0, "momentum": 0.1, "forget_buffer": forget, "transfer_update": one}
    config = exact(BufferedTransferCompound, [0.01], transfer_lr=1.0, **options)
    torch.manual_seed(0)
    tile = config.tile_class(4, 3, config, False)
    tile.set_learning_rate(0.2)
    w, p, held, moved = torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(4, 3), 0
    for step in range(60):
        x, error, k = torch.randn(2, 3), torch.randn(2, 4), step % 3
        tile.update(x, error)
        p -= 0.2 * error.T @ x
        for row in range(4):
            value = float(held[row, k] + 0.2 * p[row, k])
            steps = max(-1, min(1, int(value / 0.03)))
            left = value * 0.1 if forget else value - 0.9 * 0.03 * steps
            held[row, k] = left if steps else value
            w[row, k] += 0.01 * steps
            moved += abs(steps)
        torch.testing.assert_close(tile.tile.crossbars[1].weight, w, rtol=1e-3, atol=1e-3)
    assert moved > 20


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("gamma", [0.0, 0.4])
def test_residual_learning_with_a_digital_buffer_equals_the_recomputation(gamma, number):
    """Check that each crossbar moves by whole steps of 0.01, and that all else waits in the buffer before it."""
    perfect = IOParameters(is_perfect=True)
    steps = ConstantStepDevice(w_max=9.0, w_min=-9.0, dw_min=0.01, dw_min_std=0.0, **ALIKE)
    device = ConfiguredDevice(to_mean_field(SingleRPUConfig(device=steps, forward=perfect, backward=perfect)))
    every = [1.0, 2.0][: number - 1]
    device = residual_learning(device, gamma, 3.0, every, digital_buffer=True, num_crossbars=number)
    torch.manual_seed(0)
    tile = device.rpu_config.tile_class(4, 3, device.rpu_config, False)
    tile.set_learning_rate(0.2)
    held = [torch.zeros(3, 4) for _ in every]
    expected = [torch.zeros(4, 3) for _ in every]
    for step in range(1, 61):
        tile.update(torch.randn(2, 3), torch.randn(2, 4))
        first, *others = (crossbar.weight for crossbar in tile.tile.crossbars)
        for n, source in enumerate([first, *expected[:-1]]):
            if step % every[n] == 0:
                k = (step // int(every[n]) - 1) % 3
                held[n][k] += 0.2 * 3.0 * source[:, k]
                pulses = (held[n][k] / 0.01).trunc().clamp(-1, 1)
                held[n][k] -= 0.01 * pulses
                expected[n][:, k] += 0.01 * pulses
        for weight, ours in zip(others, expected, strict=True):
            torch.testing.assert_close(weight, ours, rtol=1e-4, atol=1e-4)
    assert all(each.abs().max() > 0.03 for each in expected)


def test_a_convolution_counts_its_mini_batches():
    config = exact(TransferCompound, [1e-11], transfer_update=UpdateParameters(desired_bl=10**13), transfer_every=2)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 2, 2))
    convert_to_analog(network, config)
    tile = network[0].analog_module
    before = tile.tile.crossbars[1].weight.clone()
    for _ in range(6):
        network(torch.rand(3, 1, 5, 5))
        tile.update_indexed(torch.rand(3, 1, 5, 5), torch.randn(3, 2, 4, 4))
    moved = (tile.tile.crossbars[1].weight != before).any(0)
    assert moved.tolist() == [True, True, True, False]


def test_new_weights_erase_what_was_learnt():
    config = residual_learning(digital_buffer=True).rpu_config
    torch.manual_seed(0)
    tile = config.tile_class(4, 3, config, False)
    for _ in range(5):
        tile.update(torch.rand(2, 3), torch.randn(2, 4))
    tile.set_weights(torch.full((4, 3), 0.25))
    fast, slow = tile.tile.crossbars
    assert not fast.weight.any()
    assert (slow.weight == 0.25).all()
    assert (tile.get_weights()[0] == 0.25).all()
    assert not tile.tile.dump_extra()["digital"].any()


def test_a_learning_rate_of_zero_moves_nothing():
    config = compound(gamma=0.2, fast_lr=0.1, scale_fast_lr=False, scale_transfer_lr=False)
    tile = to_mean_field(config).tile_class(4, 3, to_mean_field(config), False)
    tile.set_learning_rate(0.0)
    tile.update(torch.rand(2, 3), torch.randn(2, 4))
    assert not tile.get_weights()[0].any()


@pytest.mark.parametrize("algorithm", [residual_learning, chopped_transfer, symmetric_point_tracking, mixed_precision])
def test_algorithms_keep_all_other_sections_of_a_configuration(algorithm):
    config = SingleRPUConfig(device=SoftBoundsDevice())
    config.pre_post.input_range.enable = True
    config.mapping.max_input_size = 17
    config.runtime.offload_input = True
    ours = algorithm(ConfiguredDevice(to_mean_field(config))).rpu_config
    for section in ("forward", "backward", "update", "mapping", "pre_post", "runtime"):
        assert getattr(ours, section) == getattr(config, section)


def test_residual_learning_takes_the_device_and_its_backend():
    for backend in ("mean_field", "bits", "aihwkit"):
        config = residual_learning(soft_bounds(tau=0.7, perfect_io=True, backend=backend), gamma=0.4).rpu_config
        assert isinstance(config, MeanFieldRPUConfig) == (backend != "aihwkit")
        assert getattr(config, "sample_pulses", None) == {"mean_field": False, "bits": True}.get(backend)
        assert [device.w_max for device in config.device.unit_cell_devices] == [0.7, 0.7]
        assert config.forward.is_perfect
        assert config.device.transfer_forward.is_perfect
        layer = AnalogLinear(3, 4, False, deepcopy(config))
        layer.analog_module.update(torch.rand(2, 3), torch.rand(2, 4))
        assert layer.get_weights()[0].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 2.0}, "gamma must be .* at most 1"),
        ({"transfer_lr": 0.0}, "transfer_lr must be .* above 0"),
        ({"transfer_every": -1.0}, "transfer_every must be .* above 0"),
        ({"n_reads_per_transfer": 0}, "n_reads_per_transfer must be .* at least 1"),
        ({"digital_buffer": "yes"}, "digital_buffer must be"),
        ({"num_crossbars": 1}, "num_crossbars must be .* at least 2"),
        ({"transfer_every": [1.0, 0.0], "num_crossbars": 3}, "transfer_every must be .* above 0"),
        ({"transfer_every": [1.0], "num_crossbars": 3}, "between num_crossbars=3 crossbars, so 2, got 1"),
        ({"device": residual_learning()}, "needs a pulsed device of one crossbar, got TransferCompound"),
        ({"device": pcm(backend="aihwkit")}, "needs a pulsed device of one crossbar, got PCMPresetUnitCell"),
        ({"device": noisy_quantized()}, "needs a pulsed device of one crossbar, got NoisyQuantizedDevice"),
        ({"device": mixed_precision()}, "needs a pulsed device of one crossbar, got MixedPrecisionCompound"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        residual_learning(**options)


def test_presets_run_here_and_what_only_aihwkit_simulates_is_refused():
    assert isinstance(tiki_taka("EcRam").rpu_config, MeanFieldRPUConfig)
    assert type(tiki_taka("EcRam", backend="aihwkit").rpu_config).__name__ == "TikiTakaEcRamPreset"
    for config, named in (
        (compound(transfer_columns=False), "transfer_columns=False"),
        (compound(with_reset_prob=0.5), "with_reset_prob=0.5"),
        (compound(read=IOParameters(ir_drop=1.0)), "ir_drop=1.0"),
        (compound(transfer_update=UpdateParameters(um_grad_scale=0.5)), "um_grad_scale=0.5"),
    ):
        with pytest.raises(UsageError, match=rf"does not simulate .*{named}"):
            to_mean_field(config)


@pytest.mark.parametrize(("noise", "is_refused"), [(WriteNoise(0.1), True), (ReadNoise(0.1), False)])
def test_noise_does_not_erase_the_weights_that_the_products_do_not_see(noise, is_refused):
    module = MLP()
    data = DataLoader([(x.float(), y) for x, y in loader(module).dataset], batch_size=8)
    trainer = make_trainer(
        AnalogPipelineStrategy(1, "sync", 1, device="residual_learning"),
        callbacks=[DeviceNoise([noise], layers=["net.4"])],
        precision="32-true",
        max_steps=1,
    )
    refusal = pytest.raises(UsageError, match=r"erases other crossbars.* of layer 'net\.4'")
    with refusal if is_refused else nullcontext():
        trainer.fit(module, data)


@pytest.mark.parametrize(("layer", "shape"), [(nn.Linear(5, 3), (5,)), (nn.Conv1d(2, 3, 3), (2, 6))])
@pytest.mark.parametrize(("every", "transfers"), [(1.0, 12), (2.0, 6), (2.5, 4), (7.0, 1), (0.5, 24)])
@pytest.mark.parametrize("device", [residual_learning, chopped_transfer], ids=["residual", "chopped"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, AnalogSGD])
def test_transfers_count_updates(layer, shape, every, transfers, device, optimizer):
    """Neither the sizes of mini-batches nor the number of their micro-batches matters."""
    torch.manual_seed(0)
    network = nn.Sequential(deepcopy(layer))
    convert_to_analog(network, device(soft_bounds(perfect_io=True), transfer_every=every))
    training = optimizer(network.parameters(), lr=0.1)
    make_analog_aware(training)
    tile = network.get_submodule("0.analog_module").tile
    for sizes in 3 * [(2, 3), (4,), (1, 1, 1), (3, 2)]:
        training.zero_grad()
        for size in sizes:
            network(torch.rand(size, *shape)).square().sum().backward()
        training.step()
    columns = [tile.dump_extra()["columns"][0], transfers % tile.x_size]
    assert columns[0] == columns[1]
    assert tile.dump_extra()["num_updates"] == 12
