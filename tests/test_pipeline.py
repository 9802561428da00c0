"""The one-process runner against a numpy recomputation, whole-batch autograd and the closed forms."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from aihwkit.optim import AnalogSGD
from reference import delayed_updates
from torch import nn

from aimc_pl.devices import convert_to_analog
from aimc_pl.devices.weights import read_gradients
from aimc_pl.microbatch import split_batch
from aimc_pl.partition import partition
from aimc_pl.pipeline import Observer, Pipeline
from aimc_pl.schedule import Schedule
from aimc_pl.stage import Stage

LAYERS = 8
LEARNING_RATE = 1.0


class Sample:
    """A micro-batch with a squared error."""

    def __init__(self, x, target, weight):
        self.x, self.target, self.weight = x, target, weight

    def enter(self):
        return (self.x,)

    def leave(self, outputs):
        loss = nn.functional.mse_loss(outputs, self.target)
        return loss, torch.full_like(loss, self.weight)

    def entered(self, gradients):
        assert gradients == (None,)


class Recorder(Observer):
    def __init__(self):
        self.forwards, self.backwards, self.updates = [], [], []

    def on_forward(self, event):
        self.forwards.append(event)

    def on_backward(self, event):
        self.backwards.append(event)

    def on_update(self, event):
        self.updates.append(event)


def make_network(dtype=torch.float64):
    torch.manual_seed(0)
    sizes = [5, 7, 6, 7, 6, 7, 6, 7, 3]
    layers = []
    for features, following in pairwise(sizes):
        layers += [nn.Linear(features, following), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def make_batches(num_batches, size=11, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size - i, 5, generator=generator, dtype=torch.float64).to(dtype),
            torch.randn(size - i, 3, generator=generator, dtype=torch.float64).to(dtype),
        )
        for i in range(num_batches)
    ]


def to_samples(batch, num_microbatches):
    return [Sample(*part, len(part[0]) / len(batch[0])) for part in split_batch(batch, num_microbatches)]


def split_evenly(num_stages):
    """The names of the layers with which stages 1 … M−1 begin, layers spread evenly."""
    owners = owners_of(num_stages)
    return [str(2 * owners.index(stage)) for stage in range(1, num_stages)]


def owners_of(num_stages):
    return [stage for stage, part in enumerate(np.array_split(np.arange(LAYERS), num_stages)) for _ in part]


def make_stages(network, num_stages, example, **kwargs):
    parts = partition(network, num_stages, (example,), split_at=split_evenly(num_stages))
    return [Stage(index, part, **kwargs) for index, part in enumerate(parts.stages)]


def train_async(network, num_stages, num_microbatches, duplex, batches, drain_after, observers=(), **kwargs):
    """Train with one SGD per stage; returns the numbers of micro-batches before which the pipeline drained."""
    stages = make_stages(network, num_stages, batches[0][0], delayed=True, **kwargs)
    optimizers = [AnalogSGD(stage.parameters, lr=LEARNING_RATE) for stage in stages]

    def update(stage):
        optimizers[stage.index].step()
        optimizers[stage.index].zero_grad()

    pipeline = Pipeline(stages, Schedule("async", num_stages, num_microbatches, duplex), update, observers)
    drains = []
    for index, batch in enumerate(batches):
        pipeline.run(to_samples(batch, num_microbatches))
        if index in drain_after:
            pipeline.drain()
            drains.append(pipeline.num_entered)
    pipeline.drain()
    return drains


def numpy_parameters(network):
    """Weights and biases, layer by layer."""
    linears = [layer for layer in network if isinstance(layer, nn.Linear)]
    copies = [[p.detach().double().numpy().copy() for p in layer.parameters()] for layer in linears]
    return list(zip(*copies, strict=True))


def recompute(parameters, num_stages, num_microbatches, duplex, batches, drains, **kwargs):
    microbatches = [
        (sample.x.double().numpy(), sample.target.double().numpy(), sample.weight)
        for batch in batches
        for sample in to_samples(batch, num_microbatches)
    ]
    delays = [(num_stages - 1 - stage) * (2 if duplex == "full" else 1) for stage in range(num_stages)]
    return delayed_updates(*parameters, owners_of(num_stages), microbatches, delays, LEARNING_RATE, drains, **kwargs)


@pytest.mark.parametrize("duplex", ["half", "full"])
@pytest.mark.parametrize("num_stages", range(1, 9))
def test_async_equals_recomputation(num_stages, duplex):
    for num_microbatches in range(1, 9):
        network = make_network()
        batches = make_batches(4)
        start = numpy_parameters(network)
        drains = train_async(network, num_stages, num_microbatches, duplex, batches, drain_after={1})
        expected = recompute(start, num_stages, num_microbatches, duplex, batches, drains[:1])
        for ours, reference in zip(numpy_parameters(network), expected, strict=True):
            for a, b in zip(ours, reference, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("duplex", ["half", "full"])
def test_weight_stashing_equals_recomputation(duplex):
    network = make_network()
    batches = make_batches(4)
    start = numpy_parameters(network)
    train_async(network, 4, 3, duplex, batches, drain_after=(), weight_stashing=True)
    stashed = recompute(start, 4, 3, duplex, batches, (), stashing=True)
    current = recompute(start, 4, 3, duplex, batches, ())
    ours = numpy_parameters(network)[0]
    for a, b in zip(ours, stashed[0], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-13)
    assert max(np.abs(a - b).max() for a, b in zip(ours, current[0], strict=True)) > 1e-4


@pytest.mark.parametrize("duplex", ["half", "full"])
@pytest.mark.parametrize("num_stages", [1, 2, 4, 8])
def test_async_on_floating_point_tiles_equals_recomputation(num_stages, duplex):
    network = make_network(torch.float32)
    start = numpy_parameters(network)
    convert_to_analog(network, "ideal")
    batches = make_batches(4, dtype=torch.float32)
    drains = train_async(network, num_stages, 3, duplex, batches, drain_after={1})
    expected = recompute(start, num_stages, 3, duplex, batches, drains[:1])
    tiles = [layer for layer in network if hasattr(layer, "get_weights")]
    assert len(tiles) == LAYERS
    for tile, weight, bias in zip(tiles, *expected, strict=True):
        ours = tile.get_weights()
        np.testing.assert_allclose(ours[0].numpy(), weight, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(ours[1].detach().numpy(), bias, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("duplex", ["half", "full"])
@pytest.mark.parametrize("num_stages", [1, 3, 8])
def test_observed_versions_and_staleness_are_the_closed_forms(num_stages, duplex):
    recorder = Recorder()
    batches = make_batches(5)
    drains = train_async(make_network(), num_stages, 3, duplex, batches, {1}, [recorder])
    schedule = Schedule("async", num_stages, 3, duplex)
    fill = drains[0]
    for event in recorder.forwards:
        m, k = event.stage.index, event.microbatch
        base = fill if k >= fill else 0
        assert event.version == base + schedule.version(m, k - base)
    for event in recorder.updates:
        m, k = event.stage.index, event.microbatch
        assert event.version == k
        assert event.staleness == schedule.staleness(m, k - fill if k >= fill else k)
    assert Counter(event.stage.index for event in recorder.updates) == dict.fromkeys(range(num_stages), 15)


@pytest.mark.parametrize("name", ["none", "sync", "1f1b"])
@pytest.mark.parametrize(("num_stages", "num_microbatches"), [(1, 1), (2, 4), (3, 2), (4, 5), (8, 3)])
def test_gradients_equal_those_of_the_whole_batch(name, num_stages, num_microbatches):
    (x, target), *_ = make_batches(1)
    reference = make_network()
    nn.functional.mse_loss(reference(x), target).backward()
    network = make_network()
    schedule = Schedule(name, num_stages, num_microbatches)
    recorder = Recorder()
    pipeline = Pipeline(make_stages(network, num_stages, x), schedule, pytest.fail, [recorder])
    pipeline.run(to_samples((x, target), num_microbatches))
    pipeline.updated()
    assert pipeline.is_empty
    assert pipeline.clock == 2 * (
        num_stages * num_microbatches if name == "none" else num_stages + num_microbatches - 1
    )
    assert [event.staleness for event in recorder.updates] == [0] * num_stages
    for ours, theirs in zip(network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("name", "duplex"), [("none", "half"), ("sync", "half"), ("1f1b", "half"), ("async", "half"), ("async", "full")]
)
def test_stages_hold_no_more_than_the_closed_form(name, duplex):
    schedule = Schedule(name, 4, 6, duplex)
    batches = make_batches(3)
    most = Counter()

    class Holding(Observer):
        def on_forward(self, event):
            most[event.stage.index] = max(most[event.stage.index], event.stage.num_in_flight)

    stages = make_stages(make_network(), 4, batches[0][0])
    pipeline = Pipeline(stages, schedule, lambda stage: None, [Holding()])
    for batch in batches:
        pipeline.run(to_samples(batch, 6))
        if name != "async":
            pipeline.updated()
    pipeline.drain()
    total = 18 if name == "async" else 6
    assert most == {m: schedule.in_flight(m, total) for m in range(4)}


@pytest.mark.parametrize("num_microbatches", [2, 11])
def test_gradients_on_floating_point_tiles_equal_those_of_the_whole_batch(num_microbatches):
    """Micro-batches of one sample too, whose errors autograd shares with the gradients of the biases."""
    (x, target), *_ = make_batches(1, dtype=torch.float32)
    reference = make_network(torch.float32)
    nn.functional.mse_loss(reference(x), target).backward()
    network = make_network(torch.float32)
    convert_to_analog(network, "ideal")
    pipeline = Pipeline(make_stages(network, 4, x), Schedule("sync", 4, num_microbatches), pytest.fail)
    pipeline.run(to_samples((x, target), num_microbatches))
    for layer, theirs in zip(network, reference, strict=True):
        if isinstance(theirs, nn.Linear):
            ours = read_gradients(layer, layer.parameters())
            expected = torch.cat([theirs.weight.grad.flatten(), theirs.bias.grad])
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_abandon_forgets_what_is_in_flight():
    batches = make_batches(1)
    stages = make_stages(make_network(), 4, batches[0][0], delayed=True)
    pipeline = Pipeline(stages, Schedule("async", 4, 2), lambda stage: None)
    pipeline.run(to_samples(batches[0], 2))
    assert not pipeline.is_empty
    pipeline.abandon()
    assert pipeline.is_empty
    assert [stage.num_in_flight for stage in stages] == [0] * 4


def test_stages_must_fit_the_schedule():
    with pytest.raises(ValueError, match="schedule is for 3 stages, got 1"):
        Pipeline([Stage(0, nn.Linear(1, 1))], Schedule("sync", 3), lambda stage: None)
