"""These tests compare the compiled loops with the operations of torch that do the same on other devices."""

import pickle
from contextlib import ExitStack
from copy import deepcopy
from itertools import product
from math import exp, isnan, nan
from unittest import mock

import pytest
import torch
from aihwkit.simulator.configs import UpdateParameters
from aihwkit.simulator.parameters.enums import NoiseManagementType

from aimc_pl.devices import constant_step, linear_step, residual_learning, soft_bounds, soft_bounds_reference
from aimc_pl.devices.mean_field import converters, crossbar, pulses, response, tile
from aimc_pl.devices.mean_field.crossbar import ROWS, Crossbar
from aimc_pl.devices.mean_field.pulses import Counts, expected_counts
from aimc_pl.devices.mean_field.random_table import TableGenerator
from aimc_pl.devices.mean_field.tile import MeanFieldSimulatorTile
from aimc_pl.devices.mean_field.transfer import TransferSimulatorTile
from aimc_pl.devices.mean_field.vectors import Convolution


def uneven():
    """Return a device whose steps up and down differ, with a noise that does not depend on the weight."""
    device = soft_bounds_reference(device_to_device=0.1)
    device.rpu_config.device.up_down_dtod = 0.3
    return device


DEVICES = (
    soft_bounds(),
    soft_bounds(num_states=30),
    soft_bounds(device_to_device=0.3),
    soft_bounds(num_states=30, device_to_device=0.3),
    uneven(),
    linear_step(device_to_device=0.3),
    constant_step(),
    soft_bounds(write_noise=3.0),
    soft_bounds_reference(device_to_device=0.3, write_noise=1.0),
)
UPDATES = {
    "managed": UpdateParameters(),
    "short trains": UpdateParameters(desired_bl=3),
    "update management only": UpdateParameters(update_bl_management=False, desired_bl=10),
    "no management": UpdateParameters(update_management=False, update_bl_management=False, desired_bl=10),
    "single pulses": UpdateParameters(update_management=False, update_bl_management=False, desired_bl=1),
    "growing trains": UpdateParameters(
        update_management=False, update_bl_management=False, desired_bl=1, fixed_bl=False
    ),
}
UNMANAGED = {name for name, update in UPDATES.items() if not (update.update_management or update.update_bl_management)}
OUT, IN = 20, 35


def with_torch():
    """Return a context in which tiles use torch's operations, and never the shortcut for small motions."""
    stack = ExitStack()
    for where, name, value in (
        (Crossbar, "_make_loop", lambda self: None),
        (pulses, "LENGTH", 0),
        (pulses, "_RARELY", 0.0),
        (response.LinearResponse, "step", response.Response.step),
        (response, "_SECOND_ORDER_REACH", 0.0),
        (tile, "has_row_product", lambda *args: False),
    ):
        stack.enter_context(mock.patch.object(where, name, value))
    return stack


def crossbar_of(device):
    torch.manual_seed(3)
    made = Crossbar(IN, OUT, device.rpu_config.device, False, TableGenerator().manual_seed(5))
    made.write(torch.randn(OUT, IN) / 5)
    return made


def batch(size, signed):
    torch.manual_seed(size)
    return torch.randn(size, IN) if signed else torch.rand(size, IN), torch.randn(size, OUT) / 5


