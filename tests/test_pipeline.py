"""These tests compare the pipeline in one process with a numpy recomputation, with autograd and with closed forms."""

import gc
import weakref
from collections import Counter
from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch
from aihwkit.optim import AnalogSGD
from reference import delayed_updates
from staged import make_step
from torch import nn

from aimc_pl.devices import convert_to_analog
from aimc_pl.flight import Flight
from aimc_pl.microbatch import split_batch
from aimc_pl.pipeline import Observer, Pipeline
from aimc_pl.schedule import Schedule
from aimc_pl.stage import Stage
from aimc_pl.weights import read_gradients

LAYERS = 8
LEARNING_RATE = 1.0


def to_parts(batch, num_microbatches):
    """Return the micro-batches of a mini-batch with their weights."""
    return [(*part, len(part[0]) / len(batch[0])) for part in split_batch(batch, num_microbatches)]


def squared_error(network, x, target):
    return lambda: nn.functional.mse_loss(network(x), target)


def to_flights(step, batch, num_microbatches):
    return [
        Flight(step, squared_error(step.network, x, target), weight)
        for x, target, weight in to_parts(batch, num_microbatches)
    ]


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


def split_evenly(num_stages):
    """Return the names of the layers with which stages 1 … M−1 begin, for stages of nearly equal length."""
    owners = owners_of(num_stages)
    return [str(2 * owners.index(stage)) for stage in range(1, num_stages)]


def owners_of(num_stages):
    return [stage for stage, part in enumerate(np.array_split(np.arange(LAYERS), num_stages)) for _ in part]


def make_even_step(network, num_stages, batch, **kwargs):
    return make_step(network, split_evenly(num_stages), squared_error(network, *batch), **kwargs)


class SlowLinks(Schedule):
    """A schedule in which a message takes two clocks more to the next stage."""

    def forward_clock(self, stage, microbatch, num_microbatches=None):
        return super().forward_clock(stage, microbatch, num_microbatches) + 2 * stage

    def backward_clock(self, stage, microbatch, num_microbatches=None):
        return super().backward_clock(stage, microbatch, num_microbatches) + 2 * (2 * self.num_stages - 2 - stage)


def train_async(
    network, num_stages, num_microbatches, duplex, batches, drain_after, observers=(), kind=Schedule, **kwargs
):
    """Train with one SGD per stage and return the numbers of micro-batches before which the pipeline drained."""
    step = make_even_step(network, num_stages, batches[0], delayed=True, may_share=False, **kwargs)
    optimizers = [AnalogSGD(stage.parameters, lr=LEARNING_RATE) for stage in step.stages]

    def update(stage):
        optimizers[stage.index].step()
        optimizers[stage.index].zero_grad()

    pipeline = Pipeline(step.stages, kind("async", num_stages, num_microbatches, duplex), update, observers)
    drains = []
    with step.running():
        for index, batch in enumerate(batches):
            pipeline.run(to_flights(step, batch, num_microbatches))
            if index in drain_after:
                pipeline.drain()
                drains.append(pipeline.num_entered)
        pipeline.drain()
    return drains


def numpy_parameters(network):
    """Return weights and biases, layer by layer."""
    linears = [layer for layer in network if isinstance(layer, nn.Linear)]
    copies = [[p.detach().double().numpy().copy() for p in layer.parameters()] for layer in linears]
    return list(zip(*copies, strict=True))


def recompute(parameters, num_stages, num_microbatches, duplex, batches, drains, latency=0, **kwargs):
    microbatches = [
        (x.double().numpy(), target.double().numpy(), weight)
        for batch in batches
        for x, target, weight in to_parts(batch, num_microbatches)
    ]
    delays = [(num_stages - 1 - stage) * ((2 if duplex == "full" else 1) + latency) for stage in range(num_stages)]
    return delayed_updates(*parameters, owners_of(num_stages), microbatches, delays, LEARNING_RATE, drains, **kwargs)


@pytest.mark.slow
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


@pytest.mark.parametrize("num_stages", [2, 3, 5])
def test_a_schedule_of_ones_own_equals_recomputation(num_stages):
    network, batches = make_network(), make_batches(4)
    start = numpy_parameters(network)
    train_async(network, num_stages, 3, "half", batches, (), kind=SlowLinks)
    expected = recompute(start, num_stages, 3, "half", batches, (), latency=2)
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["none", "sync", "1f1b", "zero_bubble"])
@pytest.mark.parametrize(("num_stages", "num_microbatches"), [(1, 1), (2, 4), (3, 2), (4, 5), (8, 3)])
def test_gradients_equal_those_of_the_whole_batch(name, num_stages, num_microbatches):
    (x, target), *_ = make_batches(1)
    reference = make_network()
    nn.functional.mse_loss(reference(x), target).backward()
    network = make_network()
    schedule = Schedule(name, num_stages, num_microbatches)
    recorder = Recorder()
    step = make_even_step(network, num_stages, (x, target))
    pipeline = Pipeline(step.stages, schedule, pytest.fail, [recorder])
    with step.running():
        pipeline.run(to_flights(step, (x, target), num_microbatches))
    pipeline.updated()
    assert pipeline.is_empty
    assert pipeline.clock == schedule.num_cycles()
    assert [event.staleness for event in recorder.updates] == [0] * num_stages
    for ours, theirs in zip(network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["none", "sync", "1f1b", "zero_bubble"])
