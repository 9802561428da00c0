"""These tests check that everything that a step may change is found, named and restored."""

import random
import threading
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from inspect import getclosurevars
from itertools import chain, count, cycle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.utils.data import TensorDataset

from aimc_pl.devices import convert_to_analog
from aimc_pl.traces import Traces

GLOBAL = 0


class Owner(SimpleNamespace):
    pass


class Other(SimpleNamespace):
    pass


class Network(nn.Module):
    shared = 0

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 2).double()
        self.norm = nn.BatchNorm1d(2).double()
        self.kept = torch.zeros(2)
        self.memory = np.zeros(3)
        self.nested = {"a": [torch.zeros(2), np.zeros(2)]}
        self.losses, self.count, self.large = [], 0, [*range(1000)]
        inner = SimpleNamespace(count=0, array=np.zeros(2))
        self.owner = Owner(inner=inner, modules=[nn.Linear(2, 2)])
        self.function = partial(print, items=[1, 2])
        number = 0

        def counter():
            nonlocal number
            number += 1
            return number

        self.counter = counter

    def use_globals(self):
        global GLOBAL
        GLOBAL += 1

    def state(self):
        """Return everything that the tests below change, as plain values."""
        return {
            "weights": {name: value.tolist() for name, value in self.state_dict().items()},
            "kept": (id(self.kept), self.kept.tolist()),
            "memory": (id(self.memory), self.memory.tolist()),
            "nested": (sorted(self.nested), [(id(value), value.tolist()) for value in self.nested["a"]]),
            "plain": (list(self.losses), self.count, list(self.large), hasattr(self, "new")),
            "modes": [module.training for module in self.modules()],
            "owner": (type(self.owner), self.owner.inner.count, self.owner.inner.array.tolist()),
            "hidden": self.owner.modules[0].bias.tolist(),
            "function": list(self.function.keywords["items"]),
            "variables": (getclosurevars(self.counter).nonlocals, GLOBAL, Network.shared),
            "hooks": (len(self.layer._forward_hooks), len(self.layer.weight._backward_hooks or ())),
            "modules": [(name, type(module)) for name, module in self.named_modules()],
            "frozen": [parameter.requires_grad for parameter in self.parameters()],
        }


def assign(target, value):
    with torch.no_grad():
        target.copy_(value)


