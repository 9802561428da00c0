"""These tests check what DeviceNoise does to weights and products. Seeds are fixed and statistical bounds 5 sigma."""

from contextlib import nullcontext
from itertools import cycle
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning_modules import MLP, Attributes, loader, make_trainer
from torch import Generator, nn
from torch.utils.data import DataLoader

from aimc_pl.callbacks import DeviceNoise, DeviceVariation, Drift, ReadNoise, StuckAt, WriteNoise
from aimc_pl.devices import (
    analog_layers,
    convert_to_analog,
    mixed_precision,
    reram_sb,
    soft_bounds,
    weight_scaling,
)
from aimc_pl.errors import UsageError
from aimc_pl.strategies import AnalogPipelineStrategy
from aimc_pl.weights import layer_weight, move_weight, product, weight_layers

N = 200_000  # number of weights in statistical tests: five sigma of the mean of N(0, 1) are 0.011, of the spread 0.008


def apply(noise, weight, before=None, cycles=1, seed=0):
    before = torch.zeros_like(weight) if before is None else before
    return noise.apply(weight, before, cycles, Generator().manual_seed(seed), Generator().manual_seed(99))


def test_write_noise_has_its_standard_deviation():
    """Check mean and deviation. A random seed would raise a false alarm with a probability below 1e-6 for each."""
    noise = (apply(WriteNoise(0.2), torch.ones(N)) - 1) / 0.2
    assert abs(noise.mean()) < 0.0112
    assert abs(noise.std() - 1) < 0.0079


def test_device_variation_scales_the_change_by_a_gain_per_device():
    """Check mean and deviation. A random seed would raise a false alarm with a probability below 1e-6 for each."""
    before = torch.randn(N)
    gains = [apply(DeviceVariation(0.3), before + 1, before, seed=s) - before for s in (0, 1)]
    assert torch.equal(gains[0], gains[1])
    assert abs(gains[0].mean() - 1) < 0.3 * 0.0112
    assert abs(gains[0].std() / 0.3 - 1) < 0.0079


def test_drift_is_the_power_law():
    weight = torch.randn(10)
    torch.testing.assert_close(apply(Drift(0.06, t0=20.0), weight, cycles=130), weight * (150 / 20) ** -0.06)


def test_stuck_devices_stay_stuck():
    # No other weight comes near 100.
    stuck = [apply(StuckAt(0.25, 100.0), torch.randn(N), seed=s) == 100.0 for s in (0, 1)]
    assert torch.equal(stuck[0], stuck[1])
    # five sigma of a binomial fraction
    assert abs(stuck[0].float().mean() - 0.25) < 5 * (0.25 * 0.75 / N) ** 0.5


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(5, 3), (4, 5)),
        (nn.Conv2d(2, 3, 3, stride=2, padding=1), (2, 2, 6, 6)),
        (nn.Conv1d(4, 6, 3, groups=2, dilation=2), (2, 4, 9)),
    ],
)
def test_product_is_the_layers(layer, shape):
    x = torch.randn(shape)
    bias = layer.bias.view(-1, *[1] * (x.dim() - 2)) if x.dim() > 2 else layer.bias
    torch.testing.assert_close(product(layer, x, layer_weight(layer)) + bias, layer(x))


def fit(callback, strategy=None, module=None, data=None, **kwargs):
    L.seed_everything(2)
    module = Attributes().double() if module is None else module
    trainer = make_trainer(
        AnalogPipelineStrategy(3, "async", 4, split_at=["l2", "l4"]) if strategy is None else strategy,
        callbacks=[callback] if callback else [],
        **{"log_every_n_steps": 1, **kwargs},
    )
    trainer.fit(module, loader(module, shuffle=False) if data is None else data)
    return module, trainer


def weights(module):
    return {name: layer_weight(layer) for name, layer in weight_layers(module).items()}


