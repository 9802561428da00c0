"""The state of a forward, shared by the code that computes this stage's stretch and the code that imagines the others.

A *stretch* is the part of the step that one stage computes. An *event* is a module or a torch function that is called
in it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aimc_pl.ghosts import refusals
from aimc_pl.ghosts.apart import ForeignParameter
from aimc_pl.ghosts.arrivals import Arrivals, name_of_value
from aimc_pl.ghosts.learning import Learned
from aimc_pl.ghosts.trail import Trail
from aimc_pl.ghosts.values import SIMPLE, Ghost, Key, Unknown, tensors_in
from aimc_pl.private_torch import without_functions


@dataclass
class Setting:
    """What all forwards of a stage have in common.

    Attributes:
        boundaries: the names of the modules whose calls begin stages 1 … M−1.
        own: the stage of this process.
        owners: the stage of each parameter, by ``id``.
        names: the name of each parameter, by ``id``.
        module: the module that runs the step.
        glue: the modules whose own code runs in every process.
        watched: the modules whose attributes this stage may read.
        example: a tensor on the device on which this stage computes.
        generators: torch's random number generators, on that device and on the CPU.
        learned: what past forwards of this stage have shown.
    """

    boundaries: Sequence[str]
    own: int
    owners: Mapping[int, int]
    names: Mapping[int, str]
    module: nn.Module
    glue: Sequence[nn.Module]
    watched: Sequence[nn.Module]
    example: Tensor
    generators: Sequence[torch.Generator]
    learned: Learned


class State:
    """The state of a forward.

    Attributes:
        stretch: the stage whose stretch of the step runs now.
        inside: whether an event is under way. Calls inside an event are not counted as events.
        kept: the values of this stage that later stages need, by key, as far as that is known.
        needs: the keys of the values that later stages have been seen to need.
        written: the addresses of the storages of batch-only values that have been written to, each with the stage that
            has written and the tensor.
        metrics: the stages that have updated metrics which this process has not, by the ``id`` of the metric.
    """

    def __init__(self, setting: Setting, arrivals: Arrivals, trail: Trail) -> None:
        self.setting = setting
        self.own = setting.own
        self.arrivals = arrivals
        self.trail = trail
        self.stretch = 0
        self.inside = False
        self.kept: dict[Key, Tensor] = {}
        self.needs: dict[Key, None] = {}
        self.written: dict[int, tuple[int, Tensor]] = {}
        self.metrics: dict[int, int] = {}

    def are_common(self, values: Iterable[Any]) -> bool:
        """Return whether all values derive from the batch alone. Every process has such values."""
        return all(map(self.is_common, values))

    def is_common(self, value: Any) -> bool:
        """Return whether a value derives from the batch alone. Every process has such a value."""
        kind = type(value)
        if kind is Tensor:
            return self._is_common_tensor(value)
        if kind is Ghost or kind is ForeignParameter or kind is Unknown:
            return False
        if kind in SIMPLE:
            return True
        if kind is tuple or kind is list:
            return all(map(self.is_common, value))
        if isinstance(value, nn.Parameter):
            return id(value) not in self.setting.owners
        if isinstance(value, Tensor):
            return self._is_common_tensor(value)
        return self.are_common(tensors_in(value))

    def _is_common_tensor(self, tensor: Tensor) -> bool:
        if name_of_value(tensor) is not None:
            return False
        with without_functions():
            if self.written and tensor.untyped_storage().data_ptr() in self.written:
                return False
            return tensor.grad_fn is None

    def note_write(self, tensor: Tensor) -> None:
        """Note a write to a value that derives from the batch alone.

        Tensors that share its memory no longer count as derived from the batch alone.
        """
        self.written[tensor.untyped_storage().data_ptr()] = self.stretch, tensor

    def check_parameters(self, parameters: Iterable[Tensor]) -> None:
        """Check that parameters belong to the stage that computes with them now.

        Raises:
            UsageError: if a parameter belongs to another stage.
        """
        for parameter in parameters:
            if isinstance(parameter, nn.Parameter):
                owner = self.setting.owners.get(id(parameter))
                if owner is not None and owner != self.stretch:
                    raise refusals.shared(self.setting.names[id(parameter)], owner, self.stretch)
