"""The class in this module knows which stage holds which part of a module's state.

It merges the parts that several processes hold.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from aimc_pl.stage import Stage


class Ownership:
    """The stage of every parameter, buffer and analog tile of a module.

    Args:
        module: the whole module.
        stages: all stages. A parameter, buffer or tile that no stage has been seen to use belongs to the stage of the
            module around it, or else to the last stage.
    """

    def __init__(self, module: nn.Module, stages: Sequence[Stage]) -> None:
        of_module = {id(part): stage.index for stage in stages for part in stage.modules}
        of_parameter = {id(parameter): stage.index for stage in stages for parameter in stage.parameters}
        self._of_name = {name: of_module[id(part)] for name, part in module.named_modules() if id(part) in of_module}
        self._of_name |= {
            name: of_parameter[id(parameter)]
            for name, parameter in module.named_parameters(remove_duplicate=False)
            if id(parameter) in of_parameter
        }
        self._last = len(stages) - 1
        self._names = {id(parameter): name for name, parameter in module.named_parameters()}
        self.owners = {name: self.stage(name) for name, _ in module.named_parameters(remove_duplicate=False)}
        """The stage of each parameter, by name."""

    def stage(self, key: str) -> int:
        """Return the stage that holds an entry of the module's state dict."""
        while key:
            if key in self._of_name:
                return self._of_name[key]
            key = key.rpartition(".")[0]
        return self._last

    def stage_of(self, parameter: nn.Parameter) -> int:
        """Return the stage that updates a parameter."""
        return self.owners[self._names[id(parameter)]]

    def merge_state(
        self,
        state: dict[str, Any],
        own: int,
        gather: Callable[[Any], list[Any]],
        written: Mapping[str, int] | None = None,
    ) -> dict[str, Any]:
        """Return a module's state dict, with every entry from the process that holds it.

        Args:
            state: the state dict of the module in this process.
            own: the stage of this process.
            gather: returns the values of all processes.
            written: the stages that have written last to buffers whose values this process does not have, by name.
        """
        written = written or {}
        mine = {key: value for key, value in state.items() if self.stage(key) == own and key not in written}
        parts = gather([without_common(mine), {key: stage for key, stage in written.items() if self.stage(key) == own}])
        merged = {key: value for known, _ in parts for key, value in known.items()}
        # The code of a module that holds several stages may write to its buffers in any of them.
        elsewhere = {key: stage for _, moved in parts for key, stage in moved.items() if key in state}
        if elsewhere:
            for part in gather({key: state[key] for key, stage in elsewhere.items() if stage == own}):
                merged |= part
        return {
            key: value | merged[key] if isinstance(value, dict) else merged.get(key, value)
            for key, value in state.items()
        }

    def merge_optimizer(self, optimizer: Optimizer, own: int, gather: Callable[[Any], list[Any]]) -> dict[str, Any]:
        """Return an optimizer's state dict, with the state of every parameter from the process that updates it.

        Args:
            optimizer: the optimizer of this process.
            own: the stage of this process.
            gather: returns the values of all processes.
        """
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state = optimizer.state_dict()
        mine = {index: values for index, values in state["state"].items() if self.stage_of(parameters[index]) == own}
        merged: Mapping[int, Any] = {index: value for part in gather(mine) for index, value in part.items()}
        return state | {"state": {index: merged[index] for index in sorted(merged)}}


def without_common(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict without what every process has.

    These are the configurations of tiles, and the parameters that stand for the weights of tiles.
    """
    # Their classes are recognized by the names of their Python modules: a digital run may have no aihwkit to import.
    return {
        key: without_common(value) if isinstance(value, dict) else value
        for key, value in state.items()
        if not any(kind.__module__.startswith("aihwkit.") for kind in type(value).__mro__)
    }
