"""These tests check which stage holds which part of a module, and how the parts of several processes are merged."""

import copy
from contextlib import suppress

import pytest
import torch
from torch import nn

from aimc_pl.stage import Stage
from aimc_pl.strategies.ownership import Ownership


class Net(nn.Module):
    """A module with tied weights, a layer that no stage calls, and values of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3)
        self.block = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
        self.tied, self.idle = nn.Linear(3, 3), nn.Linear(3, 1)
        self.tied.weight = self.first.weight
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("count", torch.zeros(()))


def owned(net):
    """Return the ownership of three stages: the second begins inside the block, and uses the scale of the net."""
    stages = [
        Stage(0, [net.first.weight, *net.norm.parameters()], [net.first, net.norm]),
        Stage(1, [*net.block[0].parameters(), net.scale], [net.block]),
        Stage(2, [*net.block[1].parameters()], [net.block[1], net.tied]),
    ]
    return Ownership(net, stages)


STAGES = {
    "first.weight": 0,
    "norm.weight": 0,
    "norm.running_mean": 0,
    "block.0.weight": 1,
    "block.0.bias": 1,
    "block.1.weight": 2,
    "block.1.bias": 2,
    # The weight is that of the first layer.
    "tied.weight": 0,
    "tied.bias": 2,
    "scale": 1,
    # No stage uses these.
    "idle.weight": 2,
    "count": 2,
}


def gathered(call, num_processes):
    """Return what a call returns in each process, and what each has sent. The call takes a stage and ``gather``."""
    parts = []

    def send(part):
        parts.append(part)
        raise InterruptedError

    for own in range(num_processes):
        with suppress(InterruptedError):
            call(own, send)
    return [call(own, lambda part: parts) for own in range(num_processes)], parts


def test_every_entry_belongs_to_a_stage():
    net = Net()
    ownership = owned(net)
    assert {name: ownership.stage(name) for name in STAGES} == STAGES
    # Entries that are no parameters belong to the module around them.
    assert [ownership.stage(key) for key in ("block.0.tile.hidden", "block.1.tile", "unknown.tile", "")] == [1, 2, 2, 2]
    parameters = {name: stage for name, stage in STAGES.items() if name not in ("norm.running_mean", "count")}
    assert ownership.owners | parameters == ownership.owners
    assert {name: ownership.stage_of(net.get_parameter(name)) for name in parameters} == parameters
    assert ownership.owners.keys() == {name for name, _ in net.named_parameters(remove_duplicate=False)}


def test_states_of_modules_are_merged():
    """Check processes whose values are their own stage, or 9 where another process has the right value."""
    net = Net()
    ownership = owned(net)
    process = dict.fromkeys(net.state_dict(), 9) | {"block.0.tile": {"weight": 9, "shape": (3, 3)}}

    def held(own, name):
        return own if ownership.stage(name) == own else 9

    processes = [
        {
            name: value | {"weight": held(own, name)} if isinstance(value, dict) else held(own, name)
            for name, value in process.items()
        }
        for own in range(3)
    ]
    results, parts = gathered(lambda own, gather: ownership.merge_state(processes[own], own, gather), 3)
    expected = {name: ownership.stage(name) for name in process} | {"block.0.tile": {"weight": 1, "shape": (3, 3)}}
    assert results == [expected] * 3
    assert [*results[0]] == [*process]
    # Each process sends its own values only.
    for own, (part, _) in enumerate(parts):
        assert {*part} == {name for name in process if ownership.stage(name) == own}


def test_what_every_process_has_is_not_sent():
    """Check an entry of which nothing is sent, as of a tile's configuration."""
    ownership = owned(Net())
    assert ownership.merge_state({"scale": 1, "first.weight": 2}, 0, lambda part: [[{"scale": 3}, {}]]) == {
        "scale": 3,
        "first.weight": 2,
    }


def test_a_buffer_is_taken_from_the_stage_that_has_written_it():
    """Check a buffer of the whole module, which the last stage of three would hold, and the first has written."""
    ownership = owned(Net())
    mine = {"count": 7, "first.weight": 1}
    answers = [[[mine | {"count": 9}, {}], [{}, {}], [{}, {"count": 0}]], [{"count": 7}, {}, {}]]
    sent = []
    merged = ownership.merge_state(mine, 0, lambda part: sent.append(part) or answers[len(sent) - 1])
    assert merged == mine
    assert sent == [[{"first.weight": 1}, {}], {"count": 7}]
    sent = []
    merged = ownership.merge_state(
        {"count": "?"}, 2, lambda part: sent.append(part) or answers[len(sent) - 1], {"count": 0}
    )
    assert merged == {"count": 7}
    assert sent == [[{}, {"count": 0}], {}]


@pytest.mark.parametrize("kind", [torch.optim.Adam, lambda groups: torch.optim.SGD(groups, momentum=0.9)])
def test_states_of_optimizers_are_merged(kind):
    net = Net()
    ownership = owned(net)
    parameters = [*net.parameters()]
    optimizer = kind([{"params": parameters[5:], "lr": 0.1}, {"params": parameters[:5], "lr": 0.2}])
    ordered = parameters[5:] + parameters[:5]
    for parameter in ordered:
        parameter.grad = torch.full_like(parameter, 3.0)
    optimizer.step()
    whole = copy.deepcopy(optimizer.state_dict())
    states = {parameter: dict(state) for parameter, state in optimizer.state.items()}

    def merge(own, gather):
        """Be a process that has right values for its own stage, and no state for the first stage's, or a wrong one."""
        optimizer.state.clear()
        for parameter, state in states.items():
            if ownership.stage_of(parameter) == own:
                optimizer.state[parameter] = state
            elif ownership.stage_of(parameter) > 0:
                optimizer.state[parameter] = {"wrong": 0}
        return ownership.merge_optimizer(optimizer, own, gather)

    results, parts = gathered(merge, 3)
    for own, part in enumerate(parts):
        assert {*part} == {index for index, parameter in enumerate(ordered) if ownership.stage_of(parameter) == own}
    for merged in results:
        assert merged.keys() == whole.keys()
        assert merged["param_groups"] == whole["param_groups"]
        assert [*merged["state"]] == [*range(len(ordered))]
        torch.testing.assert_close(merged["state"], whole["state"], rtol=0, atol=0)
