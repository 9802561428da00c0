"""These tests check how boundaries of stages are found by measuring, and which named ones are refused."""

import itertools
import time
from collections import OrderedDict

import pytest
import torch
import torch.utils.checkpoint
from staged import make_step
from torch import nn

from aimc_pl import boundaries
from aimc_pl.boundaries import BoundaryError, Calls, balance, check, check_stages, find
from aimc_pl.cost import RASCH_2024
from aimc_pl.devices import convert_to_analog, soft_bounds
from aimc_pl.trial import Trials


class Slow(nn.Module):
    """A layer whose forward takes so many units of time."""

    def __init__(self, units):
        super().__init__()
        self.units = units
        self.weight = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, x):
        time.sleep(0.008 * self.units)
        return x * self.weight


def found(network, num_stages, x=None, function=None, may_share=True, **kwargs):
    x = torch.randn(3, 2, dtype=torch.float64) if x is None else x
    trials = Trials(network, [function or (lambda: network(x).square().mean())])
    calls = Calls()
    with calls.recorded(network):
        trials.undivided()
    return find(trials, calls, num_stages, may_share=may_share, **kwargs)


@pytest.fixture
def exact_clock(monkeypatch):
    """Measure the time that the step sleeps, and nothing else. Sleeping ends at once."""
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(time, "perf_counter", lambda: sum(slept))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("units", "num_stages", "expected"),
    [
        ([1, 1, 1, 1], 2, ["2"]),
        ([3, 1, 1, 1], 2, ["1"]),
        ([1, 1, 1, 3], 2, ["3"]),
        ([1, 2, 3, 4], 2, ["3"]),
        ([6, 1, 1, 4, 2, 2], 3, ["1", "4"]),
        ([1, 1, 8, 1, 1], 3, ["2", "3"]),
        ([5], 1, []),
    ],
)
def test_stages_follow_measured_costs(units, num_stages, expected):
    network = nn.Sequential(*map(Slow, units))
    names, shares = found(network, num_stages, repeats=2)
    assert names == expected
    ends = [0, *(int(name) for name in names), len(units)]
    ideal = [sum(units[a:b]) / sum(units) for a, b in itertools.pairwise(ends)]
    assert shares == pytest.approx(ideal, abs=0.1)
    assert sum(shares) == pytest.approx(1)


def test_backwards_count():
    class SlowBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            time.sleep(0.04)
            return gradient

    network = nn.Sequential(*(Slow(1) for _ in range(5)))
    network[0].register_forward_hook(lambda module, args, out: SlowBackward.apply(out))
    assert found(network, 2, repeats=2)[0] == ["1"]


@pytest.mark.usefixtures("exact_clock")
def test_shares_are_those_of_all_that_a_stage_does(monkeypatch):
    """Check forwards, backwards, updates, and what the step does before, between and after its layers."""
    network = nn.Sequential(Slow(2), nn.Tanh(), Slow(1), Slow(4))
    x = torch.randn(3, 2, dtype=torch.float64)

    def step():
        time.sleep(0.008)
        y = network(x)
        y.register_hook(lambda gradient: time.sleep(0.016))
        time.sleep(0.024)
        return y.sum()

    network[1].register_forward_hook(lambda module, args, out: time.sleep(0.032))
    monkeypatch.setattr(boundaries, "time_update", lambda module: 0.04 if module is network[2] else 0.0)
    names, shares = found(network, 3, function=step)
    assert names == ["2", "3"]
    assert shares == pytest.approx([7 / 22, 6 / 22, 9 / 22])


@pytest.mark.usefixtures("exact_clock")
@pytest.mark.parametrize(("before", "expected"), [(0, "2"), (3, "1")])
def test_what_a_step_does_before_its_first_layer_belongs_to_the_first_stage(before, expected):
    network, x = nn.Sequential(*(Slow(1) for _ in range(4))), torch.randn(3, 2, dtype=torch.float64)

    def step():
        time.sleep(0.008 * before)
        return network(x).sum()

    assert found(network, 2, function=step)[0] == [expected]


