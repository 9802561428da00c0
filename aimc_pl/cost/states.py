"""This module finds out how many numbers an optimizer keeps for each parameter."""

import inspect
from collections import defaultdict
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from aimc_pl.analog import is_analog
from aimc_pl.errors import UsageError
from aimc_pl.private_torch import attributes_of_optimizer


def states_of(optimizer: Optimizer) -> float:
    """Return how many numbers an optimizer keeps for each digital parameter that learns, in the mean.

    A copy of the optimizer makes a step on copies of the parameters. So Adam gives 2, and SGD 1 with momentum or else
    0. Single numbers, such as a count of steps, do not count.

    Raises:
        UsageError: if the optimizer runs the training step itself (LBFGS), or if its copy cannot make a step.
    """
    name = type(optimizer).__name__
    if needs_closure(optimizer):
        raise UsageError(
            f"{name} runs the training step several times for an update, which the cost model cannot count: choose "
            "another optimizer"
        )
    copies: dict[int, Any] = {}
    groups = []
    for group in optimizer.param_groups:
        learning = [each for each in group["params"] if each.requires_grad and not is_analog(each)]
        copies |= {id(each): nn.Parameter(each.detach().clone()) for each in learning}
        groups.append({**group, "params": [copies[id(each)] for each in learning]})
    if not copies:
        return 0.0
    try:
        trial = _copied(optimizer, groups, copies)
        for copied in copies.values():
            copied.grad = torch.zeros_like(copied)
        with torch.random.fork_rng(devices=[]):
            type(trial).step(trial)
    except Exception as error:  # a user's optimizer may raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"the cost model cannot count the numbers that {name} keeps: a step of its copy failed ({reason:.80})"
        ) from error
    kept = [value for state in trial.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(value.numel() for value in kept if value.ndim) / sum(copied.numel() for copied in copies.values())


def needs_closure(optimizer: Optimizer) -> bool:
    """Return whether an optimizer's step, or one that it extends, runs the training step itself, as that of LBFGS."""
    steps = [vars(kind)["step"] for kind in type(optimizer).__mro__ if "step" in vars(kind)]
    arguments = [inspect.signature(step).parameters.get("closure") for step in steps]
    return any(argument is not None and argument.default is inspect.Parameter.empty for argument in arguments)


def _copied(optimizer: Optimizer, groups: Any, copies: dict[int, Any]) -> Optimizer:
    """Return a copy of an optimizer, without hooks, that has the copied parameters in place of its own."""
    memo = {**copies}
    copied = object.__new__(type(optimizer))
    vars(copied).update(deepcopy(attributes_of_optimizer(optimizer), memo))
    states = {copies[id(each)]: deepcopy(own, memo) for each, own in optimizer.state.items() if id(each) in copies}
    copied.__setstate__({"param_groups": groups, "state": defaultdict(dict, states)})
    return copied
