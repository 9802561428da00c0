"""These tests run one stage per process in a single process. Copies of a network pass messages in memory."""

import copy
import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from reference import delayed_updates
from staged import make_step
from torch import nn

from aimc_pl.devices import convert_to_analog, ideal, soft_bounds
from aimc_pl.errors import UsageError
from aimc_pl.flight import Flight
from aimc_pl.ghosts import Ghosts
from aimc_pl.passage import StageProcess
from aimc_pl.saved import SavedParameters
from aimc_pl.schedule import Operation, Schedule
from aimc_pl.stage import Stage

LEARNING_RATE = 0.5
OWNERS = [0, 0, 1, 2]
BOUNDARIES = ["4", "6"]


class Letters:
    """A link between all stages. It delivers each message once, as bytes, for the operation it is meant for."""

    def __init__(self):
        self.messages = {}
        self.sent = []

    def send(self, operation, values):
        assert operation not in self.messages
        self.messages[operation] = pickle.dumps(values)
        self.sent.append(operation)

    def receive(self, operation):
        return pickle.loads(self.messages.pop(operation))


def make_network(dropout=0.0):
    torch.manual_seed(0)
    sizes = [3, 5, 4, 5, 2]
    layers = []
    for features, following in pairwise(sizes):
        layers += [nn.Linear(features, following), nn.Sequential(nn.Tanh(), nn.Dropout(dropout))]
    return nn.Sequential(*layers[:-1]).double()


def make_microbatches(count):
    generator = torch.Generator().manual_seed(1)
    sizes = [4 + k % 2 for k in range(count)]
    return [
        (
            torch.randn(size, 3, generator=generator, dtype=torch.float64),
            torch.randn(size, 2, generator=generator, dtype=torch.float64),
            0.2 + 0.1 * k,
        )
        for k, size in enumerate(sizes)
    ]


def squared_error(network, x, target):
    return lambda: nn.functional.mse_loss(network(x), target)


class Processes:
    """A copy of the network for every stage. Each copy holds the weights of its own stage only."""

    def __init__(self, network, stashes=False, **kwargs):
        owners = {f"{2 * layer}.{name}": stage for layer, stage in enumerate(OWNERS) for name in ("weight", "bias")}
        self.letters = Letters()
        self.networks = [copy.deepcopy(network) for _ in range(3)]
        self.all = []
        for index, own in enumerate(self.networks):
            parameters = [parameter for name, parameter in own.named_parameters() if owners[name] == index]
            saved = SavedParameters(parameters, stash=True) if stashes else None
            ghosts = Ghosts(own, BOUNDARIES, index, owners)
            ghosts.free()
            stage = Stage(index, parameters)
            self.all.append(StageProcess(ghosts, self.letters, stage, 3, saved=saved, **kwargs))

    def run(self, schedule, microbatches, functions=None, update=lambda stage: None):
        """Run clock by clock, as :class:`aimc_pl.pipeline.Pipeline` lets each process run."""
        passages = []
        for process, network in zip(self.all, self.networks, strict=True):
            for x, target, weight in microbatches:
                function = (functions or squared_error)(network, x, target)
                passages.append(process.microbatch(function, weight, (x, target)))
        count = len(microbatches)
        for operations in schedule.clocks(count):
            for kind, stage, k in operations:
                passage = passages[count * stage + k]
                with self.all[stage].ghosts.intercepting():
                    {"F": passage.forward, "B": passage.backward, "W": lambda stage: None}[kind](stage)
            for kind, stage, _ in operations:
                if kind == "B":
                    update(self.all[stage].stage)
        assert self.letters.messages == {}

    def parameters(self, name):
        """Return a parameter of each layer, from the process that owns the layer."""
        return [getattr(self.networks[stage][2 * layer], name) for layer, stage in enumerate(OWNERS)]


def infer(process, function, x):
    with process.ghosts.intercepting():
        return process.infer(function, x)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["none", "sync", "1f1b", "zero_bubble"])
def test_gradients_are_those_of_one_process_and_of_no_stages(name):
    network, undivided = make_network(), make_network()
    microbatches = make_microbatches(4)
    for x, target, weight in microbatches:
        (weight * squared_error(undivided, x, target)()).backward()
    processes = Processes(network)
    processes.run(Schedule(name, 3, 4), microbatches)
    step = make_step(network, BOUNDARIES)
    with step.running():
        for x, target, weight in microbatches:
            flight = Flight(step, squared_error(network, x, target), weight)
            for operation in (flight.forward, flight.backward):
                for stage in (0, 1, 2) if operation == flight.forward else (2, 1, 0):
                    operation(stage)
    for kind in ("weight", "bias"):
        for layer, parameter in enumerate(processes.parameters(kind)):
            for other in (undivided, network):
                expected = getattr(other[2 * layer], kind).grad
                torch.testing.assert_close(parameter.grad, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("duplex", ["half", "full"])
@pytest.mark.parametrize("stashes", [False, True])
def test_asynchronous_updates_are_the_recomputed_ones(duplex, stashes):
    network = make_network()
    microbatches = make_microbatches(7)
    schedule = Schedule("async", 3, 7, duplex)
    processes = Processes(network, stashes, delayed=True)

    def update(stage):
        with torch.no_grad():
            for parameter in stage.parameters:
                parameter.sub_(LEARNING_RATE * parameter.grad)
                parameter.grad = None
        stage.version += 1

    processes.run(schedule, microbatches, update=update)
    layers = [network[2 * layer] for layer in range(4)]
    weights, biases = delayed_updates(
        [layer.weight.detach().numpy().copy() for layer in layers],
        [layer.bias.detach().numpy().copy() for layer in layers],
        OWNERS,
        [(x.numpy(), target.numpy(), weight) for x, target, weight in microbatches],
        [schedule.max_staleness(stage) for stage in range(3)],
        LEARNING_RATE,
        stashing=stashes,
    )
    for kind, expected in (("weight", weights), ("bias", biases)):
        for ours, theirs in zip(processes.parameters(kind), expected, strict=True):
            np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=1e-10, atol=1e-13)


