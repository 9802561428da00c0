"""A network to consecutive pipeline stages: traced with torch.fx, cut between layers, balanced by measured cost."""

import contextlib
import inspect
import operator
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from aihwkit.nn.modules.base import AnalogLayerBase
from aihwkit.optim import AnalogSGD
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from aimc_pl.errors import UsageError
from aimc_pl.stage import Stage

_signature = cache(inspect.signature)
_INTERNALS = (__file__, contextlib.__file__, str(Path(fx.__file__).parent))
_CONSTANTS = (bool, int, float, str, type(None))
_INPLACE_OPERATORS = (operator.iadd, operator.isub, operator.imul, operator.itruediv)


class PartitionError(UsageError):
    """The network cannot be split as asked; the message says why and what to do."""


@dataclass(frozen=True)
class Partition:
    """The stages of a network, and the names of the modules with which stages 1 … M−1 begin."""

    stages: list[fx.GraphModule]
    split_at: list[str]


class _Tracer(fx.Tracer):
    """Traces through containers and own modules; analog layers, torch's layers and what fx cannot trace stay whole."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, AnalogLayerBase):
            return not m.IS_CONTAINER
        # A hook would not run if the module were traced through.
        hooked = m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        return bool(hooked) or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        before, stack = len(self.graph.nodes), self.module_stack.copy()
        try:
            with _nothing_stored(m):
                return super().call_module(m, forward, args, kwargs)
        except Exception:
            # Whatever could not be traced inside (control flow on values, say) runs as it is when the module is kept
            # whole; if it is really broken, running it will say so.
            for node in reversed(list(self.graph.nodes)[before:]):
                self.graph.erase_node(node)
            self.module_stack = stack
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)


@contextmanager
def _nothing_stored(module: nn.Module) -> Iterator[None]:
    """Refuse a forward that leaves values on its module: the traced graph would not do so again."""
    attributes = dict(vars(module))
    try:
        yield
        stored = [name for name, value in vars(module).items() if isinstance(value, fx.Proxy)]
        if stored:
            raise TypeError(f"it stores a value in self.{stored[0]}.")
    finally:
        vars(module).clear()
        vars(module).update(attributes)


def trace(backbone: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> fx.Graph:
    """Trace the backbone's forward into a graph of layers.

    Args:
        backbone: the network; forward hooks keep a module whole.
        args: an example call's positional arguments. Constants among them (and defaults) become part of the graph.
        kwargs: an example call's keyword arguments.

    Raises:
        PartitionError: if the backbone's own forward does what torch.fx cannot trace.
    """
    call = _bind(backbone, args, kwargs or {})
    constants = {name: value for name, value in call.arguments.items() if isinstance(value, _CONSTANTS)}
    try:
        with _nothing_stored(backbone):
            return _Tracer().trace(backbone, constants)
    except Exception as error:
        inside = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_INTERNALS)]
        where = f"`{inside[-1].line}` ({inside[-1].filename}:{inside[-1].lineno})" if inside else "its end"
        raise PartitionError(
            f"{type(backbone).__name__}.forward cannot be split into stages at {where}: {error} "
            "Move what depends on values or shapes into a submodule of its own, which then stays whole on one stage, "
            "or name a smaller network with backbone=."
        ) from error


def partition(
    backbone: nn.Module,
    num_stages: int,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    split_at: Sequence[str] | None = None,
) -> Partition:
    """Split the backbone into ``num_stages`` consecutive stages that share its modules (and their names).

    Args:
        backbone: the network. With ``split_at=None`` it is trained on the example to measure its layers, which changes
            weights and random states: pass a copy, and its ``split_at`` to the call for the original.
        num_stages: M.
        args: positional arguments of an example call, one micro-batch.
        kwargs: keyword arguments of that call.
        split_at: names of the modules with which stages 1 … M−1 begin; ``None`` balances the stages by the time that
            forward, backward and update take for the example.

    Raises:
        PartitionError: if the network cannot be traced, has fewer layers than stages, or cannot be cut where asked.
    """
    graph = trace(backbone, args, kwargs)
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    uses = _parameter_uses(backbone, nodes)
    if split_at is not None:
        cuts = _find_cuts(nodes, uses, num_stages, split_at)
    else:
        layers = sorted({position for positions in uses.values() for position in positions})
        allowed = [cut for cut in layers[1:] if not any(used[0] < cut <= used[-1] for used in uses.values())]
        if num_stages > len(allowed) + 1:
            raise PartitionError(
                f"{num_stages} stages need at least {num_stages} layers that can be split apart, and "
                f"{type(backbone).__name__} has {len(allowed) + 1 if layers else 0} (layers that share a parameter, "
                "and modules that cannot be traced, count as one). Lower num_stages or name a larger backbone."
            )
        costs = _measure(_cut(backbone, graph, nodes, allowed), bind_inputs(backbone, args, kwargs or {}))
        # In tenths of the largest: what differs by less is equal, so that noise seldom moves a boundary.
        rounded = [round(10 * cost / max(costs)) for cost in costs]
        cuts = [allowed[unit - 1] for unit in balance(rounded, num_stages)]
        split_at = [str(nodes[cut].target) for cut in cuts]
    return Partition(_cut(backbone, graph, nodes, cuts), list(split_at))


def bind_inputs(backbone: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """The values that enter stage 0 for one call of the backbone: its arguments, in the order of its signature."""
    return tuple(_bind(backbone, args, kwargs).arguments.values())[1:]


def _bind(backbone: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
    call = _signature(type(backbone).forward).bind(backbone, *args, **kwargs)
    call.apply_defaults()
    return call


def balance(costs: Sequence[float], num_stages: int) -> list[int]:
    """Where to cut a row of units so that the most expensive of ``num_stages`` consecutive groups is cheapest.

    Returns:
        The indices of the units with which groups 1 … M−1 begin.
    """

    @cache
    def best(start: int, groups: int) -> tuple[float, tuple[int, ...]]:
        if groups == 1:
            return sum(costs[start:]), ()
        options = []
        for end in range(start + 1, len(costs) - groups + 2):
            rest, cuts = best(end, groups - 1)
            options.append((max(sum(costs[start:end]), rest), (end, *cuts)))
        return min(options)

    return list(best(0, num_stages)[1])


def _parameter_uses(backbone: nn.Module, nodes: Sequence[fx.Node]) -> dict[nn.Parameter, list[int]]:
    """For every parameter, the positions of the nodes that read it."""
    uses: dict[nn.Parameter, list[int]] = {}
    for position, node in enumerate(nodes):
        for parameter in _parameters_of(backbone, node):
            uses.setdefault(parameter, []).append(position)
    return uses


def _parameters_of(backbone: nn.Module, node: fx.Node) -> list[nn.Parameter]:
    if node.op == "call_module":
        return list(backbone.get_submodule(str(node.target)).parameters())
    if node.op == "get_attr":
        path, _, name = str(node.target).rpartition(".")
        value = getattr(backbone.get_submodule(path), name)
        return [value] if isinstance(value, nn.Parameter) else []
    return []


def _find_cuts(
    nodes: Sequence[fx.Node], uses: Mapping[nn.Parameter, list[int]], num_stages: int, split_at: Sequence[str]
) -> list[int]:
    if len(split_at) != num_stages - 1:
        raise PartitionError(f"{num_stages} stages need {num_stages - 1} names in split_at, got {len(split_at)}.")
    cuts = []
    for name in split_at:
        inside = [
            i for i, node in enumerate(nodes) if node.target == name or name in node.meta.get("nn_module_stack", {})
        ]
        if not inside:
            known = dict.fromkeys(str(node.target) for node in nodes if node.op == "call_module")
            raise PartitionError(f"split_at names {name!r}, which the network does not call; it calls {[*known]}.")
        cuts.append(inside[0])
    if any(later <= earlier for earlier, later in pairwise([0, *cuts])):
        raise PartitionError(
            f"split_at={list(split_at)} leaves a stage empty or is out of order: name modules in the order in which "
            "they run, and not the first one (stage 0 begins with it)."
        )
    for cut, name in zip(cuts, split_at, strict=True):
        if any(used[0] < cut <= used[-1] for used in uses.values()):
            raise PartitionError(
                f"split_at={name!r} would put a parameter that is used before and after it on two stages. "
                "Tied parameters must stay on one stage: split elsewhere."
            )
    return cuts


def _cut(backbone: nn.Module, graph: fx.Graph, nodes: Sequence[fx.Node], cuts: Sequence[int]) -> list[fx.GraphModule]:
    """One graph module per run of nodes; each takes and returns the tuple of values that cross its boundaries."""
    result = next(node for node in graph.nodes if node.op == "output")
    groups = [nodes[start:end] for start, end in pairwise([0, *cuts, len(nodes)])]
    crossing = [node for node in graph.nodes if node.op == "placeholder"]
    stages = []
    for index, group in enumerate(groups):
        stage = fx.Graph()
        values = {node: stage.placeholder(node.name) for node in crossing}
        received = set(values.values())
        for node in group:
            values[node] = stage.node_copy(node, values.__getitem__)
            target = values[node].args[0] if values[node].args else None
            if target in received and _is_inplace(backbone, node):
                # What another stage sent (and may keep for its backward) is not to be overwritten.
                with stage.inserting_before(values[node]):
                    copy = stage.call_method("clone", (target,))
                values[node].update_arg(0, copy)
        if index == len(groups) - 1:
            stage.output(fx.map_arg(result.args[0], values.__getitem__))
        else:
            needed = {value for later in [*groups[index + 1 :], [result]] for n in later for value in n.all_input_nodes}
            crossing = [node for node in values if node in needed]
            stage.output(tuple(values[node] for node in crossing))
        stages.append(fx.GraphModule(backbone, stage))
    return stages


def _is_inplace(backbone: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return getattr(backbone.get_submodule(str(node.target)), "inplace", False)
    if node.op == "call_method":
        return str(node.target).endswith("_")
    return node.target in _INPLACE_OPERATORS or bool(node.kwargs.get("inplace"))


def _measure(units: Sequence[nn.Module], inputs: tuple[Any, ...], repeats: int = 5) -> list[float]:
    """Seconds of forward, backward and update of each unit: the best of ``repeats`` runs, after one to warm up."""
    stages = [Stage(index, unit) for index, unit in enumerate(units)]
    optimizers = [AnalogSGD(stage.parameters, lr=0.1) if stage.parameters else None for stage in stages]
    costs = [float("inf")] * len(stages)
    for repeat in range(repeats + 1):
        seconds = [0.0] * len(stages)
        values: Any = inputs
        for stage in stages:
            start = time.perf_counter()
            values = stage.forward(repeat, values)
            seconds[stage.index] += time.perf_counter() - start
        # As large as those of a mean over the outputs: the time of pulsed updates depends on it.
        gradients = tree_map(
            lambda v: torch.randn_like(v) / v.numel() if isinstance(v, Tensor) and v.requires_grad else None, values
        )
        for stage in reversed(stages):
            start = time.perf_counter()
            gradients = stage.backward(repeat, gradients)
            if (optimizer := optimizers[stage.index]) is not None:
                optimizer.step()
                optimizer.zero_grad()
            seconds[stage.index] += time.perf_counter() - start
        if repeat:
            costs = [min(pair) for pair in zip(costs, seconds, strict=True)]
    return costs