def test_observed_versions_are_the_closed_form_with_uneven_minibatches(name):
    """Check mini-batches of 3, 2 and 1 samples, which are split into as many micro-batches."""
    schedule, recorder = Schedule(name, 3, num_microbatches=2), Recorder()
    batches = make_batches(3, size=3)
    step = make_even_step(make_network(), 3, batches[0])
    pipeline = Pipeline(step.stages, schedule, pytest.fail, [recorder])
    with step.running():
        for batch in batches:
            pipeline.run(to_flights(step, batch, 3))
            pipeline.updated()
    updates = [0, 0, 0, 1, 1, 2]
    for event in recorder.forwards:
        since_fill = schedule.version(event.stage.index, event.since_fill)
        assert event.version == updates[event.microbatch] + since_fill == updates[event.microbatch]


def test_an_observer_hears_what_happens_after_it_was_added():
    observers, late = [], Recorder()
    batches = make_batches(2)
    step = make_even_step(make_network(), 4, batches[0])
    pipeline = Pipeline(step.stages, Schedule("sync", 4, 2), pytest.fail, observers)
    with step.running():
        pipeline.run(to_flights(step, batches[0], 2))
        observers.append(late)
        pipeline.updated()
        pipeline.run(to_flights(step, batches[1], 2))
    assert [event.stage.index for event in late.updates] == [0, 1, 2, 3]
    assert sorted(event.microbatch for event in late.forwards) == [2] * 4 + [3] * 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "duplex"),
    [
        ("none", "half"),
        ("sync", "half"),
        ("1f1b", "half"),
        ("zero_bubble", "half"),
        ("async", "half"),
        ("async", "full"),
    ],
)
def test_stages_hold_no_more_than_the_closed_form(name, duplex):
    schedule = Schedule(name, 4, 6, duplex)
    batches = make_batches(3)
    most = Counter()

    class Holding(Observer):
        def on_forward(self, event):
            most[event.stage.index] = max(most[event.stage.index], event.in_flight)

    step = make_even_step(make_network(), 4, batches[0])
    pipeline = Pipeline(step.stages, schedule, lambda stage: None, [Holding()])
    with step.running():
        for batch in batches:
            pipeline.run(to_flights(step, batch, 6))
            if name != "async":
                pipeline.updated()
        pipeline.drain()
    total = 18 if name == "async" else 6
    assert most == {m: schedule.in_flight(m, total) for m in range(4)}


ALIVE = Counter()
"""The number of living objects that nodes of :class:`Held` hold, by stage."""


class Activation:
    def __init__(self, stage):
        self.stage = stage
        ALIVE[stage] += 1

    def __del__(self):
        ALIVE[self.stage] -= 1


class Held(torch.autograd.Function):
    """The identity, with an object that its node keeps alive."""

    @staticmethod
    def forward(ctx, x, stage):
        ctx.activation = Activation(stage)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "duplex"),
    [
        ("none", "half"),
        ("sync", "half"),
        ("1f1b", "half"),
        ("zero_bubble", "half"),
        ("async", "half"),
        ("async", "full"),
    ],
)
def test_graphs_alive_are_the_closed_form(name, duplex):
    """Check that autograd holds only what the micro-batches in flight need, and nothing in the end."""
    schedule = Schedule(name, 4, 6, duplex)
    network, most = make_network(), Counter()
    for stage, layer in enumerate([0, 4, 8, 12]):
        network[layer].register_forward_hook(lambda module, args, out, stage=stage: Held.apply(out, stage))

    class Watching(Observer):
        def on_forward(self, event):
            for stage in range(4):
                most[stage] = max(most[stage], ALIVE[stage])

    batches = make_batches(3)
    step = make_even_step(network, 4, batches[0], delayed=name == "async", may_share=name != "async")
    gc.collect()
    gc.disable()
    try:
        assert not ALIVE.total()
        pipeline = Pipeline(step.stages, schedule, lambda stage: None, [Watching()])
        with step.running():
            for batch in batches:
                pipeline.run(to_flights(step, batch, 6))
                if name != "async":
                    pipeline.updated()
            pipeline.drain()
        assert most == {m: schedule.in_flight(m, 18 if name == "async" else 6) for m in range(4)}
        assert not ALIVE.total()
    finally:
        gc.enable()


