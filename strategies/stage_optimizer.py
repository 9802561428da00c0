"""With the class in this module, one optimizer updates the stages one by one."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from aimc_pl.errors import UsageError
from aimc_pl.stage import Stage

_ABSENT = object()


class StageOptimizer:
    """An optimizer of all parameters that can step for the parameters of one stage.

    What the optimizer keeps in its parameter groups, such as a count of steps, is kept for each stage separately. What
    is set there from outside, as learning rate schedulers do, applies to all stages.

    Args:
        optimizer: the optimizer of all parameters.
        stages: the stages that update one by one.
    """

    def __init__(self, optimizer: Optimizer, stages: Sequence[Stage]) -> None:
        self.optimizer = optimizer
        self._stages = stages
        self._own: list[list[dict[str, Any]]] = []
        """For every group and every stage, the entries that steps change, as the stage has left them."""
        self._left: list[dict[str, Any]] = []
        """The groups after the last step."""
        self._is_checked = False
        self._take_over()

    @contextmanager
    def restricted_to(self, stage: Stage) -> Iterator[None]:
        """Context manager that restricts the optimizer to the parameters of a stage, and to what it has kept for them.

        The gradients of other stages are taken away meanwhile, as they belong to the updates of those stages.
        """
        self._take_over()
        groups, number = self.optimizer.param_groups, self._stages.index(stage)
        whole = [group["params"] for group in groups]
        mine = set(map(id, stage.parameters))
        elsewhere = [parameter for other in self._stages if other is not stage for parameter in other.parameters]
        others = [(parameter, parameter.grad) for parameter in elsewhere if parameter.grad is not None]
        for group, own in zip(groups, self._own, strict=True):
            _put(group, own[number])
            group["params"] = [parameter for parameter in group["params"] if id(parameter) in mine]
        before = [*map(dict, groups)]
        try:
            for parameter, _ in others:
                parameter.grad = None
            yield
        finally:
            for group, own, old, parameters in zip(groups, self._own, before, whole, strict=True):
                for key in _changed(old, group):
                    for other in own:
                        other.setdefault(key, old.get(key, _ABSENT))
                    own[number][key] = group[key]
                group["params"] = parameters
            self._left = [*map(dict, groups)]
            for parameter, gradient in others:
                parameter.grad = gradient

    def step(self, rate_factor: float = 1.0, staleness: int = 0) -> None:
        """Update the parameters to which the optimizer is restricted.

        The first step also checks that the optimizer can keep the stages apart.

        Args:
            rate_factor: the factor of the learning rates in this step.
            staleness: the staleness of the update, for optimizers with an entry of this name in their groups.

        Raises:
            UsageError: if the optimizer counts in an attribute of its own, which all stages would share, or if the
                learning rate is to change and the optimizer has none.
        """
        with _for_one_step(self.optimizer, rate_factor, staleness):
            self._step()

    def _step(self) -> None:
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
        """Give all stages the entries that have been set in the groups since the last step, and new groups."""
        groups = self.optimizer.param_groups
        for group, left, own in zip(groups, self._left, self._own, strict=False):
            for key in _changed(left, group):
                for entries in own:
                    entries.pop(key, None)
        for group in groups[len(self._left) :]:
            self._own.append([_copies(group) for _ in self._stages])
            self._left.append(dict(group))


@contextmanager
def _for_one_step(optimizer: Optimizer, rate_factor: float, staleness: int) -> Iterator[None]:
    """Context manager in which the learning rates of an optimizer are scaled, and its groups know the staleness."""
    if rate_factor != 1 and not all("lr" in group for group in optimizer.param_groups):
        raise UsageError(
            f"a remedy lowers the learning rate, and {type(optimizer).__name__} has no 'lr' in its parameter groups: "
            "use another optimizer, or leave out the remedy"
        )
    before = [{key: group[key] for key in ("lr", "staleness") if key in group} for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        if rate_factor != 1:
            group["lr"] = group["lr"] * rate_factor
        if "staleness" in group:
            group["staleness"] = staleness
    during = [group.get("lr") for group in optimizer.param_groups]
    try:
        yield
    finally:
        for group, entries, rate in zip(optimizer.param_groups, before, during, strict=True):
            if rate_factor and group.get("lr") is not rate:  # the optimizer lowers the learning rate itself
                entries["lr"] = group["lr"] / rate_factor
            group.update(entries)


def _copies(group: dict[str, Any]) -> dict[str, Any]:
    """Return copies of the entries that a step may change in place. ``deepcopy`` makes no copy of other entries."""
    copies = {key: copy.deepcopy(value) for key, value in group.items() if not _is_shared(key, value)}
    return {key: value for key, value in copies.items() if value is not group[key]}


def _changed(old: dict[str, Any], group: dict[str, Any]) -> list[str]:
    if len(old) == len(group) and all(map(is_, old.values(), group.values())):
        return []
    return [key for key, value in group.items() if not _is_shared(key, value) and value is not old.get(key, _ABSENT)]


def _is_shared(key: str, value: Any) -> bool:
    """Tell whether all stages share this entry of a parameter group.

    Schedulers change a learning rate that is a tensor in place.
    """
    return key == "params" or (key == "lr" and isinstance(value, Tensor))


def _put(group: dict[str, Any], entries: dict[str, Any]) -> None:
    for key, value in entries.items():
        if value is _ABSENT:
            group.pop(key, None)
        else:
            group[key] = value


def _numbers(optimizer: Optimizer) -> dict[str, Any]:
    """Return the numbers among an optimizer's public attributes. torch and its schedulers count in private ones."""
    found = {name: value for name, value in vars(optimizer).items() if not name.startswith("_")}
    return {
        name: value.clone() if isinstance(value, Tensor) else value
        for name, value in found.items()
        if isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)
    }