@pytest.mark.usefixtures("exact_clock")
@pytest.mark.parametrize(
    ("units", "expected"),
    [
        ([0.952, 1, 1], "1"),  # this is noise: the layers are taken as equal
        ([0.94, 1, 1], "2"),
        ([10, *[0.1] * 10, 6], "1"),
        ([6, *[0.1] * 10, 10], "11"),
    ],
)
def test_costs_are_rounded_to_tenths_of_the_largest(units, expected):
    assert found(nn.Sequential(*map(Slow, units)), 2)[0] == [expected]


@pytest.mark.usefixtures("exact_clock")
@pytest.mark.parametrize(
    ("delays", "repeats", "expected"), [([1, 0], {"repeats": 2}, "2"), ([0, 1], {"repeats": 2}, "2"), ([1], {}, "3")]
)
def test_the_fastest_of_several_runs_counts(monkeypatch, delays, repeats, expected):
    """Check that a delay in one of the runs does not move a boundary, unless there is only one run."""
    network, each = nn.Sequential(*(Slow(1) for _ in range(4))), iter(delays)
    monkeypatch.setattr(boundaries, "time_update", lambda module: next(each) if module is network[3] else 0)
    assert found(network, 2, **repeats)[0] == [expected]


def test_layers_a_hundred_times_as_large_do_not_share_a_stage():
    layers = [nn.Linear(16, 16) for _ in range(3)] + [nn.Linear(16, 4096), nn.Linear(4096, 16)]
    network = nn.Sequential(*layers, *[nn.Linear(16, 16) for _ in range(3)])
    assert "4" in found(network, 4, torch.randn(512, 16))[0]


def test_updates_of_tiles_count(monkeypatch):
    network = nn.Sequential(*(Slow(1) for _ in range(5)))
    monkeypatch.setattr(boundaries, "time_update", lambda module: 0.05 if module is network[3] else 0.0)
    names, shares = found(network, 3)
    assert names == ["3", "4"]
    assert shares[1] == max(shares)


def test_the_outermost_module_opens_a_stage():
    """Check that no stage begins at an inner module that holds the parameters, or at a module called before."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.act, self.layer = nn.Tanh(), nn.Sequential(Slow(1))

        def forward(self, x):
            return self.layer(self.act(x))

    network = nn.Sequential(Slow(1), nn.Tanh(), nn.Sequential(Block(), nn.Identity()), Block())
    assert found(network, 3)[0] == ["2", "3"]
    network = nn.ModuleDict({"body": nn.Sequential(Block(), Block())})
    x = torch.randn(3, 2, dtype=torch.float64)
    assert found(network, 2, function=lambda: network["body"](x).sum())[0] == ["body.1"]


class Tied(nn.Module):
    """A network whose first and third layer share their weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (Slow(1) for _ in range(4))
        self.c.weight = self.a.weight

    def forward(self, x):
        return self.d(self.c(self.b(self.a(x))))


@pytest.mark.usefixtures("exact_clock")
def test_shared_parameters_are_kept_together():
    assert found(Tied(), 2, may_share=False)[0] == ["d"]
    assert found(Tied(), 2, may_share=True)[0] == ["c"]
    with pytest.raises(
        BoundaryError, match=r"3 stages need at least 3 layers .* calls 2 \(layers .* one, here a\.weight\)"
    ):
        found(Tied(), 3, may_share=False)
    assert len(found(Tied(), 4, may_share=True)[0]) == 3
    with pytest.raises(BoundaryError, match=r"at least 5 layers .* calls 4\. Lower"):
        found(Tied(), 5, may_share=True)


def test_long_names_of_shared_parameters_are_left_out():
    first, second = Slow(0), Slow(0)
    layers = {"first_of_the_layers": first, "second_of_the_layers": second, "third": Slow(0), "fourth": Slow(0)}
    layers["third"].weight, layers["fourth"].weight = first.weight, second.weight
    with pytest.raises(BoundaryError, match=r"one, here first_of_the_layers\.weight and 1 more\)\. Lower"):
        found(nn.Sequential(OrderedDict(layers)), 2, may_share=False)


def test_a_parameter_that_is_used_without_its_module_is_seen():
    network = nn.Sequential(*(Slow(1) for _ in range(4)))
    x = torch.randn(3, 2, dtype=torch.float64)
    # The last layer's weight is used before the first layer, like an embedding that is also the head.
    names, _ = found(network, 2, function=lambda: network(x * network[2].weight).sum(), may_share=False)
    assert names == ["3"]