@pytest.mark.slow
@pytest.mark.parametrize("duplex", ["half", "full"])
def test_micro_batches_are_forgotten_when_they_have_landed(duplex):
    """Check that a pipeline that never drains holds only the micro-batches in flight and their samples."""
    schedule = Schedule("async", 3, 2, duplex)
    batches = make_batches(6)
    step = make_even_step(make_network(), 3, batches[0], delayed=True, may_share=False)
    pipeline = Pipeline(step.stages, schedule, lambda stage: None)
    alive = []
    gc.collect()
    gc.disable()
    try:
        with step.running():
            for batch in batches:
                flights = to_flights(step, batch, 2)
                alive += map(weakref.ref, flights)
                pipeline.run(flights)
                del flights
                held = [index for index, flight in enumerate(alive) if flight() is not None]
                assert held == list(range(len(alive)))[-step.stages[0].num_in_flight :]
        # This is one less than the maximum, because the next micro-batch may enter now.
        assert step.stages[0].num_in_flight == schedule.in_flight(0, 12) - 1
    finally:
        gc.enable()


@pytest.mark.parametrize("num_microbatches", [2, 11])
def test_gradients_on_floating_point_tiles_equal_those_of_the_whole_batch(num_microbatches):
    """Check gradients, also with micro-batches of one sample, where autograd shares errors with biases' gradients."""
    (x, target), *_ = make_batches(1, dtype=torch.float32)
    reference = make_network(torch.float32)
    nn.functional.mse_loss(reference(x), target).backward()
    network = make_network(torch.float32)
    convert_to_analog(network, "ideal")
    step = make_even_step(network, 4, (x, target))
    pipeline = Pipeline(step.stages, Schedule("sync", 4, num_microbatches), pytest.fail)
    with step.running():
        pipeline.run(to_flights(step, (x, target), num_microbatches))
    for layer, theirs in zip(network, reference, strict=True):
        if isinstance(theirs, nn.Linear):
            ours = read_gradients(layer, layer.parameters())
            expected = torch.cat([theirs.weight.grad.flatten(), theirs.bias.grad])
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_abandon_forgets_what_is_in_flight():
    batches = make_batches(2)
    step = make_even_step(make_network(), 4, batches[0], delayed=True, may_share=False)
    pipeline = Pipeline(step.stages, Schedule("async", 4, 2), lambda stage: None)
    ended = []

    def endless():
        try:
            return squared_error(step.network, *batches[0])()
        finally:
            ended.append(True)

    with step.running():
        pipeline.run([Flight(step, endless), Flight(step, endless)])
        assert not pipeline.is_empty
        assert ended == [True]  # the forward of the first one has finished
        pipeline.abandon()
        assert pipeline.is_empty
        assert ended == [True, True]
        assert [stage.num_in_flight for stage in step.stages] == [0] * 4
        # The next fill does not wait for anything of the old one.
        pipeline.run(to_flights(step, batches[1], 2))
        pipeline.drain()
    assert [stage.version for stage in step.stages] == [2] * 4


@pytest.mark.parametrize("name", ["none", "sync", "1f1b", "zero_bubble", "async"])
def test_events_count_micro_batches_over_the_whole_run(name):
    """Check that an update once per mini-batch has the number of its last micro-batch, also after a drain."""
    batches, recorder = make_batches(3), Recorder()
    step = make_even_step(make_network(), 2, batches[0], delayed=name == "async", may_share=False)
    pipeline = Pipeline(step.stages, Schedule(name, 2, 2), lambda stage: None, [recorder])
    with step.running():
        for batch in batches:
            pipeline.run(to_flights(step, batch, 2))
            if name != "async":
                pipeline.updated()
        pipeline.drain()
    for stage in range(2):
        forwards, backwards, updates = (
            [(event.microbatch, event.since_fill) for event in events if event.stage.index == stage]
            for events in (recorder.forwards, recorder.backwards, recorder.updates)
        )
        each = [(k, k if name == "async" else k % 2) for k in range(6)]
        assert forwards == backwards == each
        assert updates == (each if name == "async" else each[1::2])


class Idle:
    """A micro-batch that does nothing."""

    def forward(self, stage): ...

    def backward(self, stage): ...

    def abort(self): ...


