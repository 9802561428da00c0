"""One optimizer for stages that update one by one."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from aimc_pl.errors import UsageError
from aimc_pl.stage import Stage

_SHARED = ("params", "lr")
"""Entries of a group that are no stage's own; a learning rate may be a tensor that its scheduler changes in place."""


class StageOptimizer:
    """Lets an optimizer step for the parameters of one stage.

    What an optimizer keeps in its parameter groups (a count of steps, say) it keeps for every stage by itself. What is
    set there from outside, as learning rate schedulers do, is for all stages.

    Args:
        optimizer: of all parameters.
        stages: that update one by one.
    """

    def __init__(self, optimizer: Optimizer, stages: Sequence[Stage]) -> None:
        self.optimizer = optimizer
        self._stages = stages
        self._groups = [[_copied(group) for group in optimizer.param_groups] for _ in stages]
        self._left = [dict(group) for group in optimizer.param_groups]
        self._is_checked = False

    @contextmanager
    def restricted_to(self, stage: Stage) -> Iterator[None]:
        """While it is open, the optimizer has the parameters of a stage only, and what it has kept for these.

        The gradients of other stages are for their own updates, and are not there.
        """
        self._take_over()
        groups = self.optimizer.param_groups
        whole = [group["params"] for group in groups]
        mine = set(map(id, stage.parameters))
        elsewhere = [parameter for other in self._stages if other is not stage for parameter in other.parameters]
        others = [(parameter, parameter.grad) for parameter in elsewhere if parameter.grad is not None]
        own = self._groups[self._stages.index(stage)]
        try:
            for parameter, _ in others:
                parameter.grad = None
            for group, entries, parameters in zip(groups, own, whole, strict=True):
                shared = {key: group[key] for key in _SHARED if key in group}
                group.clear()
                group.update(shared | entries)
                group["params"] = [parameter for parameter in parameters if id(parameter) in mine]
            yield
        finally:
            for group, entries, parameters in zip(groups, own, whole, strict=True):
                entries.update((key, value) for key, value in group.items() if key not in _SHARED)
                group["params"] = parameters
            self._left = [dict(group) for group in groups]
            for parameter, gradient in others:
                parameter.grad = gradient

    def step(self) -> None:
        """Update.

        Raises:
            UsageError: if the optimizer counts in an attribute of its own, which is not by stage.
        """
        if self._is_checked:
            self.optimizer.step()
            return
        before = _numbers(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        weights = [parameter.detach().clone() for parameter in parameters]
        self.optimizer.step()
        self._is_checked = True
        changed = [name for name, value in _numbers(self.optimizer).items() if before.get(name) != value]
        if changed:
            with torch.no_grad():
                for parameter, weight in zip(parameters, weights, strict=True):
                    parameter.copy_(weight)
            raise UsageError(
                f"{type(self.optimizer).__name__} keeps {changed[0]!r} for all parameters at once, and under "
                "schedule='async' the stages step one by one: use another optimizer, or schedule='sync'"
            )

    def _take_over(self) -> None:
        """Give all stages what has been set in the groups since the last step, and new groups."""
        for group in self.optimizer.param_groups[len(self._left) :]:
            self._left.append(dict(group))
            for groups in self._groups:
                groups.append(_copied(group))
        for number, (group, left) in enumerate(zip(self.optimizer.param_groups, self._left, strict=True)):
            changed = {k: v for k, v in group.items() if k not in _SHARED and v is not left.get(k, group)}
            for groups in self._groups if changed else ():
                groups[number].update(changed)


def _copied(group: dict[str, Any]) -> dict[str, Any]:
    return {key: copy.deepcopy(value) for key, value in group.items() if key not in _SHARED}


def _numbers(optimizer: Optimizer) -> dict[str, Any]:
    """Public attributes; torch and its schedulers count in others."""
    found = {name: value for name, value in vars(optimizer).items() if not name.startswith("_")}
    return {
        name: value.clone() if isinstance(value, Tensor) else value
        for name, value in found.items()
        if isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)
    }