CHANGES = {
    "a parameter": (lambda net: assign(net.layer.weight, torch.ones(2, 2)), ["layer.weight"]),
    "a parameter's data": (lambda net: net.layer.weight.data.add_(1), ["layer.weight"]),
    "a buffer": (lambda net: net.norm.running_mean.add_(1), ["norm.running_mean"]),
    "a tensor": (lambda net: net.kept.add_(1), ["kept"]),
    "an array": (lambda net: net.memory.__setitem__(1, 5), ["memory"]),
    "a tensor in a container": (lambda net: net.nested["a"][0].add_(1), ["nested.a.0"]),
    "an array in a container": (lambda net: net.nested["a"][1].__iadd__(1), ["nested.a.1"]),
    "a number": (lambda net: setattr(net, "count", 3), ["count"]),
    "a list": (lambda net: net.losses.append(1.0), ["losses"]),
    "a large list": (lambda net: net.large.__setitem__(500, -1), ["large"]),
    "a dict": (lambda net: net.nested.update(b=1), ["nested"]),
    "a new attribute": (lambda net: setattr(net, "new", 3), ["new"]),
    "a frozen parameter": (
        lambda net: net.layer.bias.requires_grad_(False),
        ["layer.bias"],
    ),
    "a hook": (lambda net: net.layer.register_forward_hook(print), ["layer.forward_hooks"]),
    "a hook of a parameter": (lambda net: net.layer.weight.register_hook(print), ["layer.weight"]),
    "a new layer": (lambda net: setattr(net, "other", nn.Linear(1, 1)), ["modules"]),
    "a shape": (lambda net: net.kept.resize_(3).fill_(1), ["kept"]),
    "a parametrization": (
        lambda net: parametrize.register_parametrization(net.layer, "bias", nn.Identity()),
        ["layer.class", "layer.parameters", "layer.modules"],
    ),
    "a number in objects": (lambda net: setattr(net.owner.inner, "count", 3), ["owner.inner.count"]),
    "an array in objects": (lambda net: net.owner.inner.array.fill(3), ["owner.inner.array"]),
    "a class of an object": (lambda net: setattr(net.owner, "__class__", Other), ["owner.class"]),
    "a list in a partial": (lambda net: net.function.keywords["items"].append(3), ["function.items"]),
    "a variable in a closure": (lambda net: net.counter(), ["number"]),
    "a global variable": (lambda net: net.use_globals(), ["GLOBAL"]),
    "a class": (lambda net: setattr(Network, "shared", 3), ["Network.shared"]),
    "a hidden module": (lambda net: assign(net.owner.modules[0].bias, torch.ones(2)), ["owner.modules.0.bias"]),
    "a mode": (lambda net: net.norm.eval(), ["norm.training"]),
    "a forward": (
        lambda net: net.norm(torch.randn(4, 2).double()),
        ["norm.running_mean", "norm.running_var", "norm.num_batches_tracked"],
    ),
    "nothing": (lambda net: None, []),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_named_and_undone(change):
    net = Network()
    before = net.state()
    act, names = CHANGES[change]
    traces = Traces(net)
    for _ in range(2):
        act(net)
        changed = traces.changed()
        assert [traces.describe(one) for one in changed] == [f"'{name}'" for name in names]
        assert (net.state() == before) == (not names)
        traces.undo()
        assert net.state() == before
        assert traces.changed() == []


def test_nan_is_as_before_where_it_was_before():
    net = Network()
    net.kept[0] = torch.nan
    net.owner.inner.array = net.owner.inner.array * np.nan
    traces = Traces(net)
    assert traces.changed() == []
    net.kept[1] += 1
    assert [traces.describe(change) for change in traces.changed()] == ["'kept'"]
    traces.undo()
    assert traces.changed() == []


def test_one_change_is_undone_alone():
    net = Network()
    traces = Traces(net)
    net.count = 3
    net.norm.running_mean += 1
    net.kept += 2
    changes = {traces.describe(change): change for change in traces.changed()}
    traces.undo_one(changes["'norm.running_mean'"])
    assert (net.count, net.norm.running_mean.tolist(), net.kept.tolist()) == (3, [0, 0], [2, 2])
    traces.undo_one(changes["'count'"])
    assert (net.count, net.norm.running_mean.tolist(), net.kept.tolist()) == (0, [0, 0], [2, 2])


def test_parameters_bound_anew_are_the_old_ones_again():
    net = Network()
    weight = net.layer.weight
    value = weight.detach().clone()
    traces = Traces(net)
    net.layer.weight = nn.Parameter(torch.ones(2, 2).double())
    assign(weight, torch.zeros(2, 2))
    traces.undo()
    assert net.layer.weight is weight
    assert torch.equal(weight, value)


@pytest.mark.parametrize("has_gradients", [False, True])
def test_gradients_are_put_back(has_gradients):
    net = Network()
    x = torch.ones(1, 2, dtype=torch.float64)
    if has_gradients:
        net.layer(x).sum().backward()
    before = [parameter.grad for parameter in net.parameters()]
    values = [None if grad is None else grad.clone() for grad in before]
    traces = Traces(net)
    traces.clear_gradients()
    assert all(parameter.grad is None for parameter in net.parameters())
    net.layer(3 * x).sum().backward()
    traces.undo()
    for parameter, grad, value in zip(net.parameters(), before, values, strict=True):
        assert parameter.grad is grad
        assert grad is None or torch.equal(grad, value)


def test_pending_updates_of_tiles_are_put_back():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    convert_to_analog(net, "ideal")
    x = torch.randn(3, 4)
    net(x).sum().backward()
    contexts = [parameter for parameter in net.parameters() if hasattr(parameter, "analog_tile")]
    before = [(list(context.analog_input), list(context.analog_grad_output)) for context in contexts]
    traces = Traces(net)
    traces.clear_gradients()
    assert all(not context.analog_input and not context.analog_grad_output for context in contexts)
    net(2 * x).sum().backward()
    assert all(len(context.analog_input) == 1 for context in contexts)
    traces.undo()
    for context, (inputs, errors) in zip(contexts, before, strict=True):
        assert len(context.analog_input) == len(context.analog_grad_output) == 1
        assert context.analog_input[0] is inputs[0]
        assert context.analog_grad_output[0] is errors[0]


@dataclass
class Batch:
    x: torch.Tensor
    labels: list = field(default_factory=list)


def make_batch():
    x, y, array = torch.ones(2), torch.zeros(2), np.ones(2)
    return {"batch": Batch(x, [1, 2]), "y": y, "list": [array, deque([x])], "extra": SimpleNamespace(scale=2.0)}


def plain(batch):
    inner = batch["batch"]
    return [
        [*batch],
        (id(inner), id(inner.x), inner.x.tolist(), id(inner.labels), list(inner.labels), sorted(vars(inner))),
        (id(batch["y"]), batch["y"].tolist()),
        (id(batch["list"]), len(batch["list"]), batch["list"][0].tolist(), [id(x) for x in batch["list"][1]]),
        vars(batch["extra"]),
    ]


def spoil(batch):
    batch["batch"].x.add_(1)
    batch["batch"].labels.append(3)
    batch["batch"].labels, batch["batch"].x, batch["batch"].new = [], None, 1
    batch["extra"].scale += 1
    batch["list"][0][:] = 7
    batch["list"].pop().clear()
    batch["y"].zero_().sub_(4)
    batch["more"] = batch.pop("y")


@pytest.mark.parametrize("method", ["undo", "undo_inputs"])
def test_the_batch_is_put_back(method):
    net, batch = Network(), make_batch()
    before = plain(batch)
    traces = Traces(net, [batch])
    for _ in range(2):
        spoil(batch)
        net.count, net.hidden = 5, batch["more"]
        net.kept.add_(1)
        getattr(traces, method)()
        assert repr(plain(batch)) == repr(before)
        if method == "undo":
            assert (net.count, net.kept.tolist()) == (0, [0, 0])
            assert not hasattr(net, "hidden")
        else:
            assert net.count == 5
            assert net.kept.tolist() != [0, 0]
            assert net.hidden is batch["y"]


def test_without_changes_the_batch_keeps_its_version():
    """Check that values that have not changed are not written, because an autograd graph may hold them."""
    net, x = Network(), torch.ones(2)
    traces = Traces(net, x)
    version = x._version
    traces.undo()
    assert (x._version, net.layer.weight._version) == (version, net.layer.weight._version)


def generator(end=10):
    yield from range(end)


ITERATORS = {
    "a generator": lambda: (k * k for k in range(9)),
    "a generator function": generator,
    "a count": lambda: count(3),
    "a cycle": lambda: cycle([1, 2, 3]),
    "a chain": lambda: chain([1], [2, 3, 4], [5]),
    "a list's": lambda: iter([4, 5, 6, 7, 8]),
    "a zip": lambda: zip([1, 2, 3, 4, 5], [6, 7, 8, 9, 0], strict=True),
    "a map": lambda: map(str, range(9)),
    "an enumeration": lambda: enumerate("abcdefgh"),
}


@pytest.mark.parametrize("kind", ITERATORS)
def test_iterators_give_again_what_runs_have_taken(kind):
    expected = ITERATORS[kind]()
    expected = [next(expected) for _ in range(5)]
    net = Network()
    net.layer.source = ITERATORS[kind]()
    assert next(net.layer.source) == expected[0]
    traces = Traces(net)
    for taken in (2, 0, 3):
        assert [next(net.layer.source) for _ in range(taken)] == expected[1 : 1 + taken]
        traces.undo()
    # The strategy takes traces while earlier ones are in use, for several batches.
    assert next(net.layer.source) == expected[1]
    again = Traces(net)
    assert next(net.layer.source) == expected[2]
    again.undo()
    assert [next(net.layer.source) for _ in range(3)] == expected[2:5]


def test_an_iterator_that_two_modules_share_stays_shared():
    net = Network()
    net.layer.source = net.norm.source = count()
    traces = Traces(net)
    for _ in range(2):
        assert [next(net.layer.source), next(net.norm.source), next(net.layer.source)] == [0, 1, 2]
        traces.undo()
    assert net.layer.source is net.norm.source


def test_changes_of_iterators_are_no_changes_of_attributes():
    net = Network()
    net.source = count()
    traces = Traces(net)
    next(net.source)
    assert traces.changed() == []


@pytest.mark.parametrize("calls", [1, 2])
def test_lazy_layers_are_lazy_again(calls):
    net = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d(affine=False))
    parameters, weight = [*net.parameters()], None
    traces = Traces(net)
    for _ in range(2):
        for _ in range(calls):
            torch.manual_seed(1)
            net(torch.ones(2, 4)).sum().backward()
        weight = net[0].weight.detach().clone()
        assert weight.shape == (3, 4)
        traces.undo()
        assert [type(layer) for layer in net] == [nn.LazyLinear, nn.LazyBatchNorm1d]
        assert all(map(is_lazy, [*net.parameters(), net[1].running_mean]))
        assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    torch.manual_seed(1)
    net(torch.ones(5, 4))
    assert weight is not None
    assert torch.equal(net[0].weight, weight)