class Still(Attributes):
    """A module that learns nothing. Every change of its weights is noise."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize("duplex", ["half", "full"])
def test_drift_counts_the_clock_cycles_between_updates(duplex):
    """Check the drift of 11 updates: a full pipeline updates every two cycles, so there are ten intervals."""
    module = Still().double()
    start = weights(module)
    strategy = AnalogPipelineStrategy(3, "async", 4, duplex=duplex, split_at=["l2", "l4"])
    fit(DeviceNoise([Drift(0.06, t0=5.0)]), strategy, module, max_epochs=1)
    for name, weight in weights(module).items():
        torch.testing.assert_close(weight, start[name] * (1 + 2 / 5) ** (-0.06 * 10))


def test_device_variation_scales_nothing_where_nothing_is_learnt():
    module = Still().double()
    start = weights(module)
    fit(DeviceNoise([DeviceVariation(0.5)]), module=module)
    for name, weight in weights(module).items():
        torch.testing.assert_close(weight, start[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"layers": ["l1", "l4"]}, {"l1", "l4"}),
        ({"stages": [1]}, {"l2", "l3"}),
        ({"stages": [0, 1], "layers": ["l[13]"]}, {"l1", "l3"}),
        ({"from_step": 3}, set()),
        ({"until_step": 0}, set()),
        # The step after which the noise ends has none.
        ({"from_step": 2, "until_step": 2}, set()),
        ({"from_step": 2, "until_step": 3}, {"l1", "l2", "l3", "l4"}),
    ],
)
def test_only_the_named_layers_and_stages_and_steps(options, expected):
    """Check one epoch, which has the global steps 0, 1 and 2."""
    module = Still().double()
    start = weights(module)
    module, trainer = fit(DeviceNoise([WriteNoise(0.1)], **options), module=module, max_epochs=1)
    changed = {name for name, weight in weights(module).items() if not torch.equal(weight, start[name])}
    assert changed == expected
    logged = {name.removeprefix("noise/") for name in trainer.logged_metrics if name.startswith("noise/")}
    assert logged == expected


@pytest.mark.parametrize("noise", [WriteNoise(0.01), StuckAt(0.5), ReadNoise(0.01)])
def test_own_seed_and_no_other_random_numbers(noise):
    """Check the default seed, which is 0, and the seeds 0 and 1. Stuck devices depend on the seed as well."""
    runs = []
    for seed in ({}, {"seed": 0}, {"seed": 1}):
        L.seed_everything(4)
        module, _ = fit(DeviceNoise([noise], **seed), module=Attributes().double(), max_epochs=1, limit_train_batches=1)
        runs.append((weights(module)["l1"], torch.rand(()).item()))
    assert torch.equal(runs[0][0], runs[1][0])
    assert not torch.equal(runs[0][0], runs[2][0])
    assert runs[0][1] == runs[2][1]


def test_logs_how_far_weights_were_moved():
    L.seed_everything(4)
    module, trainer = fit(DeviceNoise([StuckAt(1.0, 0.0)], layers=["l1"]), module=Attributes().double())
    assert torch.equal(module.l1.weight, torch.zeros_like(module.l1.weight))
    # The whole weight was moved to zero.
    assert trainer.logged_metrics["noise/l1"] == pytest.approx(1.0)


def test_the_noise_of_a_stage_is_the_root_mean_square_over_its_layers():
    _, trainer = fit(DeviceNoise([WriteNoise(0.1)]), max_epochs=1)
    logged = trainer.logged_metrics
    assert logged["noise/l1"] != logged["noise/l2"]
    for stage, layers in enumerate([["l1"], ["l2", "l3"], ["l4"]]):
        squares = [logged[f"noise/{name}"] ** 2 for name in layers]
        assert logged[f"devices/noise_stage_{stage}"] == pytest.approx((sum(squares) / len(squares)) ** 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fast",), "noise is a list of kinds of noise, such as WriteNoise(0.01), got the string 'fast'"),
        (([],), "noise is empty, and DeviceNoise needs at least one kind of noise"),
        (([Drift(0.1)], [0.5]), "stages is a list of whole numbers, got [0.5]"),
        (([Drift(0.1)], [0, -1]), "each of stages must be a whole number of at least 0, got -1"),
        (([Drift(0.1)], None, ["*"], -1), "from_step must be a whole number of at least 0, got -1"),
        (([Drift(0.1)], None, ["*"], 3, 2), "until_step must be a whole number of at least 3, got 2"),
        (
            ([Drift(0.1)], None, ["*"], 0, 1, -1),
            "seed must be a whole number of at least 0 and at most 4294967295, got -1",
        ),
    ],
)
def test_messages_name_the_argument_and_what_is_allowed(arguments, message):
    with pytest.raises(UsageError) as error:
        DeviceNoise(*arguments)
    assert str(error.value) == message


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["sync", "async"])
def test_resume_continues_the_noise(schedule, tmp_path):
    runs = []
    for halves in (False, True):
        L.seed_everything(4)
        module = Attributes().double()
        strategy = {"num_stages": 3, "schedule": schedule, "num_microbatches": 4, "split_at": ["l2", "l4"]}
        make = lambda strategy=strategy: AnalogPipelineStrategy(**strategy)  # noqa: E731
        noise = lambda: DeviceNoise([WriteNoise(0.01), DeviceVariation(0.2), StuckAt(0.1)])  # noqa: E731
        if halves:
            _, trainer = fit(noise(), make(), module, max_epochs=1)
            trainer.save_checkpoint(tmp_path / "half.ckpt")
            L.seed_everything(2)
            trainer = make_trainer(make(), callbacks=[noise()], max_epochs=2)
            trainer.fit(module, loader(module, shuffle=False), ckpt_path=tmp_path / "half.ckpt")
        else:
            fit(noise(), make(), module, max_epochs=2)
        runs.append(weights(module))
    for name, weight in runs[0].items():
        assert torch.equal(weight, runs[1][name])


def attached(noise, rank, *others):
    """Attach a noise callback to the process of a rank among others, whose values it gathers after its own."""
    noise._strategy = SimpleNamespace(
        is_multiprocess=bool(others),
        num_stages=1 + len(others),
        global_rank=rank,
        gather=lambda value: [value, *(other(value) for other in others)],
    )
    return noise


def test_the_state_is_that_of_all_processes():
    noise = DeviceNoise([WriteNoise(0.1)], seed=5)
    noise._moved["l1"], noise._updated_at[0] = (3.0, 2, 2.0), 7
    state = {"generators": [Generator().manual_seed(5).get_state()], "moved": {"l1": (3.0, 2, 2.0)}}
    assert_equal(noise.state_dict(), state | {"updated_at": {0: 7}})

    def other(value):
        if isinstance(value, torch.Tensor):
            return value + 1
        return {"l2": (1.0, 1, 1.0)} if value is noise._moved else {1: 8}

    both = {"generators": [state["generators"][0], state["generators"][0] + 1], "updated_at": {0: 7, 1: 8}}
    both["moved"] = {"l1": (3.0, 2, 2.0), "l2": (1.0, 1, 1.0)}
    assert_equal(attached(noise, 0, other).state_dict(), both)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(map(torch.equal, found["generators"], expected["generators"]))
    assert len(found["generators"]) == len(expected["generators"])
    assert (found["moved"], found["updated_at"]) == (expected["moved"], expected["updated_at"])


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_state_is_loaded_by_as_many_processes_or_by_others(num_processes):
    """Check that generators go on where each was, or with new numbers if there are more or fewer processes."""
    states = [Generator().manual_seed(seed).get_state() for seed in (3, 4, 5)]
    moved, updated_at = {"l1": (3.0, 2, 2.0)}, {0: 7}

    def drawn(rank, states):
        noise = attached(DeviceNoise([WriteNoise(0.1)]), rank, *[None] * (num_processes - 1))
        noise.load_state_dict({"generators": states, "moved": moved, "updated_at": updated_at})
        assert (noise._moved, noise._updated_at) == (moved, updated_at)
        return torch.rand((), generator=noise._generator).item()

    known = [torch.rand((), generator=Generator().manual_seed(seed)).item() for seed in (3, 4, 5)]
    ranks = range(num_processes)
    assert [drawn(rank, states[:num_processes]) for rank in ranks] == known[:num_processes]
    for others in (states, states[: 3 - num_processes], states[1:][: 3 - num_processes]):
        new = [drawn(rank, others) for rank in ranks]
        assert new == [drawn(rank, others) for rank in ranks]
        assert len({*new, *known}) == num_processes + 3
    # The first generator that was saved decides.
    assert drawn(0, states) != drawn(0, [*reversed(states)])


def test_an_evaluation_loads_no_state():
    noise = DeviceNoise([WriteNoise(0.1)])
    noise.load_state_dict({})
    assert noise._generator.initial_seed() == 0


def test_read_noise_in_both_products():
    """Check that outputs get noise of σ‖x‖ and errors independent noise of σ‖δ‖, and that the weights stay."""
    seen = {}

    class Probe(MLP):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(400, 300, bias=False), nn.Linear(300, 300, bias=False))

        def training_step(self, batch):
            seen["out"] = self.net(batch)
            return (seen["out"] * error).sum()

        def on_before_optimizer_step(self, optimizer):
            # With one sample the gradient is the outer product of the error from layer 1 and the input.
            seen["sent"] = self.net[0].weight.grad @ x[0] / x[0].square().sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    torch.manual_seed(0)
    module = Probe().double()
    error, x = torch.randn(300).double(), torch.randn(1, 400).double()
    start = weights(module)
    strategy = AnalogPipelineStrategy(1, "async", 1)
    noise = DeviceNoise([ReadNoise(0.05)], layers=["net.1"])
    fit(noise, strategy, module, DataLoader([x], batch_size=None), max_epochs=1, accelerator="cpu")
    assert all(torch.equal(weight, start[name]) for name, weight in weights(module).items())
    hidden, weight = F.linear(x, module.net[0].weight), module.net[1].weight
    forward = (seen["out"] - F.linear(hidden, weight))[0] / (0.05 * hidden.norm())
    backward = (seen["sent"] - error @ weight) / (0.05 * error.norm())
    # Of 300 values of N(0, 1), five sigma of the spread are 0.204, of the mean and of the correlation 0.289.
    for added in (forward, backward):
        assert abs(added.std() - 1) < 0.204
        assert abs(added.mean()) < 0.289
    assert abs(torch.corrcoef(torch.stack([forward, backward]))[0, 1]) < 0.289


@pytest.mark.parametrize(
    ("layer", "shape", "options", "factors"),
    [
        (nn.Linear(5, 3, bias=False), (4, 5), {}, (1.5, 3.0)),
        (nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False), (4, 2, 6, 6), {}, (1.5, 3.0)),
        (nn.Linear(5, 3, bias=False), (4, 5), {"from_step": 1}, (1.0, 1.0)),
        (nn.Linear(5, 3, bias=False).eval(), (4, 5), {}, (1.0, 1.0)),
    ],
)
def test_read_noise_changes_the_weights_of_products(layer, shape, options, factors):
    """Check noise that is half the weight in forwards and twice the weight in backwards, and where there is none."""
    seen, parts = {}, cycle((0.5, 2.0))

    class Known(ReadNoise):
        def draw(self, weight, generator):
            return next(parts) * weight

    class Probe(MLP):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(layer)

        def training_step(self, batch):
            seen["x"] = batch.clone().requires_grad_()
            seen["out"] = self.net(seen["x"])
            return seen["out"].square().sum()

        def on_before_optimizer_step(self, optimizer):
            seen["gradients"] = [seen["x"].grad.clone(), layer.weight.grad.clone()]

    module = Probe().double()
    data = DataLoader([torch.randn(shape).double()], batch_size=None)
    clean = layer_weight(layer)
    strategy = AnalogPipelineStrategy(1, "async", 1)
    noise = DeviceNoise([Known(0.0)], **options)
    _, trainer = fit(noise, strategy, module, data, max_epochs=1, accelerator="cpu")
    x, weight = seen["x"].detach().requires_grad_(), clean.requires_grad_()
    torch.testing.assert_close(seen["out"], product(layer, x, factors[0] * weight))
    error = 2 * seen["out"].detach()
    (in_x,) = torch.autograd.grad(product(layer, x, factors[1] * weight), x, error)
    (in_weight,) = torch.autograd.grad(product(layer, x, weight), weight, error)
    torch.testing.assert_close(seen["gradients"], [in_x, in_weight])
    # The log has the noise of the forward, relative to the weight.
    names = () if factors == (1.0, 1.0) else ("noise/net.0", "devices/noise_stage_0")
    assert trainer.logged_metrics == {name: pytest.approx(0.5) for name in names}


@pytest.mark.parametrize("after_a_fit", [False, True])
def test_needs_a_pipeline(after_a_fit):
    noise = DeviceNoise([ReadNoise(0.5)])
    if after_a_fit:
        fit(noise, max_epochs=1, limit_train_batches=1)
    with pytest.raises(UsageError, match=r"DeviceNoise .* the strategy is SingleDeviceStrategy"):
        fit(noise, "auto")


def test_read_noise_ends_with_the_fit():
    module, _ = fit(DeviceNoise([ReadNoise(0.5)]))
    assert not any(layer._forward_hooks for layer in weight_layers(module).values())


def test_on_analog_tiles():
    module = MLP()
    data = DataLoader([(x.float(), y) for x, y in loader(module).dataset], batch_size=8)
    strategy = AnalogPipelineStrategy(5, "async", 4, device="soft_bounds")
    noise = DeviceNoise([StuckAt(1.0, 0.25), ReadNoise(0.01)], layers=["net.4"])
    fit(noise, strategy, module, data, precision="32-true", max_epochs=1)
    tile = analog_layers(module)[2]
    torch.testing.assert_close(tile.get_weights()[0], torch.full((8, 8), 0.25))
    assert analog_layers(module)[1].get_weights()[0].std() > 0.05


def test_one_kind_of_noise_needs_no_list():
    noise = WriteNoise(0.1)
    assert DeviceNoise(noise).noise == DeviceNoise([noise]).noise == [noise]
    assert repr([noise, ReadNoise(0.2), Drift(0.3)]) == (
        "[WriteNoise(std=0.1), ReadNoise(std=0.2), Drift(nu=0.3, t0=1.0)]"
    )


def arrays():
    device = soft_bounds(write_noise=5.0, perfect_io=True)
    device.rpu_config.mapping.max_input_size = device.rpu_config.mapping.max_output_size = 3
    return device


@pytest.mark.parametrize(
    "device",
    [
        soft_bounds(perfect_io=True),
        reram_sb(),
        mixed_precision(),
        weight_scaling(soft_bounds(tau=1.0, perfect_io=True)),
        weight_scaling(mixed_precision(soft_bounds(tau=1.0, write_noise=2.0))),
        arrays(),
    ],
    ids=str,
)
def test_noise_without_spread_changes_nothing(device):
    """Write noise must not accumulate, and the scales between a crossbar and its layer must not change."""
    ends = []
    for callbacks in ([], [DeviceNoise([WriteNoise(0.0)])]):
        L.seed_everything(1, verbose=False)
        module = MLP()
        before = {name: layer_weight(layer) for name, layer in weight_layers(module).items()}
        data = DataLoader([(x.float(), y) for x, y in loader(module).dataset], batch_size=8)
        strategy = AnalogPipelineStrategy(1, "none", 1, device=device)
        make_trainer(strategy, callbacks=callbacks, precision="32-true", max_epochs=2).fit(module, data)
        tiles = [tile for layer in analog_layers(module) for tile in layer.analog_tiles()]
        scales = [torch.ones(1) if tile.get_scales() is None else tile.get_scales() for tile in tiles]
        ends.append([*(tile.tile.crossbar.weight for tile in tiles), *(t.tile.crossbar.hidden for t in tiles), *scales])
        assert all((layer_weight(layer) != before[name]).any() for name, layer in weight_layers(module).items())
    torch.testing.assert_close(*ends, rtol=0, atol=1e-5)


def test_noise_on_a_device_with_write_noise_moves_the_weights_below():
    """Check that the write noise stays what it was, and that noise moves the weights without it, up to the bounds."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(40, 30))
    convert_to_analog(network, soft_bounds(tau=0.6, write_noise=5.0))
    crossbar = network.get_submodule("0.analog_module").tile.crossbar
    persistent = crossbar.extra()["persistent_weights"]
    noise, change = crossbar.weight - persistent, torch.randn(30, 40)
    move_weight(network[0], layer_weight(network[0]) + change)
    expected = (persistent + change).clamp(-0.6, 0.6)
    torch.testing.assert_close(crossbar.extra()["persistent_weights"], expected)
    torch.testing.assert_close(crossbar.weight - expected, noise, rtol=0, atol=1e-6)


@pytest.mark.parametrize("noise", [WriteNoise(0.1), ReadNoise(0.1)])
def test_write_noise_of_aihwkits_tiles_is_not_erased(noise):
    module = MLP()
    data = DataLoader([(x.float(), y) for x, y in loader(module).dataset], batch_size=8)
    strategy = AnalogPipelineStrategy(1, "none", 1, device=reram_sb(backend="aihwkit"))
    trainer = make_trainer(strategy, callbacks=[DeviceNoise([noise])], precision="32-true", max_steps=1)
    refusal = pytest.raises(UsageError, match=r"the state of write noise on aihwkit's tiles, of layer 'net\.0'")
    with refusal if isinstance(noise, WriteNoise) else nullcontext():
        trainer.fit(module, data)