@pytest.mark.parametrize("device", DEVICES, ids=repr)
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("turned", [None, (1, IN), (OUT, IN)])
def test_pulses_move_weights_as_those_of_torch(device, update, turned):
    signs = None if turned is None else 2.0 * torch.randint(2, turned) - 1
    for size, signed, learning_rate in product((1, 7), (False, True), (0.003, 0.05)):
        x, error = batch(size, signed)
        compiled, plain = crossbar_of(device), crossbar_of(device)
        before = compiled.weight.clone()
        for _ in range(2):
            compiled.pulse(x, error, ROWS, learning_rate, UPDATES[update], signs)
            with with_torch():
                plain.pulse(x, error, ROWS, learning_rate, UPDATES[update], signs)
        assert not torch.equal(compiled.weight, before)
        torch.testing.assert_close(compiled.weight, plain.weight, rtol=0, atol=3e-5)
        torch.testing.assert_close(compiled.hidden, plain.hidden, rtol=0, atol=3e-5)
        torch.testing.assert_close(float(compiled.tally.cut), float(plain.tally.cut), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("relaxation", [1e-3, 0.1, 0.5, 3.0, 15.9, 16.1, 300.0])
@pytest.mark.parametrize("end", [1.0, -0.3])
def test_weights_relax_by_an_exponential(relaxation, end):
    """Without noise, n pulses of relative size s of which n·e is the net end at w' = e + (w - e)·exp(-ns)."""
    response = crossbar_of(soft_bounds(tau=1.0, num_states=200, cycle_to_cycle=0.0)).response
    weight = torch.linspace(-0.9, 0.9, IN).expand(OUT, IN).contiguous()
    expected = end + (weight.double() - end) * exp(-relaxation)
    count, nothing = torch.full((OUT, IN), 100 * relaxation), torch.zeros(OUT, IN)
    response.step(weight, Counts(count * end, count, (nothing, nothing)), relaxation, nothing)
    torch.testing.assert_close(weight.double(), expected, rtol=0, atol=5e-7)


@pytest.mark.parametrize("device", DEVICES, ids=repr)
@pytest.mark.parametrize("learning_rate", [0.05, 1.0])
@pytest.mark.parametrize("update", UPDATES)
def test_pulses_move_a_column_as_those_of_torch(device, learning_rate, update):
    error = torch.linspace(-2.0, 2.0, OUT)
    compiled, plain = crossbar_of(device), crossbar_of(device)
    before = compiled.weight.clone()
    for column in (0, 3, 3, IN - 1):
        compiled.pulse_column(column, error, learning_rate, UPDATES[update])
        with with_torch():
            plain.pulse_column(column, error, learning_rate, UPDATES[update])
    torch.testing.assert_close(compiled.hidden, plain.hidden, rtol=0, atol=3e-5)
    torch.testing.assert_close(compiled.weight, plain.weight, rtol=0, atol=3e-5)
    assert compiled.tally.num_updates == plain.tally.num_updates == 4
    torch.testing.assert_close(float(compiled.tally.cut), float(plain.tally.cut), rtol=1e-4, atol=1e-6)
    moved = (compiled.weight != before).any(0).nonzero().flatten()
    assert moved.tolist() == [0, 3, IN - 1]


READS = {
    "converters": {},
    "perfect": {"is_perfect": True, "out_scale": 0.7},
    "without noise": {"out_noise": 0.0},
    "noisy inputs": {"inp_noise": 0.1},
    "scaled": {"out_bound": 0.1, "out_scale": 0.7, "inp_bound": 0.5, "nm_thres": 0.7},
}


@pytest.mark.parametrize("device", DEVICES, ids=repr)
@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("size", [(OUT, IN), (1, 3)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"num_crossbars": 3, "transfer_every": [1, 2]},
        {"transfer_every": 1},
        {"transfer_every": 2, "gamma": 0.0},
        {"transfer_every": 0.4, "gamma": 0.3},
    ],
    ids=str,
)
def test_transfers_are_those_of_torch(device, read, size, options):
    config = residual_learning(device, transfer_lr=0.4, **options).rpu_config
    config.device.n_reads_per_transfer = 2
    for name, value in READS[read].items():
        setattr(config.device.transfer_forward, name, value)
    ends = []
    for compiled in (True, False):
        torch.manual_seed(4)
        made = TransferSimulatorTile(*reversed(size), config)
        made.set_weights(torch.randn(size) / 5)
        made.crossbars[0].write(torch.randn(size) / 5)
        with ExitStack() if compiled else with_torch():
            for _ in range(8):
                made.update(torch.randn(3, size[1]), torch.randn(3, size[0]) / 5)
        tallies = [(one.tally.num_updates, float(one.tally.cut)) for one in made.crossbars]
        ends.append(
            [*(one.weight for one in made.crossbars), made.get_weights(), made.dump_extra()["columns"], tallies]
        )
    assert all(crossbar.weight.any() for crossbar in made.crossbars)
    torch.testing.assert_close(*ends, rtol=0, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES, ids=repr)
@pytest.mark.parametrize("size", [(OUT, IN), (1, 1), (3, 200)], ids=str)
@pytest.mark.parametrize("scales", [None, "one", "one per output"])
def test_programming_is_that_of_torch(device, size, scales):
    ends = []
    for compiled in (True, False):
        torch.manual_seed(3)
        made = Crossbar(*reversed(size), device.rpu_config.device, True, TableGenerator().manual_seed(5))
        made.write(torch.randn(size) / 5)
        scale = None if scales is None else torch.rand(1 if scales == "one" else size[0], 1) + 0.5
        residual, shown = torch.zeros(size), made.weight * (1.0 if scale is None else scale)
        with ExitStack() if compiled else with_torch():
            for _ in range(5):
                shown += torch.randn(size) / 30
                made.program(residual, shown, scale)
                made.program(residual, shown, scale)  # Nothing has changed.
        assert (residual.abs() < made.granularity).all()
        torch.testing.assert_close(shown, made.weight * (1.0 if scale is None else scale), rtol=1e-6, atol=1e-7)
        ends.append((made.weight, residual, shown))
    torch.testing.assert_close(*ends, rtol=0, atol=3e-5)