def test_messages_go_to_the_neighbours_in_the_order_of_the_schedule():
    processes = Processes(make_network())
    processes.run(Schedule("sync", 3, 2), make_microbatches(2))
    assert processes.letters.sent == [
        *(Operation("F", 1, 1), Operation("F", 1, 2), Operation("F", 2, 1), Operation("F", 2, 2)),
        *(Operation("B", 1, 1), Operation("B", 0, 1), Operation("B", 1, 2), Operation("B", 0, 2)),
    ]


def test_a_step_that_learns_nothing_leaves_no_gradients():
    processes = Processes(make_network())

    def skipping(network, x, target):
        def function():
            network(x)

        return function

    processes.run(Schedule("sync", 3, 2), make_microbatches(2), skipping)
    assert all(parameter.grad is None for kind in ("weight", "bias") for parameter in processes.parameters(kind))


def test_inference_gives_the_result_to_the_last_stage():
    network = make_network()
    processes = Processes(network)
    ((x, target, _),) = make_microbatches(1)
    results = [
        infer(process, lambda own=own: own(x), x)
        for process, own in zip(processes.all, processes.networks, strict=True)
    ]
    assert results[:2] == [None, None]
    torch.testing.assert_close(results[2], network(x).detach(), rtol=1e-12, atol=1e-15)
    assert not results[2].requires_grad
    # Training continues with the next numbers of micro-batches.
    processes.run(Schedule("sync", 3, 1), [(x, target, 1.0)])
    assert {operation.microbatch for operation in processes.letters.sent[-4:]} == {2}


def test_micro_batches_draw_numbers_of_their_own_that_the_seed_decides():
    ((x, _, _),) = make_microbatches(1)

    def losses(seed):
        processes = Processes(make_network(dropout=0.5), seed=seed)
        return [
            [
                infer(process, lambda own=own: own(x).sum(), x)
                for process, own in zip(processes.all, processes.networks, strict=True)
            ][-1].item()
            for _ in range(3)
        ]

    first = losses(1)
    assert len(set(first)) == 3
    assert losses(1) == first
    assert not set(losses(123456789)) & set(first)
    # The seed depends on the number only, and not on the process.
    one, other = Processes(make_network(), seed=1).all[:2]
    assert [one.seed(number) for number in (1, 2)] == [other.seed(number) for number in (1, 2)]


def with_analog_bias():
    """Return a device of our own tile, which unfolds images by the layer's indices if it holds the bias."""
    rpu_config = soft_bounds(perfect_io=True).rpu_config
    rpu_config.mapping.digital_bias = False
    return rpu_config


@pytest.mark.parametrize("device", [ideal(), with_analog_bias()], ids=["aihwkit", "mean_field"])
def test_tiles_meet_images_of_another_size_only_while_no_others_are_under_way(device):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Conv1d(3, 4, 3))
    convert_to_analog(network, {"0": device})
    owners = {name: int(name[0] == "2") for name, _ in network.named_parameters()}
    letters, copies = Letters(), [network, copy.deepcopy(network)]
    first, last = [
        StageProcess(
            Ghosts(own, ["2"], index, owners),
            letters,
            Stage(index, [parameter for name, parameter in own.named_parameters() if owners[name] == index]),
            2,
        )
        for index, own in enumerate(copies)
    ]

    def passages(size):
        x = torch.randn(4, 2, size)
        processes = zip((first, last), copies, strict=True)
        return [process.microbatch(lambda own=own: own(x).sum(), 1.0, x) for process, own in processes]

    def call(process, operation, stage):
        with process.ghosts.intercepting():
            operation(stage)

    for size in (9, 12):  # One after the other
        ours, theirs = passages(size)
        call(first, ours.forward, 0)
        call(last, theirs.forward, 1)
        call(last, theirs.backward, 1)
        call(first, ours.backward, 0)
    call(first, passages(12)[0].forward, 0)
    call(first, passages(12)[0].forward, 0)
    with pytest.raises(UsageError, match=r"images of another size reach '0.analog_module' while others are under way"):
        call(first, passages(9)[0].forward, 0)
