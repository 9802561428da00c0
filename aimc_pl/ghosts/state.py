"""Where a forward stands, for the code that computes this stage's stretch and for that which imagines the others'."""

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
    """What all forwards of a stage share.

    Attributes:
        boundaries: names of the modules that open stages 1 … M−1.
        own: the stage of this process.
        owners: the stage of each parameter, by ``id``.
        names: the name of each parameter, by ``id``.
        module: that runs the step.
        glue: the modules whose own code runs in every process.
        watched: the modules whose attributes this stage may read.
        example: a tensor on the device where this stage computes.
        generators: torch's, on that device and on the CPU.
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
    """Where a forward stands.

    Attributes:
        stretch: the stage whose stretch of the step runs.
        inside: whether an event is under way; what happens inside of events is not counted.
        kept: values of this stage that later ones need, as far as it is known.
        needs: what later stages have been seen to need.
        written: the storages of values of the batch alone that have been written to, with the stage that did.
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

    def are_common(self, values: Iterable[Any]) -> bool:
        """Whether they come of the batch alone, so that every process has them."""
        return all(map(self.is_common, values))

    def is_common(self, value: Any) -> bool:
        """Whether a value comes of the batch alone, so that every process has it."""
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
        """A value of the batch alone has been written to: what shares its memory is not common any more."""
        self.written[tensor.untyped_storage().data_ptr()] = self.stretch, tensor

    def check_parameters(self, parameters: Iterable[Tensor]) -> None:
        """Refuse parameters of another stage than the one that computes with them."""
        for parameter in parameters:
            if isinstance(parameter, nn.Parameter):
                owner = self.setting.owners.get(id(parameter))
                if owner is not None and owner != self.stretch:
                    raise refusals.shared(self.setting.names[id(parameter)], owner, self.stretch)