@pytest.mark.slow
def test_a_batch_that_moves_weights_far_is_split():
    """Compare means over 400 tiles. Without the split, they differ by 0.1. The limit is 5 standard errors."""
    x, error = torch.rand(8, IN), torch.randn(8, OUT)
    ends = {}
    for kind in ("compiled", "torch", "in one"):
        moved = crossbar_of(soft_bounds(num_states=10, cycle_to_cycle=0.0))
        start, ends[kind] = moved.weight.clone(), []
        furthest = mock.patch.object(crossbar, "_LARGEST_REACH", 1e9)
        with with_torch() if kind == "torch" else furthest if kind == "in one" else ExitStack():
            for _ in range(400):
                moved.weight.copy_(start)
                moved.pulse(x, error, ROWS, 0.5, UpdateParameters())
                ends[kind].append(moved.weight.clone())
    means = {kind: torch.stack(values).mean(0) for kind, values in ends.items()}
    limit = 5 * torch.stack(ends["torch"]).std(0) * (2 / 400) ** 0.5 + 1e-4
    assert ((means["compiled"] - means["torch"]).abs() < limit).all()
    assert ((means["in one"] - means["torch"]).abs() > limit).any()


CONVOLUTIONS = {
    "3x3": (Convolution((3, 3), (1, 1), (1, 1), (1, 1)), (5, 4, 6, 7)),
    "strided": (Convolution((3, 3), (2, 2), (1, 1), (1, 1)), (3, 3, 9, 8)),
    "5x2": (Convolution((5, 2), (1, 3), (2, 0), (1, 1)), (2, 2, 6, 11)),
    "dilated": (Convolution((3, 3), (1, 1), (2, 2), (2, 2)), (2, 2, 7, 9)),
    "1x1": (Convolution((1, 1), (2, 2), (0, 0), (1, 1)), (2, 6, 5, 5)),
    "1d": (Convolution((5,), (2,), (2,), (1,)), (3, 3, 12)),
    "1d, dilated": (Convolution((3,), (1,), (0,), (3,)), (3, 3, 12)),
    "3d": (Convolution((2, 3, 2), (1, 1, 2), (1, 1, 0), (1, 2, 1)), (2, 2, 4, 5, 6)),
    "part": (Convolution((3, 3), (1, 1), (1, 1), (1, 1)).part(4, 31), (5, 4, 6, 7)),
    "images that fill the cache": (Convolution((3, 3), (1, 1), (1, 1), (1, 1)), (3, 32, 30, 40)),
}


def images_of(name, scale=0.2):
    convolution, shape = CONVOLUTIONS[name]
    torch.manual_seed(len(name))
    images = torch.randn(shape)
    return convolution, images, scale * torch.randn(shape[0], 6, *convolution.out_size(images))


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("rate", [0.05, 1.3, 40.0])
def test_events_of_a_convolution_are_counted_as_with_torch(name, update, rate):
    convolution, images, error = images_of(name)
    for x in (images, images.relu(), images.transpose(0, -1).contiguous().transpose(0, -1)):
        arguments = x, error, convolution, rate, 1.0, UPDATES[update], 0.3
        ours = expected_counts(*arguments, TableGenerator().manual_seed(2))
        with with_torch():
            theirs = expected_counts(*arguments, TableGenerator().manual_seed(2))
        assert ours.total.max() > 0
        torch.testing.assert_close(ours[:3], theirs[:3], rtol=1e-4, atol=3e-7 * float(ours.total.sum()))
        torch.testing.assert_close(float(ours.cut), float(theirs.cut), rtol=1e-5, atol=0)