def test_what_is_beside_is_put_back_and_what_is_outside_is_not():
    net = Network()
    optimizer = torch.optim.SGD(net.layer.parameters(), 0.5)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    net.trainer = SimpleNamespace(count=0)
    traces = Traces(net, None, [("optimizers", [optimizer]), ("schedulers", [scheduler])], [net.trainer])
    optimizer.step()
    scheduler.step()
    net.trainer.count = 1
    assert (optimizer.param_groups[0]["lr"], scheduler.last_epoch) == (0.25, 1)
    traces.undo()
    assert (optimizer.param_groups[0]["lr"], scheduler.last_epoch) == (0.5, 0)
    assert net.trainer.count == 1


def test_random_generators_are_found():
    net = Network()
    generators = [torch.Generator(), np.random.default_rng(), np.random.RandomState(), random.Random()]
    net.generators, net.norm.held = {"a": generators[:1]}, SimpleNamespace(inner=(generators[1], 3))
    net.function, net.draw = partial(print, generators[2]), generators[3].random
    assert sorted(map(id, Traces(net).generators)) == sorted(map(id, generators))


def test_data_sets_and_threads_are_left_alone():
    net = Network()
    data, worker = TensorDataset(torch.zeros(3)), SimpleNamespace(thread=threading.Thread(), count=0)
    net.data, net.worker = data, worker
    traces = Traces(net)
    data.tensors[0].fill_(1)
    worker.count = 1
    assert traces.changed() == []
    traces.undo()
    assert (data.tensors[0].tolist(), worker.count) == ([1, 1, 1], 1)
