"""These tests check that one optimizer that steps stage by stage does the same as an optimizer per stage."""

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from user_code import CountingSGD, CountsStepsInAnAttribute

from aimc_pl.errors import UsageError
from aimc_pl.stage import Stage
from aimc_pl.strategies.stage_optimizer import StageOptimizer


def make_parameters():
    torch.manual_seed(3)
    return [nn.Parameter(torch.randn(size, dtype=torch.float64)) for size in (3, 2, 4, 1)]


def make_schedule(optimizer):
    """Return a scheduler, which also changes the momentum if there is one."""
    if "momentum" in optimizer.param_groups[0]:
        return OneCycleLR(optimizer, 0.5, total_steps=20)
    return LambdaLR(optimizer, lambda step: 0.9**step)


OPTIMIZERS = {
    "momentum": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, 0.1),
    "counting": lambda parameters: CountingSGD(parameters, 0.1),
    "counting in a tensor": lambda parameters: CountingInATensor(parameters, 0.1),
    "lowers its rate": lambda parameters: LowersItsRate(parameters, 0.1),
}


class CountingInATensor(CountingSGD):
    """An optimizer that counts steps in a tensor in its groups, and changes the tensor in place."""

    def step(self, closure=None):
        for group in self.param_groups:
            count = group.setdefault("count in a tensor", torch.zeros(()))
            count += 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data -= group["lr"] / count * parameter.grad


class LowersItsRate(torch.optim.SGD):
    """An optimizer that lowers its own learning rate."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            group["lr"] *= 0.9


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("num_groups", [1, 2])
def test_stages_step_as_with_optimizers_of_their_own(make, num_groups):
    """Check stages that step unequally often, and step while other stages have gradients."""
    ours, theirs = make_parameters(), make_parameters()
    stages = [Stage(0, ours[:1]), Stage(1, ours[1:])]
    grouped = [{"params": ours[start::num_groups]} for start in range(num_groups)]
    optimizer = make(grouped)
    references = [make(theirs[:1]), make(theirs[1:])]
    schedules = [make_schedule(o) for o in (optimizer, *references)]
    by_stage = StageOptimizer(optimizer, stages)
    generator = torch.Generator().manual_seed(5)
    for turn in range(6):
        for index in (0, 1, 1) if turn % 2 else (1, 0):
            for own, other in zip(ours, theirs, strict=True):
                own.grad = torch.randn(own.shape, dtype=torch.float64, generator=generator)
                other.grad = own.grad.clone()
            with by_stage.restricted_to(stages[index]):
                by_stage.step()
            references[index].step()
            assert all(parameter.grad is not None for parameter in ours)
            for own, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-14)
        for schedule in schedules:
            schedule.step()
    assert [[*map(id, group["params"])] for group in optimizer.param_groups] == [
        [*map(id, ours[start::num_groups])] for start in range(num_groups)
    ]


def test_a_rate_that_the_optimizer_lowers_stays_lowered_when_a_remedy_scales_it():
    (first, second), weights = make_parameters()[:2], []
    stages = [Stage(0, [first]), Stage(1, [second])]
    by_stage = StageOptimizer(LowersItsRate([first, second], 0.5), stages)
    for rate_factor in (0.5, 0.0, 0.25, 1.0):
        weights.append(first.detach().clone())
        first.grad = torch.ones_like(first)
        with by_stage.restricted_to(stages[0]):
            by_stage.step(rate_factor)
    steps = torch.stack([*weights, first.detach()]).diff(dim=0).mean(1)
    expected = -0.5 * torch.tensor([0.5, 0.0, 0.9 * 0.25, 0.9**2], dtype=torch.float64)
    torch.testing.assert_close(steps, expected, rtol=1e-12, atol=0)


def test_groups_may_be_added():
    """Check parameter groups that are added later, as by callbacks that unfreeze layers."""
    first, second = make_parameters()[:2]
    stages = [Stage(0, [first]), Stage(1, [second])]
    optimizer = torch.optim.SGD([first], 0.5)
    by_stage = StageOptimizer(optimizer, stages)
    optimizer.add_param_group({"params": [second], "lr": 0.25})
    before = second.detach().clone()
    second.grad = torch.ones_like(second)
    with by_stage.restricted_to(stages[1]):
        by_stage.step()
    torch.testing.assert_close(second.detach(), before - 0.25, rtol=1e-12, atol=0)


def test_counts_in_attributes_are_refused_and_nothing_moves():
    parameters = make_parameters()
    stages = [Stage(0, parameters[:2]), Stage(1, parameters[2:])]
    by_stage = StageOptimizer(CountsStepsInAnAttribute.Counting(parameters, 0.1), stages)
    before = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    with (
        pytest.raises(UsageError, match="Counting keeps 'count' for all parameters at once"),
        by_stage.restricted_to(stages[0]),
    ):
        by_stage.step()
    assert all(map(torch.equal, parameters, before))
