"""This module determines where the stages of a training step begin.

A stage begins with the call of a module. The user names these modules, or they are found by measuring.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import accumulate, pairwise

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from aimc_pl.analog import inside_analog_layers, time_update
from aimc_pl.arguments import listed
from aimc_pl.cost.constants import Hardware
from aimc_pl.cost.stages import stage_cost
from aimc_pl.cost.work import count_work
from aimc_pl.errors import UsageError
from aimc_pl.flight import Flight, StagedStep
from aimc_pl.private_torch import is_checkpointing
from aimc_pl.stage import Stage
from aimc_pl.trial import Trials


class BoundaryError(UsageError):
    """An error raised when a step cannot be split as asked. The message says why and what to do."""


class Calls:
    """The modules that a step calls, in the order of their first calls.

    Args:
        with_gradients: whether to count only calls with gradients enabled and outside of checkpointed regions.

    Attributes:
        with_gradients: see above.
        names: the names of the modules that could open a stage.
        others: the names of the modules called without gradients, or inside a checkpointed region.
    """

    def __init__(self, *, with_gradients: bool = True) -> None:
        self.names: list[str] = []
        self.others: list[str] = []
        self.with_gradients = with_gradients

    @contextmanager
    def recorded(self, network: nn.Module) -> Iterator[None]:
        """Context manager that records the calls of the network's modules. The whole step must run inside it."""
        # A layer on several tiles is one layer.
        inside = inside_analog_layers(network)
        names = {id(module): name for name, module in network.named_modules() if name and id(module) not in inside}
        seen: set[int] = set()

        def note(module: nn.Module, args: object) -> None:
            if id(module) not in names or id(module) in seen:
                return
            if self.with_gradients and (is_checkpointing() or not torch.is_grad_enabled()):
                self.others.append(names[id(module)])
                return
            seen.add(id(module))
            self.names.append(names[id(module)])

        handle = register_module_forward_pre_hook(note)
        try:
            yield
        finally:
            handle.remove()


def check(calls: Calls, split_at: Sequence[str]) -> None:
    """Check that the modules that ``split_at`` names can open stages, in this order.

    Raises:
        BoundaryError: if a module cannot open a stage (the message names the first), or if the order is another one.
    """
    for name in split_at:
        if name not in calls.names and name in calls.others:
            raise BoundaryError(
                f"split_at names {name!r}, which training_step calls without gradients (in no_grad) or inside a "
                "checkpointed region: begin the stage before or after it, or with the region"
            )
        if name not in calls.names:
            raise BoundaryError(
                f"split_at names {name!r}, which training_step does not call (no stage begins in a compiled function); "
                f"it calls {listed(calls.names, 50)}"
            )
    positions = [calls.names.index(name) for name in split_at]
    if any(later <= earlier for earlier, later in pairwise(positions)):
        raise BoundaryError(
            "split_at is out of order: name modules in the order in which training_step calls them, which is "
            f"{listed([name for name in calls.names if name in split_at])}"
        )


def check_stages(stages: Sequence[Stage], split_at: Sequence[str]) -> None:
    """Check that every stage uses a parameter or calls a layer.

    Raises:
        BoundaryError: if a stage is empty. The message names the first such stage.
    """
    for stage in stages:
        if not stage.parameters and all([*module.children()] for module in stage.modules):
            raise BoundaryError(
                f"split_at={list(split_at)} leaves stage {stage.index} empty: it uses no parameter and calls no layer. "
                "Name modules with layers before, between and after them"
            )


