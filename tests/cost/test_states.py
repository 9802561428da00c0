"""These tests compare the numbers that optimizers keep with what their algorithms say."""

from copy import deepcopy

import pytest
import torch
from torch import nn, optim

from aimc_pl.cost.states import states_of
from aimc_pl.devices import convert_to_analog
from aimc_pl.devices.conversion import make_analog_aware
from aimc_pl.errors import UsageError
from aimc_pl.optim import AsyncNAdam, SpikeCompensatedSGD
from aimc_pl.private_torch import tree_leaves

ROWS, COLUMNS = 3, 5


def parameters():
    return [nn.Parameter(torch.ones(ROWS, COLUMNS)), nn.Parameter(torch.ones(ROWS))]


@pytest.mark.parametrize(
    ("make", "states"),
    [
        (optim.SGD, 0),
        (lambda p: optim.SGD(p, momentum=0.9), 1),
        (lambda p: optim.SGD(p, momentum=0.9, nesterov=True), 1),
        (optim.Adam, 2),
        (optim.AdamW, 2),
        (lambda p: optim.Adam(p, amsgrad=True), 3),
        (optim.NAdam, 2),
        (optim.RAdam, 2),
        (optim.Adamax, 2),
        (optim.Adagrad, 1),
        (optim.Adadelta, 2),
        (optim.ASGD, 1),
        (optim.Rprop, 2),
        (optim.RMSprop, 1),
        (lambda p: optim.RMSprop(p, momentum=0.9), 2),
        (lambda p: optim.RMSprop(p, momentum=0.9, centered=True), 3),
        (SpikeCompensatedSGD, 1),
        (lambda p: AsyncNAdam(p, num_stages=2), 2),
        # a number for each row and each column of a matrix, and one for each number of a vector
        (optim.Adafactor, (ROWS + COLUMNS + ROWS) / (ROWS * COLUMNS + ROWS)),
    ],
)
def test_numbers_that_an_optimizer_keeps(make, states):
    own = parameters()
    optimizer = make(own)
    assert states_of(optimizer) == pytest.approx(states)
    # The optimizer itself has made no step.
    assert all((parameter == 1).all() and parameter.grad is None for parameter in own)
    # After one it is the same, and the state stays as it is.
    for parameter in own:
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
    before = deepcopy((own, optimizer.state_dict()["state"]))
    assert states_of(optimizer) == pytest.approx(states)
    now = own, optimizer.state_dict()["state"]
    pairs = zip(tree_leaves(now), tree_leaves(before), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs if isinstance(a, torch.Tensor))


def test_groups_keep_different_numbers():
    first, second = parameters()
    optimizer = optim.SGD([{"params": [first], "momentum": 0.9}, {"params": [second]}], lr=0.1)
    assert states_of(optimizer) == pytest.approx(ROWS * COLUMNS / (ROWS * COLUMNS + ROWS))


def test_frozen_and_analog_parameters_have_no_numbers():
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    convert_to_analog(network, {"0": "soft_bounds"})
    network[1].bias.requires_grad_(False)
    optimizer = optim.Adam(network.parameters())
    make_analog_aware(optimizer)
    assert states_of(optimizer) == 2
    network.requires_grad_(False)
    assert states_of(optimizer) == 0


def test_hooks_schedulers_and_random_states_notice_nothing():
    optimizer = optim.SGD(parameters(), momentum=0.9)
    optimizer.register_step_pre_hook(lambda *_: pytest.fail("a hook has run"))
    optim.lr_scheduler.StepLR(optimizer, 1)
    state = torch.get_rng_state()
    assert states_of(optimizer) == 1
    assert torch.equal(state, torch.get_rng_state())
    assert not optimizer.state


def test_a_wrapper_does_not_move_the_parameters_of_the_optimizer_in_it():
    class Wrapper(optim.Optimizer):
        def __init__(self, base):
            self.base = base
            super().__init__([p for group in base.param_groups for p in group["params"]], {})

        def step(self, closure=None):
            self.base.step()
            self.state.update(self.base.state)

    own = parameters()
    for parameter in own:
        parameter.grad = torch.ones_like(parameter)
    assert states_of(Wrapper(optim.SGD(own, lr=1.0, momentum=0.9))) == 1
    assert all((parameter == 1).all() for parameter in own)


def analog_lbfgs():
    network = nn.Sequential(nn.Linear(2, 2))
    convert_to_analog(network, "soft_bounds")
    optimizer = optim.LBFGS(network.parameters())
    make_analog_aware(optimizer)
    return optimizer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optim.LBFGS(parameters()), "LBFGS runs the training step several times for an update"),
        (analog_lbfgs, "LBFGS runs the training step several times for an update"),
        (lambda: optim.SparseAdam(parameters()), "cannot count the numbers that SparseAdam keeps: a step of its copy"),
    ],
)
def test_what_cannot_be_counted_is_refused_in_one_line(make, message):
    with pytest.raises(UsageError, match=message) as refused:
        states_of(make())
    assert len(str(refused.value)) <= 200


def test_an_optimizer_that_fails_without_a_message_is_refused():
    class Unfinished(torch.optim.SGD):
        def step(self, closure=None):
            raise NotImplementedError

    with pytest.raises(UsageError, match=r"Unfinished keeps: a step of its copy failed \(NotImplementedError\)$"):
        states_of(Unfinished([torch.nn.Parameter(torch.ones(2))], lr=0.1))
