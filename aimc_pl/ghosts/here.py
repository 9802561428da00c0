"""Events of this stage's own stretch, which are computed.

A *stretch* is the part of the step that one stage computes. An *event* is a module or a torch function that is called
in it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aimc_pl.ghosts import refusals
from aimc_pl.ghosts.apart import ForeignParameter
from aimc_pl.ghosts.arrivals import name, name_of_value
from aimc_pl.ghosts.shapes import describe
from aimc_pl.ghosts.state import State
from aimc_pl.ghosts.values import (
    Ghost,
    Key,
    Unknown,
    is_ghost,
    left_in,
    replace,
    replace_directly,
    tensors_in,
)
from aimc_pl.private_torch import version, without_functions


class Here:
    """The part of a forward that computes this stage's events with received values, and gives keys to the results."""

    def __init__(self, state: State) -> None:
        self._state = state

    def operation(self, label: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute a torch function that is called by the code around modules."""
        return self._event(label, func, args, kwargs, replace)

    def module(self, label: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute a module that is run as a whole, where possible while no function mode is active.

        Lists and dictionaries among the arguments stay the same objects.
        """
        return self._event(label, call, args, kwargs, replace_directly)

    def inside(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute a torch function that is called inside an event, and is no event itself."""
        return func(*replace(args, self.resolve), **replace(kwargs, self.resolve))

    def resolve(self, value: Any) -> Any:
        """Return the actual value in place of a ghost, and any other value as it is.

        Raises:
            UsageError: if this stage cannot have the value.
        """
        kind = type(value)
        if kind is Ghost:
            return self._state.arrivals.take(value)
        if kind is Tensor:
            self._check(value)
        elif kind is ForeignParameter:
            raise refusals.shared(value.label, value.stage, self._state.own)
        elif kind is Unknown:
            raise value.error
        return value

    def _check(self, tensor: Tensor) -> None:
        made, state = name_of_value(tensor), self._state
        if made is not None:
            token, (stage, *_) = made
            if token is not state.arrivals.token and (tensor.requires_grad or stage != state.own):
                raise refusals.left_behind(tuple(tensor.shape))
        elif state.written:
            stage, _ = state.written.get(tensor.untyped_storage().data_ptr(), (state.own, None))
            if stage != state.own:
                raise refusals.written_through_a_view(stage, stage)

    def _event(
        self,
        label: str,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        replacing: Callable[[Any, Callable[[Any], Any]], Any],
    ) -> Any:
        state = self._state
        with without_functions():
            given = tensors_in(*args, *kwargs.values())
            args = replacing(args, self.resolve)
            if kwargs:
                kwargs = {key: replacing(value, self.resolve) for key, value in kwargs.items()}
            before = [self._writes(tensor) for tensor in given]
        state.inside = True
        try:
            result = function(*args, **kwargs)
        finally:
            state.inside = False
        with without_functions():
            changed = tuple(n for n, tensor in enumerate(given) if self._writes(tensor) != before[n])
            return self._named(label, result, given, changed, left_in((*args, *kwargs.values()), given))

    def _named(
        self, label: str, result: Any, given: Sequence[Tensor], changed: tuple[int, ...], left: Sequence[Tensor]
    ) -> Any:
        """Give keys to the tensors that an event has made, changed in place or left in a list. Return its result."""
        own, event = self._state.own, self._state.trail.event
        for number in changed:
            self._rename(given[number], (own, event, -1 - number))
        if type(result) is Tensor and self._has_name(result, but_not_of=event):
            # The event returns a tensor that it was given. Other processes cannot always see this. For this reason the
            # result counts as a new tensor in all processes.
            with torch.set_grad_enabled(result.requires_grad or torch.is_grad_enabled()):
                result = result.view_as(result)
        made = [*tensors_in(result), *left]
        for number, tensor in enumerate(made):
            if not self._is_known(tensor, given):
                self._name(tensor, (own, event, number))
        self._state.trail.note(label, describe(label, made, changed))
        return result

    def _has_name(self, tensor: Tensor, but_not_of: int | None = None) -> bool:
        made = name_of_value(tensor)
        if made is None or made[0] is not self._state.arrivals.token:
            return False
        return made[1][:2] != (self._state.own, but_not_of)

    def _is_known(self, tensor: Tensor, given: Sequence[Tensor]) -> bool:
        if self._has_name(tensor) or (type(tensor) is not Tensor and isinstance(tensor, Ghost | nn.Parameter)):
            return True
        return name_of_value(tensor) is None and any(tensor is value for value in given)

    def _name(self, tensor: Tensor, key: Key) -> None:
        name(tensor, self._state.arrivals.token, key)
        if key in self._state.setting.learned.wanted:
            self._state.kept[key] = tensor

    def _rename(self, tensor: Tensor, key: Key) -> None:
        """Give a new key to a value that has been changed in place."""
        if is_ghost(tensor):
            value = self._state.arrivals.rename(tensor.key, key) if tensor.key else None
            if value is not None:
                self._name(value, key)
            tensor.rename(key, self._state.stretch)
        elif not isinstance(tensor, nn.Parameter):
            if name_of_value(tensor) is None:
                self._state.note_write(tensor)
            self._name(tensor, key)

    def _writes(self, tensor: Tensor) -> int:
        return self._state.arrivals.writes(tensor) if is_ghost(tensor) else version(tensor)
