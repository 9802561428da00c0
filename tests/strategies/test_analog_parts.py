"""These tests check what the strategy does for analog layers, with aihwkit and as if it was not installed."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from aihwkit.optim import AnalogSGD
from lightning.pytorch.plugins import Precision
from lightning.pytorch.plugins.precision import DoublePrecision
from lightning_modules import make_trainer
from torch import nn
from torch.serialization import get_safe_globals
from torch.utils.data import DataLoader, TensorDataset

from aimc_pl.analog import is_analog
from aimc_pl.devices import analog_layers, convert_to_analog, ideal, mixed_precision, soft_bounds
from aimc_pl.devices.checkpoint import AnalogCheckpoint, classes_of_tiles
from aimc_pl.errors import UsageError
from aimc_pl.strategies import AnalogPipelineStrategy, analog_parts

CPU = torch.device("cpu")


def network(device=None):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    if device is not None:
        convert_to_analog(net, device)
    return net


@pytest.fixture
def told(monkeypatch):
    """Return the list of the lines that are printed."""
    lines = []
    monkeypatch.setattr(analog_parts, "rank_zero_info", lines.append)
    return lines


def convert(net, device, split_at=(), stashes=False, root=CPU, precision=None):
    settings = SimpleNamespace(split_at=split_at, weight_stashing=stashes)
    analog_parts.convert(net, device, settings, root, precision or Precision())


@pytest.mark.parametrize("device", ["ideal", {"0": "ideal"}, {1: "ideal"}])
def test_layers_are_converted_once_and_said(device):
    net = network()
    convert(net, device, split_at=["2"])
    chosen = {"ideal": [net[0], net[2]], "0": [net[0]], 1: [net[2]]}[
        device if device == "ideal" else next(iter(device))
    ]
    assert analog_layers(net) == chosen
    line = analog_parts.describe(net)
    assert line.startswith(f"{len(chosen)} of 2 layers analog (ideal)")
    convert(net, device, split_at=["2"])
    assert analog_parts.describe(net) == line


def test_digital_networks_stay_as_they_are(told):
    net = network()
    convert(net, None, stashes=True)
    optimizer = torch.optim.Adam(net.parameters())
    analog_parts.convert_optimizer(net, optimizer)
    assert type(optimizer) is torch.optim.Adam
    assert (analog_layers(net), told) == ([], [])
    assert analog_parts.seal(net) == {}
    state = net.state_dict()
    assert analog_parts.saved(state).keys() == state.keys()


def test_what_tiles_cannot_do_is_refused():
    """Check two sets of weights, another type than float32, and a GPU, with layers that are analog already."""
    with pytest.raises(UsageError, match=r"^weight_stashing is for digital networks: a crossbar cannot"):
        convert(network("ideal"), None, stashes=True)
    with pytest.raises(UsageError, match="tiles compute in float32"):
        convert(network(soft_bounds()), None, precision=DoublePrecision())
    with pytest.raises(UsageError, match="for cuda"):
        convert(network(soft_bounds(backend="aihwkit")), None, root=torch.device("cuda"))


@pytest.mark.parametrize(("make", "lines"), [(torch.optim.SGD, 0), (torch.optim.Adam, 1)])
def test_the_optimizer_updates_tiles(make, lines, told):
    net = network({"0": ideal()})
    optimizer = make(net.parameters(), lr=0.5)
    analog_parts.convert_optimizer(net, optimizer)
    assert len(told) == lines
    assert all(line.startswith("1 analog layer learns by pulses, at the learning rate 0.5: ") for line in told)
    before = net[0].get_weights()[0].clone()
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(net[0].get_weights()[0], before)


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_tiles_have_a_learning_rate_of_their_own(scale, told):
    """Check tiles with exact updates against −lr·scale·gradient, beside AdamW, in two steps with a scheduler."""
    net, twin = network({"0": ideal()}), network()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    analog_parts.convert_optimizer(net, optimizer, scale)
    assert f"at the learning rate {0.01 * scale:g}: " in told[0]
    for rate in (0.01, 0.005):
        weight, bias = (value.detach().clone() for value in net[0].get_weights())
        twin[0].load_state_dict({"weight": weight, "bias": bias})
        twin[2].load_state_dict(net[2].state_dict())
        x = torch.tensor([[0.5, -1.0, 2.0]])
        twin.zero_grad()
        for each in (net, twin):
            each(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.param_groups[0]["lr"] == rate
        expected = weight - rate * scale * twin[0].weight.grad
        torch.testing.assert_close(net[0].get_weights()[0], expected, rtol=1e-5, atol=1e-6)
        scheduler.step()


@pytest.mark.parametrize("device", [None, {"0": mixed_precision(soft_bounds())}])
def test_a_rate_for_pulses_needs_layers_that_learn_by_them(device):
    net = network(device)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with pytest.raises(UsageError, match="analog_lr_scale=3 is for layers that learn by pulses, and there are none"):
        analog_parts.convert_optimizer(net, optimizer, 3.0)


FILTERS = {
    "all": (lambda name: True, None, 2),
    "the last layer": (lambda name: name.startswith("4"), "0, 2", 0),
    "by usual names": (lambda name: "weight" in name or "bias" in name, "0, 2", 0),
    "one of two tiles": (lambda name: "array.1" not in name, "0", 2),
    "only contexts": (lambda name: "analog_ctx" in name, "4", 2),
    "one frozen": (lambda name: name.startswith("0"), "4", 1),
}
"""What the optimizer has, the analog layers that it does not have, and the number of those that learn by pulses."""


@pytest.mark.parametrize("case", FILTERS)
def test_layers_that_are_not_in_the_optimizer_are_named(case, told, recwarn):
    """Check a layer of two tiles, one of one tile, and one in mixed precision."""
    has, left_out, number = FILTERS[case]
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    config = soft_bounds().rpu_config
    config.mapping.max_input_size = 2
    convert_to_analog(net, {"0": config, "2": "ideal", "4": mixed_precision()})
    net[2].requires_grad_(case != "one frozen")
    optimizer = torch.optim.Adam([p for name, p in net.named_parameters() if has(name)], 0.1)
    analog_parts.convert_optimizer(net, optimizer)
    line = f"analog layers that are not in the optimizer do not learn: {left_out}. Give it parameters(), or "
    assert [str(warning.message)[: len(line)] for warning in recwarn] == [line] * (left_out is not None)
    assert [said.partition(" ")[0] for said in told] == [str(number)] * (number > 0)


class FirstAndLast(L.LightningModule):
    """A module whose optimizer has two of four layers. After every mini-batch it counts the pairs of the others."""

    def __init__(self):
        super().__init__()
        widths = [6, 8, 8, 8]
        self.layers = nn.ModuleList([nn.Linear(a, b) for a, b in pairwise(widths)])
        self.head = nn.Linear(8, 3)
        self.pairs = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return nn.functional.cross_entropy(self.head(x), y)

    def on_train_batch_end(self, *args):
        self.pairs += [len(p.analog_grad_output) for p in self.layers[1:].parameters() if is_analog(p)]

    def configure_optimizers(self):
        first, head = self.layers[0].parameters(), self.head.parameters()
        return torch.optim.SGD([{"params": first, "lr": 0.05}, {"params": head}], lr=0.1)


def fit_first_and_last(schedule, device, num_stages, accumulate):
    """Train, and return the module and the weights of all layers."""
    torch.manual_seed(1)
    module = FirstAndLast()
    data = DataLoader(TensorDataset(torch.randn(24, 6), torch.randint(3, (24,))), 8)
    split_at = ["layers.1", "layers.2"][: num_stages - 1]
    strategy = AnalogPipelineStrategy(num_stages, schedule, 2, device, split_at)
    options = {"max_epochs": 2, "accumulate_grad_batches": accumulate}
    make_trainer(strategy, precision="32-true", **options).fit(module, data)
    return module, [value for layer in (*module.layers, module.head) for value in weights_of(layer)]


# The run warns of the layers that the test leaves out.
@pytest.mark.filterwarnings("ignore:analog layers that are not in the optimizer do not learn. layers.1, layers.2. Give")
@pytest.mark.parametrize(
    ("schedule", "num_stages", "accumulate"),
    [("none", 1, 1), ("sync", 3, 1), ("sync", 3, 3), ("1f1b", 3, 1), ("zero_bubble", 3, 1), ("async", 3, 1)],
)
def test_layers_that_are_not_in_the_optimizer_keep_nothing(schedule, num_stages, accumulate):
    """Check the weights against digital training with the same optimizer, with crossbars that compute exactly."""
    _, expected = fit_first_and_last(schedule, None, num_stages, accumulate)
    module, weights = fit_first_and_last(schedule, ideal(), num_stages, accumulate)
    assert module.pairs == [0] * 2 * 6
    for a, b in zip(weights, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class SkipsSteps(FirstAndLast):
    """A module that leaves out some steps, as code does whose gradients are not finite."""

    kind: Any = torch.optim.SGD
    skipped: tuple[int, ...] = ()
    keeps = False

    def configure_optimizers(self):
        return self.kind(self.parameters(), lr=0.1)

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure: Any):
        if batch_idx in self.skipped:
            optimizer_closure()
        else:
            optimizer.step(closure=optimizer_closure)

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        if not (self.keeps and batch_idx - 1 in self.skipped):
            optimizer.zero_grad()


def fit_skipping(device, schedule, skipped, batches, accumulate=1, keeps=False, optimizer=torch.optim.SGD):
    torch.manual_seed(1)
    module = SkipsSteps()
    module.skipped, module.keeps, module.kind = skipped, keeps, optimizer
    torch.manual_seed(2)
    x, y = torch.randn(8 * 6, 6).split(8), torch.randint(3, (8 * 6,)).split(8)
    data = [(x[number], y[number]) for number in batches]
    num_stages = 1 if schedule == "none" else 3
    strategy = AnalogPipelineStrategy(num_stages, schedule, 2, device, ["layers.1", "layers.2"][: num_stages - 1])
    options = {"max_epochs": 1, "accumulate_grad_batches": accumulate}
    make_trainer(strategy, precision="32-true", **options).fit(module, DataLoader(data, batch_size=None))
    return [value for layer in (*module.layers, module.head) for value in weights_of(layer)]


@pytest.mark.parametrize("schedule", ["none", "sync", "1f1b", "zero_bubble"])
def test_steps_that_are_left_out_leave_nothing_for_the_next(schedule):
    """Compare with a run without these mini-batches. Crossbars with perfect products draw random numbers in updates."""
    device = soft_bounds(perfect_io=True)
    expected = fit_skipping(device, schedule, (), [1, 4, 5])
    for a, b in zip(fit_skipping(device, schedule, (0, 2, 3), range(6)), expected, strict=True):
        assert torch.equal(a, b)
    expected = fit_skipping(device, schedule, (), [0, 1, 4, 5], accumulate=2)
    for a, b in zip(fit_skipping(device, schedule, (3,), range(6), accumulate=2), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
def test_accumulated_mini_batches_reach_tiles_in_their_order(schedule):
    device = soft_bounds(perfect_io=True)
    expected = fit_skipping(device, "sync", (), range(6), accumulate=3)
    for a, b in zip(fit_skipping(device, schedule, (), range(6), accumulate=3), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("wrapped", [False, True])
def test_zero_grad_drops_what_tiles_have_still_to_apply(wrapped):
    """Check the optimizer of a fit, and Lightning's wrapper of it."""
    left = []

    class Drops(SkipsSteps):
        def on_after_backward(self):
            contexts = [p for p in self.parameters() if is_analog(p)]
            left.append(sum(len(context.analog_grad_output) for context in contexts))
            (self.optimizers() if wrapped else self.trainer.optimizers[0]).zero_grad()
            left.append(sum(len(context.analog_grad_output) for context in contexts))

    x = torch.randn(8, 6), torch.randint(3, (8,))
    strategy = AnalogPipelineStrategy(2, "1f1b", 2, soft_bounds(), ["layers.1"])
    make_trainer(strategy, precision="32-true", max_epochs=1).fit(Drops(), DataLoader([x], batch_size=None))
    assert left == [2 * 4, 0]


