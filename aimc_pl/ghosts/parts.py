"""Parts of a step: modules that are run, or skipped, as a whole, and modules with which a stage begins."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from aimc_pl.analog import analog_layers
from aimc_pl.private_torch import CALL, call_of
from aimc_pl.weights import product


class Part:
    """A callable of the step whose calls are intercepted: a module, or a method of a metric.

    Args:
        name: the name of the part, for messages and for looking up outcomes.
        module: the module that is called, or whose method is called.
        attribute: the attribute of the module that is replaced while the step runs.
        call: what is called when nothing is replaced.
        opens: the stage that begins with a call of the part; ``None`` if the part is no boundary.
        is_whole: whether the part is run or skipped as a whole.
        is_analog: whether the part is an analog layer, which cannot run on shapes alone.
        owners: the stages of its parameters.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        attribute: str,
        call: Callable[..., Any],
        *,
        opens: int | None = None,
        is_whole: bool = True,
        is_analog: bool = False,
        owners: frozenset[int] = frozenset(),
    ) -> None:
        self.name = name
        self.module = module
        self.attribute = attribute
        self.call = call
        self.opens = opens
        self.is_whole = is_whole
        self.is_analog = is_analog
        self.is_metric = isinstance(module, Metric | MetricCollection)
        self.is_shared = len(owners) > 1
        self.owner = None if self.is_shared else next(iter(owners), None)
        has_state = any(True for _ in module.parameters()) or any(True for _ in module.buffers())
        self.is_stateless = not has_state and not self.is_metric


def parts_of(network: nn.Module, boundaries: Sequence[str], owners: Mapping[str, int]) -> list[Part]:
    """Return the largest modules without a boundary inside, the boundaries, the metrics and the analog layers."""
    opens = {id(network.get_submodule(name)): stage for stage, name in enumerate(boundaries, start=1)}
    wholes = set(map(id, _wholes(network, {id(module) for module in _ancestors(network, boundaries)})))
    analog = set(map(id, analog_layers(network)))
    parts = []
    for name, module in network.named_modules():
        is_metric, is_analog = isinstance(module, Metric | MetricCollection), id(module) in analog
        is_whole = is_metric or is_analog or id(module) in wholes
        if is_whole or id(module) in opens:
            parts.append(
                Part(
                    name,
                    module,
                    CALL,
                    call_of(module),
                    opens=opens.get(id(module)),
                    is_whole=is_whole,
                    is_analog=is_analog,
                    owners=_owners_of(name, module, owners),
                )
            )
        if is_metric:
            parts += [Part(f"{name}.{method}", module, method, getattr(module, method)) for method in _METRIC_METHODS]
    return parts


def _owners_of(name: str, module: nn.Module, owners: Mapping[str, int]) -> frozenset[int]:
    """Return the stages of a module's parameters."""
    names = (f"{name}.{inner}" for inner, _ in module.named_parameters(remove_duplicate=False))
    return frozenset(owners[full] for full in names if full in owners)


def glue_of(network: nn.Module, parts: Sequence[Part]) -> list[nn.Module]:
    """Return the modules whose own code runs in every process: those around the parts that are run as a whole."""
    inside = {id(inner) for part in parts if part.is_whole for inner in part.module.modules()}
    return [module for module in network.modules() if id(module) not in inside]


_METRIC_METHODS = ("update", "compute")


def _ancestors(network: nn.Module, boundaries: Sequence[str]) -> Iterator[nn.Module]:
    yield network
    for name in boundaries:
        path = name.split(".")
        for depth in range(1, len(path)):
            yield network.get_submodule(".".join(path[:depth]))


def _wholes(module: nn.Module, around: set[int]) -> Iterator[nn.Module]:
    for child in module.children():
        is_container = type(child).forward is nn.Module.forward or isinstance(child, nn.ModuleList | nn.ModuleDict)
        if id(child) in around or (is_container and not isinstance(child, MetricCollection)):
            yield from _wholes(child, around)
        else:
            yield child


def digital_result(layer: Any, x: Tensor, like_weight: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
    """Return the result of an analog layer of another stage, found by the layer's digital rule.

    Args:
        layer: an analog Linear or Conv layer.
        x: the input of the layer.
        like_weight: takes a shape, and returns a ghost in place of a weight of that shape.
    """
    if hasattr(layer, "kernel_size"):
        shape = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
    else:
        shape = (layer.out_features, layer.in_features)
    # Tiles compute in float32, whatever autocast says.
    with torch.autocast(x.device.type, enabled=False):
        return product(layer, x.float(), like_weight(shape))
