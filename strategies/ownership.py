"""Which process holds which part of a module's state, and how the parts become one again."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer


class Ownership:
    """The stage of every parameter, buffer and analog tile of a module.

    Args:
        module: whole.
        parts: the modules of the stages, which share their layers with it.
        others: parameters outside of them that a stage updates; what else is outside belongs to the last stage.
    """

    def __init__(self, module: nn.Module, parts: Sequence[nn.Module], others: Sequence[Sequence[nn.Parameter]]) -> None:
        stage_of = {id(layer): index for index, part in enumerate(parts) for layer in part.modules()}
        self._of_parameter = {
            id(parameter): index
            for index, (part, further) in enumerate(zip(parts, others, strict=True))
            for parameter in [*part.parameters(), *further]
        }
        self._of_name = {name: stage_of[id(layer)] for name, layer in module.named_modules() if id(layer) in stage_of}
        named = {name: id(parameter) for name, parameter in module.named_parameters()}
        self._of_name |= {name: self._of_parameter[key] for name, key in named.items() if key in self._of_parameter}
        self._last = len(parts) - 1
        self._parameters = list(module.parameters())

    def stage(self, key: str) -> int:
        """The stage that holds an entry of the module's state dict."""
        while key:
            if key in self._of_name:
                return self._of_name[key]
            key = key.rpartition(".")[0]
        return self._last

    def parameters(self, stage: int) -> list[nn.Parameter]:
        """What a stage updates."""
        return [parameter for parameter in self._parameters if self._of_parameter.get(id(parameter)) == stage]

    def merge_state(self, state: dict[str, Any], own: int, gather: Callable[[Any], list[Any]]) -> dict[str, Any]:
        """A module's state dict, every entry from the process that holds it."""
        parts = gather({key: value for key, value in state.items() if self.stage(key) == own})
        merged = {key: value for part in parts for key, value in part.items()}
        return {key: merged[key] for key in state}

    def merge_optimizer(self, optimizer: Optimizer, own: int, gather: Callable[[Any], list[Any]]) -> dict[str, Any]:
        """An optimizer's state dict, every parameter's state from the process that updates it."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state = optimizer.state_dict()
        mine = {
            index: values
            for index, values in state["state"].items()
            if self._of_parameter.get(id(parameters[index]), self._last) == own
        }
        merged: Mapping[int, Any] = {index: value for part in gather(mine) for index, value in part.items()}
        return state | {"state": {index: merged[index] for index in sorted(merged)}}