@pytest.mark.parametrize("schedule", ["none", "sync", "1f1b", "zero_bubble"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, AnalogSGD])
def test_a_module_that_does_not_clear_gradients_keeps_them_for_tiles_too(schedule, optimizer):
    """Compare with digital training, with crossbars that compute exactly. The last skipped step leaves nothing."""
    arguments = schedule, (0, 2, 5), range(6)
    expected = fit_skipping(None, *arguments, keeps=True)
    others = fit_skipping(None, *arguments)
    for a, b, c in zip(
        fit_skipping(ideal(), *arguments, keeps=True, optimizer=optimizer), expected, others, strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(b, c, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("installed", [True, False])
def test_checkpoints_of_analog_layers(installed, monkeypatch):
    net = network(soft_bounds())
    asked = []
    if not installed:
        monkeypatch.setattr(analog_parts, "find_spec", asked.append)
    state, other = net.state_dict(), network("ideal").state_dict()
    contexts = {key for key in state if key.endswith("analog_ctx")}
    assert len(contexts) == 2
    assert analog_parts.saved(state).keys() == state.keys() - (contexts if installed else set())
    seal = analog_parts.seal(net)
    assert {key: type(value) for key, value in seal.items()} == ({"analog": AnalogCheckpoint} if installed else {})
    before = {*get_safe_globals()}
    with analog_parts.admitted_classes(net):
        added = {*get_safe_globals()} - before
    assert added == ({*classes_of_tiles(net)} - before if installed else set())
    analog_parts.check_devices(net, state)
    if installed:
        with pytest.raises(UsageError):
            analog_parts.check_devices(net, other)
    else:
        analog_parts.check_devices(net, other)
        assert {*asked} == {"aihwkit"}


def test_classes_of_own_tiles_are_admitted():
    """Check a device whose class the user has written."""
    net = network(soft_bounds())
    device = next(analog_layers(net)[0].analog_tiles()).rpu_config.device
    own = device.__class__ = type("Own", (type(device),), {})
    assert own not in get_safe_globals()
    with analog_parts.admitted_classes(net):
        assert own in get_safe_globals()
    assert own not in get_safe_globals()


class Convolutional(L.LightningModule):
    """A module that takes images of any size."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv1d(2, 3, 3, padding=1), nn.Conv1d(3, 4, 3)

    def training_step(self, batch, batch_idx):
        return self.second(torch.tanh(self.first(batch))).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit_sizes(device, schedule, num_microbatches, sizes):
    """Train with mini-batches of images of these sizes in turn, and return all weights."""
    torch.manual_seed(1)
    module, images = Convolutional(), [torch.randn(4, 2, sizes[number % len(sizes)]) for number in range(6)]
    strategy = AnalogPipelineStrategy(2, schedule, num_microbatches, device, ["second"])
    make_trainer(strategy, precision="32-true", max_epochs=1).fit(module, DataLoader(images, batch_size=None))
    return torch.cat([each.flatten() for layer in (module.first, module.second) for each in weights_of(layer)])


def weights_of(layer):
    return layer.get_weights() if hasattr(layer, "get_weights") else (layer.weight.detach(), layer.bias.detach())


def test_sizes_of_images_that_aihwkits_tiles_would_confuse_are_refused():
    """Check that a change of size is refused where a backward would meet the other size, and only there."""
    with pytest.raises(UsageError, match=r"images of another size reach 'first.analog_module' while others are under"):
        fit_sizes(ideal(), "async", 1, (12, 9))
    for schedule, sizes in (("1f1b", (12, 9)), ("sync", (12, 9)), ("async", (12,))):
        expected = fit_sizes(None, schedule, 2, sizes)
        torch.testing.assert_close(fit_sizes(ideal(), schedule, 2, sizes), expected, rtol=1e-5, atol=1e-6)


def test_an_analog_bias_of_a_convolution_is_left_out_of_pending_gradients():
    """Check that a fit runs. Its update was compared with a gradient that had a column too many."""
    perfect = soft_bounds(perfect_io=True).rpu_config
    perfect.mapping.digital_bias = False
    before, after = fit_sizes(None, "async", 2, (12,)), fit_sizes(perfect, "async", 2, (12,))
    assert after.shape == before.shape
    assert after.isfinite().all()