def test_a_parameter_of_the_module_around_the_layers_belongs_where_it_is_used():
    """Check a parameter that is used after the layers, although its module is called before them."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (Slow(1) for _ in range(3))
            self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, x):
            return self.c(self.b(self.a(x))) * self.scale

    network = nn.ModuleDict({"model": Scaled()})
    x = torch.randn(3, 2, dtype=torch.float64)
    for may_share in (True, False):
        names, _ = found(network, 3, function=lambda: network["model"](x).sum(), may_share=may_share)
        assert names == ["model.b", "model.c"]


def test_frozen_layers_count_as_layers():
    network = nn.Sequential(Slow(1), Slow(1).requires_grad_(False), Slow(1))
    assert found(network, 3)[0] == ["1", "2"]
    body = nn.Sequential(Slow(0).requires_grad_(False), Slow(0).requires_grad_(False), Slow(0))
    network, x = nn.ModuleDict({"body": body}), torch.randn(3, 2, dtype=torch.float64)
    names, _ = found(network, 3, function=lambda: network["body"](x).sum(), may_share=False)
    assert names == ["body.1", "body.2"]


@pytest.mark.parametrize("may_share", [False, True])
@pytest.mark.parametrize(
    ("network", "num_stages", "layers"),
    [
        (nn.Sequential(Slow(0), nn.Tanh(), Slow(0)), 3, 2),
        (nn.Sequential(Slow(0)), 2, 1),
    ],
)
def test_too_few_layers(network, num_stages, layers, may_share):
    message = rf"{num_stages} stages need at least {num_stages} .* calls {layers}\. Lower"
    with pytest.raises(BoundaryError, match=message):
        found(network, num_stages, may_share=may_share)


def test_a_step_that_uses_no_parameter_calls_no_layer():
    network = nn.Sequential(nn.Tanh(), nn.Tanh())

    def skipped():
        network(torch.ones(2))

    with pytest.raises(BoundaryError, match=r"2 stages need at least 2 layers .* calls 0\. Lower"):
        found(network, 2, function=skipped)


def test_measuring_leaves_no_trace():
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(), nn.Linear(2, 2)).double()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    states = torch.get_rng_state()
    x = torch.ones(3, 2, dtype=torch.float64)
    found(network, 3, x, repeats=2)
    assert torch.equal(torch.get_rng_state(), states)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_calls_are_the_modules_called_first_with_gradients():
    network = nn.Sequential(
        nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Tanh()), nn.Linear(2, 2), nn.Linear(2, 2)
    )
    other = nn.Linear(2, 2)
    x = torch.randn(3, 2)
    calls = Calls()
    with calls.recorded(network):
        with torch.no_grad():
            network[2](x)
        other(x)
        h = network[1](network[0](x))
        network[1](network[0](h))
        with torch.no_grad():
            network[0](x)
    network[3](x)
    assert calls.names == ["0", "1", "1.0", "1.1"]


def test_calls_without_gradients_and_in_checkpoints_are_others():
    network = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    x = torch.randn(3, 2)

    def step():
        with torch.no_grad():
            network[3](x)
        h = network[0](x)
        for reentrant in (False, True):
            h = torch.utils.checkpoint.checkpoint(network[1 + reentrant], h, use_reentrant=reentrant)
        return h.sum()

    calls, every = Calls(), Calls(with_gradients=False)
    with calls.recorded(network):
        step()
    with every.recorded(network):
        step()
    assert calls.names == ["0"]
    assert calls.others == ["3", "1", "2"]
    assert every.names == ["3", "0", "1", "2"]
    for name in calls.others:
        with pytest.raises(BoundaryError, match=f"names '{name}', which training_step calls without gradients"):
            check(calls, [name])


def make_calls(*names):
    calls = Calls()
    calls.names = [*names]
    return calls


@pytest.mark.parametrize(
    ("split_at", "message"),
    [
        (["nowhere"], r"names 'nowhere', which training_step does not call .*; it calls a, b, b\.0, c"),
        (["a", ""], r"names '', which training_step does not call"),
        (["c", "b"], r"split_at is out of order: .*, which is b, c"),
        (["b", "b"], "out of order"),
    ],
)
def test_bad_names(split_at, message):
    with pytest.raises(BoundaryError, match=message):
        check(make_calls("a", "b", "b.0", "c"), split_at)


def test_good_names_and_long_lists():
    check(make_calls("a", "b", "b.0", "c"), ["b", "b.0", "c"])
    check(make_calls(), [])
    with pytest.raises(BoundaryError, match=r"it calls layer0, .*, layer5 and 19 more"):
        check(make_calls(*(f"layer{i}" for i in range(25))), ["x"])
    for length, end in ((24, "a{24}, b{24}"), (25, "a{25} and 1 more")):  # 50 and 51 characters with both names
        with pytest.raises(BoundaryError, match=rf"it calls {end}$"):
            check(make_calls("a" * length, "b" * 24), ["x"])
    with pytest.raises(BoundaryError, match=r"it calls a{60} and 1 more$"):
        check(make_calls("a" * 60, "b"), ["x"])


def test_a_stage_that_does_nothing_is_refused():
    network = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2))
    network[3].requires_grad_(False)
    x = torch.randn(3, 2)

    def check(*split_at):
        check_stages(make_step(network, split_at, lambda: network(x).sum()).stages, split_at)

    check("1", "2", "3")
    for split_at, empty in ((["0"], 0), (["2", "2.0"], 1)):
        with pytest.raises(BoundaryError, match=f"leaves stage {empty} empty"):
            check(*split_at)


@pytest.mark.parametrize("groups", [1, 2, 3, 5])
def test_balance_is_the_best_of_all_splits(groups):
    generator = torch.Generator().manual_seed(groups)
    for length in range(groups, 9):
        costs = torch.rand(length, generator=generator).tolist()

        def worst(cuts, costs=costs):
            return max(sum(costs[a:b]) for a, b in itertools.pairwise([0, *cuts, len(costs)]))

        best = min(worst(cuts) for cuts in itertools.combinations(range(1, length), groups - 1))
        chosen = balance(costs, groups)
        assert worst(chosen) == pytest.approx(best)
        assert chosen == sorted(set(chosen))
        assert len(chosen) == groups - 1


def test_many_layers_are_balanced_quickly():
    """Check a transformer of a hundred blocks, which calls hundreds of layers."""
    start = time.perf_counter()
    chosen = boundaries.balance([1.0] * 400, 8)
    assert chosen == list(range(50, 400, 50))
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    ("widths", "num_stages", "expected"),
    [
        ([64, 64, 64, 64, 64], 2, ["2"]),
        ([512, 512, 32, 32, 32], 2, ["1"]),
        ([32, 32, 32, 512, 512], 2, ["3"]),
        ([32, 512, 512, 32, 32], 3, ["1", "2"]),
    ],
)
def test_modelled_times_are_balanced_exactly_and_on_every_machine(monkeypatch, widths, num_stages, expected):
    """Check layers whose products take far more than anything else, whatever this machine's clock says."""
    network = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(widths))).double()
    x = torch.randn(50, widths[0], dtype=torch.float64, requires_grad=True)
    names, shares = found(network, num_stages, x, hardware=RASCH_2024)
    costs = [a * b for a, b in itertools.pairwise(widths)]
    ends = [0, *map(int, names), len(costs)]
    assert names == expected
    assert shares == pytest.approx([sum(costs[a:b]) / sum(costs) for a, b in itertools.pairwise(ends)], abs=0.1)
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)
    assert found(network, num_stages, x, hardware=RASCH_2024) == (names, shares)


def test_no_stage_begins_within_a_layer_on_several_tiles():
    network = nn.Sequential(nn.Linear(1300, 8), nn.Linear(8, 2))
    convert_to_analog(network, soft_bounds())
    assert len([*network[0].analog_tiles()]) == 3
    calls = Calls()
    with calls.recorded(network):
        network(torch.randn(4, 1300)).sum().backward()
    assert calls.names == ["0", "1"]
    with pytest.raises(BoundaryError, match=r"'0\.analog_module\.array\.1\.0', which training_step does not call"):
        check(calls, ["0.analog_module.array.1.0"])