def find(
    trials: Trials,
    calls: Calls,
    num_stages: int,
    *,
    may_share: bool,
    repeats: int = 1,
    hardware: Hardware | None = None,
) -> tuple[list[str], list[float]]:
    """Find the boundaries with which the most expensive stage is as cheap as possible.

    Args:
        trials: runs of the step, on at least one micro-batch.
        calls: the modules that an undivided run has called.
        num_stages: M, the number of stages.
        may_share: whether two stages may use the same parameter.
        repeats: the number of runs to measure. Of each cost, the smallest measurement counts.
        hardware: the hardware on which to model the times. By default they are measured, on this machine.

    Returns:
        The names of the modules with which stages 1 … M−1 begin, and each stage's share of the time that the forward,
        the backward and the tiles' update take.

    Raises:
        BoundaryError: if the step can be split at fewer places than needed.
    """
    parts = [Stage(index) for index in range(len(calls.names) + 1)]
    step = StagedStep(trials.network, calls.names, parts, overlaps=False, with_gradients=calls.with_gradients)
    costs = [float("inf")] * len(parts)
    uses: list[set[int]] = [set() for _ in parts]
    for _ in range(repeats):
        with trials.fresh(), step.running(), step.recording():
            flight = Flight(step, trials.functions[0])
            costs = [min(pair) for pair in zip(costs, _measure(flight, parts), strict=True)]
            for used, leaves in zip(uses, flight.leaves, strict=True):
                used.update(map(id, leaves))
    # As in StagedStep.settle, a parameter that the graph does not show belongs where its module is called.
    shown = set().union(*uses)
    for used, part in zip(uses, parts, strict=True):
        own = [parameter for module in part.modules for parameter in module.parameters(recurse=False)]
        used.update(id(parameter) for parameter in own if id(parameter) not in shown)
    cuts = _allowed(uses, calls.names, may_share)
    if len(cuts) < num_stages - 1:
        raise BoundaryError(
            f"{num_stages} stages need at least {num_stages} layers that can be split apart, and training_step calls "
            f"{len(cuts) + 1 if any(uses) else 0}{_shared(trials.network, uses, may_share)}. Lower num_stages"
        )
    if hardware is not None:
        costs = _model(trials, calls.names, hardware)
    units = [sum(costs[a:b]) for a, b in pairwise([0, *cuts, len(parts)])]
    # Measured costs are rounded to tenths of the largest: noise, usually smaller, then seldom moves a boundary.
    rounded = [max(round(10 * unit / max(units)), 0.1) for unit in units]
    chosen = balance(rounded if hardware is None else units, num_stages)
    ends = [cuts[unit - 1] for unit in chosen]
    shares = [sum(costs[a:b]) / sum(costs) for a, b in pairwise([0, *ends, len(parts)])]
    return [calls.names[end - 1] for end in ends], shares


def _shared(network: nn.Module, uses: Sequence[set[int]], may_share: bool) -> str:
    """Return a remark for a message that names the parameters which layers share, or an empty string."""
    if may_share:
        return ""
    counts = Counter(parameter for used in uses for parameter in used)
    names = [name for name, parameter in network.named_parameters() if counts[id(parameter)] > 1]
    return f" (layers that share a parameter count as one, here {listed(names, 40)})" if names else ""


def _measure(flight: Flight, parts: Sequence[Stage]) -> list[float]:
    """Return the seconds that the forward, the backward and the tiles' update of each part take."""

    def timed(operation: Callable[[int], object], index: int) -> float:
        start = time.perf_counter()
        operation(index)
        return time.perf_counter() - start

    seconds = [timed(flight.forward, part.index) for part in parts]
    if flight.loss is not None:
        for part in reversed(parts):
            seconds[part.index] += timed(flight.backward, part.index)
            seconds[part.index] += sum(time_update(module) for module in part.modules)
    return seconds


def _model(trials: Trials, names: Sequence[str], hardware: Hardware) -> list[float]:
    """Return the seconds that hardware would take for the forward, the backward and the update of each part."""
    with trials.fresh():
        works = count_work(trials.network, trials.functions[0], names, int(hardware.tile_size.value))
    costs = [stage_cost(work, hardware) for work in works]
    return [(cost.forward + cost.backward + cost.update + cost.step).seconds for cost in costs]


def _allowed(uses: Sequence[set[int]], names: Sequence[str], may_share: bool) -> list[int]:
    """Return the parts with which a stage may begin.

    Between two successive parts with parameters there is one, that of the outermost module. Without ``may_share``, the
    parts before it and the parts from it on must have no parameter in common.
    """
    with_parameters = [part for part, used in enumerate(uses) if used]
    cuts = []
    for before, after in pairwise(with_parameters):
        cut = min(range(after, before, -1), key=lambda part: names[part - 1].count("."))
        if may_share or not set().union(*uses[:cut]) & set().union(*uses[cut:]):
            cuts.append(cut)
    return cuts


def balance(costs: Sequence[float], num_stages: int) -> list[int]:
    """Divide a row of units into ``num_stages`` consecutive groups, the most expensive of them as cheap as possible.

    Returns:
        The indices of the units with which groups 1 … M−1 begin.
    """
    sums = [0.0, *accumulate(costs)]

    @cache
    def best(start: int, groups: int) -> tuple[float, tuple[int, ...]]:
        if groups == 1:
            return sums[-1] - sums[start], ()
        options = []
        for end in range(start + 1, len(costs) - groups + 2):
            rest, cuts = best(end, groups - 1)
            options.append((max(sums[end] - sums[start], rest), (end, *cuts)))
        return min(options)

    return list(best(0, num_stages)[1])