@pytest.mark.parametrize("update", UPDATES)
def test_more_images_than_a_table_has_numbers_are_counted_in_portions(update, monkeypatch):
    """Errors that fire in every slot or never need no random numbers, so that the order of portions shows."""
    convolution, images, error = images_of("3x3")
    images, error = images.sign(), error.sign() * (torch.rand_like(error) < 0.3)
    arguments = images, error, convolution, 40.0, 1.0, UPDATES[update], 0.3
    expected = expected_counts(*arguments, TableGenerator())
    monkeypatch.setattr(pulses, "LENGTH", 2 * error[0].numel())
    ours = expected_counts(*arguments, TableGenerator())
    torch.testing.assert_close(ours[:3], expected[:3], rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(float(ours.cut), float(expected.cut))


def test_images_that_are_not_finite_go_through():
    convolution, images, error = images_of("3x3")
    for value in (nan, float("inf")):
        images[1, 2, 3, 3] = value
        counts = expected_counts(images, error, convolution, 0.05, 1.0, UpdateParameters(), 0.3, TableGenerator())
        assert counts.net.isnan().any()


CONVERTERS = {
    "default": {},
    "without noise": {"out_noise": 0.0},
    "fixed scale": {"noise_management": NoiseManagementType.CONSTANT, "nm_thres": 1.5},
    "unscaled": {"noise_management": NoiseManagementType.NONE},
    "limited inputs": {"nm_thres": 0.7, "inp_bound": 0.5},
    "no rounding": {"inp_res": -1, "out_res": -1},
    "small outputs": {"out_bound": 2.0, "out_scale": 0.5},
    "small outputs up only": {"out_bound": 2.0, "bm_test_negative_bound": False},
    "small outputs once": {"out_bound": 1.0, "max_bm_factor": 1},
    "outputs without a bound": {"out_bound": -1.0},
}


@pytest.mark.parametrize("name", CONVERTERS)
@pytest.mark.parametrize("shape", [(6,), (4,), (2, 3), ()], ids=str)
def test_products_are_those_of_torch(name, shape):
    config = soft_bounds().rpu_config
    for io in (config.forward, config.backward):
        for key, value in CONVERTERS[name].items():
            setattr(io, key, value)
    results = []
    for compiled in (True, False):
        torch.manual_seed(1)
        made = MeanFieldSimulatorTile(IN, OUT, config)
        made.set_weights(torch.randn(OUT, IN) / 3)
        x, error = torch.randn(*shape, IN), torch.randn(*shape, OUT)
        with ExitStack() if compiled else with_torch():
            results.append((made.forward(x), made.backward(error)))
    assert all(ours.shape[:-1] == shape for ours in results[0])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [nan, float("inf")])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("write_noise", [0.0, 2.0])
def test_numbers_that_are_not_finite_go_through(value, update, write_noise):
    """Without update management, an infinity is clipped, and NaN shows where the lines of the errors fire."""
    x, error = batch(5, signed=True)
    x[2, 3] = value
    is_managed, device = update not in UNMANAGED, soft_bounds(write_noise=write_noise)
    moved = crossbar_of(device)
    moved.pulse(x, error, ROWS, 0.05, UPDATES[update])
    lost = moved.weight[:, 3].isnan()
    assert lost.all() if is_managed else bool(lost.any()) == isnan(value)
    moved = crossbar_of(device)
    moved.pulse_column(5, torch.full((OUT,), value), 0.05, UPDATES[update])
    lost = [5] if is_managed or isnan(value) else []
    assert moved.weight.isnan().all(0).nonzero().flatten().tolist() == lost
    assert moved.weight.isnan().any(0).sum() == len(lost)


def test_products_of_numbers_that_are_not_finite():
    x, _ = batch(5, signed=True)
    x[2, 3] = nan
    made = MeanFieldSimulatorTile(IN, OUT, soft_bounds().rpu_config)
    made.set_weights(torch.randn(OUT, IN) / 3)
    assert made.forward(x).isnan().all(1).tolist() == [False, False, True, False, False]


def test_inputs_of_zero_give_only_noise():
    io = soft_bounds().rpu_config.forward
    y = converters.row_product(torch.ones(OUT, IN), torch.zeros(2, IN), io, TableGenerator(), True)
    assert torch.equal(y, torch.zeros(2, OUT))


def test_weights_move_where_their_memory_is_now():
    """Compiled loops keep the addresses of weights and parameters. A copy, and other memory, must not be forgotten."""
    x, error = batch(4, signed=True)

    def moved(change):
        made = crossbar_of(soft_bounds(device_to_device=0.3))
        made.pulse(x, error, ROWS, 0.05, UpdateParameters())
        made = change(made)
        made.pulse(x, error, ROWS, 0.05, UpdateParameters())
        made.pulse_column(3, error[0], 0.05, UpdateParameters())
        return made.weight

    def renewed(made):
        made.weight, made.hidden = made.weight.clone(), made.hidden.clone()
        return made

    def narrowed(made):
        made.hidden = made.hidden.clone()
        made.hidden[[made.names.index("max_bound"), made.names.index("min_bound")]] *= 0.1
        return made

    expected = moved(lambda made: made)
    for change in (deepcopy, renewed, lambda made: made.share_memory(), lambda made: pickle.loads(pickle.dumps(made))):
        assert torch.equal(moved(change), expected)
    assert moved(narrowed).abs().max() < 0.2 < expected.abs().max()