@pytest.mark.parametrize("resumed", [{}, {"clock": 7, "num_entered": 2}])
@pytest.mark.parametrize(
    ("name", "duplex"),
    [("none", "half"), ("sync", "half"), ("zero_bubble", "half"), ("async", "half"), ("async", "full")],
)
def test_observers_hear_every_clock_of_the_table(name, duplex, resumed):
    """Check the middle stage in two fills. The observer hears the clocks of all stages and the events of this one."""
    started, clocks, events, entered = [], [], [], resumed.get("num_entered", 0)

    class Listening(Recorder):
        def on_start(self, stages):
            started.append(stages)

        def on_clock(self, clock, operations):
            clocks.append((clock, operations))

        def on_forward(self, event):
            events.append(("F", event.clock, event.microbatch, event.in_flight))

        def on_backward(self, event):
            events.append(("B", event.clock, event.microbatch, event.in_flight))

        def on_weight_gradient(self, event):
            assert (event.version, event.staleness, event.predicted) == (0, 0, 0)
            assert event.since_fill == (event.microbatch - entered) % 4
            events.append(("W", event.clock, event.microbatch, event.in_flight))

    schedule, stage = Schedule(name, 3, 4, duplex), Stage(1, make_network()[0].parameters())
    pipeline = Pipeline([stage], schedule, lambda stage: None, [Listening()], **resumed)
    for _ in range(2):
        pipeline.run([Idle() for _ in range(4)])
        pipeline.drain()
    expected = [*enumerate([*schedule.clocks(4)] * 2, resumed.get("clock", 0))]
    assert clocks == expected
    assert started == [[stage.info()]]
    of_stage = [(each.kind, clock) for clock, operations in expected for each in operations if each.stage == 1]
    assert [event[:2] for event in events] == of_stage
    for kind in "FBW" if name == "zero_bubble" else "FB":
        assert [k for each, _, k, _ in events if each == kind] == [*range(entered, entered + 8)]
    changes = {"F": 1, "B": -1, "W": 0}
    assert [event[3] for event in events] == [*accumulate(changes[kind] for kind, _ in of_stage)]


def test_the_oldest_version_seen_counts_for_an_update_from_several_micro_batches():
    """Check an update between the forwards and the backwards of a mini-batch, and then one mini-batch more."""
    recorder = Recorder()
    pipeline = Pipeline([Stage(0)], Schedule("sync", 1, 2), pytest.fail, [recorder])
    pipeline.run([Idle(), Idle()])
    pipeline.run_forwards([Idle(), Idle()])
    pipeline.updated()
    pipeline.drain()
    pipeline.run([Idle(), Idle()])
    pipeline.updated()
    assert [event.version for event in recorder.forwards] == [0, 0, 0, 0, 1, 1]
    assert [event.staleness for event in recorder.backwards] == [0, 0, 1, 1, 0, 0]
    assert [event.staleness for event in recorder.updates] == [0, 1]


@pytest.mark.parametrize("skipped", [{0}, {1, 2}, {5}, set(range(6))])
def test_skipped_micro_batches_learn_nothing_and_keep_their_clocks(skipped):
    """Check that a step without a loss leaves no gradient, and that the other steps go on as usual."""
    batches = make_batches(6)
    network, start = make_network(), make_network()

    class Learnt(Observer):
        def on_update(self, event):
            gradients = [parameter.grad for parameter in event.stage.parameters]
            seen.append((event.stage.index, event.microbatch, all(g is not None for g in gradients)))
            for parameter in event.stage.parameters:
                parameter.grad = None

    seen = []
    step = make_even_step(network, 3, batches[0], delayed=True, may_share=False)
    pipeline = Pipeline(step.stages, Schedule("async", 3, 1), lambda stage: None, [Learnt()])
    with step.running():
        for k, batch in enumerate(batches):
            loss = squared_error(network, *batch)
            pipeline.run([Flight(step, (lambda: None) if k in skipped else loss)])
        pipeline.drain()
    assert sorted(seen) == [(stage, k, k not in skipped) for stage in range(3) for k in range(6)]
    for ours, theirs in zip(network.parameters(), start.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_process_runs_its_own_stages_of_the_table():
    """Check that each stage does its own operations in the table's order, with the versions of the whole pipeline."""

    class Counting:
        def __init__(self, k):
            self.k = k

        def forward(self, stage):
            done.append(("F", stage, self.k))

        def backward(self, stage):
            done.append(("B", stage, self.k))

        def abort(self):
            pytest.fail("nothing is aborted")

    schedule = Schedule("async", 3, 2)
    every = [operation for clock in range(schedule.num_clocks(6)) for operation in schedule.operations(clock, 6)]
    for index in range(3):
        done, stage = [], Stage(index)
        pipeline = Pipeline([stage], schedule, lambda stage: None)
        for first in range(0, 6, 2):
            pipeline.run([Counting(first), Counting(first + 1)])
        pipeline.drain()
        assert done == [operation for operation in every if operation.stage == index]
        assert stage.version == 6
        assert stage.num_in_flight == 0
