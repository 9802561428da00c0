"""Events of other stages' stretches, which are imagined: only the shapes and types of their results are found.

A *stretch* is the part of the step that one stage computes. An *event* is a module or a torch function that is called
in it.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import count
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from aimc_pl.errors import UsageError
from aimc_pl.ghosts import refusals
from aimc_pl.ghosts.arrivals import name_of_value
from aimc_pl.ghosts.functions import name_of
from aimc_pl.ghosts.learning import Watch
from aimc_pl.ghosts.parts import Part, digital_result
from aimc_pl.ghosts.shapes import NeedsValuesError, Outcome, Slot, describe, outcome_of, outcome_with_twins, twin_of
from aimc_pl.ghosts.state import State
from aimc_pl.ghosts.values import (
    Ghost,
    Key,
    Memory,
    Spec,
    Unknown,
    become_ghost,
    is_ghost,
    left_in,
    spec_of,
    tensors_in,
)
from aimc_pl.private_torch import without_backward_hooks, without_functions


class Elsewhere:
    """The part of a forward that handles events of other stages. It computes no values.

    It finds the shapes of their results, and the values of this and earlier stages that later stages need.

    Attributes:
        watch: checks whether what follows this stage's own stretch can be left out next time; ``None`` until then.
        guessed: why the result of an event could only be guessed; ``None`` if no result was guessed.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self._outcomes = state.setting.learned.outcomes
        self._used: set[int] = set()
        self._is_lasting = True
        self.watch: Watch | None = None
        self.guessed: UsageError | None = None

    def operation(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a torch function returns, with ghosts in place of tensors."""
        with without_functions():
            given = tensors_in(*args, *kwargs.values())
            self._state.check_parameters(given)
            try:
                outcome = self._outcomes.of_operation(func, args, kwargs, given)
            except NeedsValuesError:
                outcome = self._outcome_by_values(func, args, kwargs, given)
            self._use(given)
            return self._imagined(name_of(func), outcome, given)

    def _outcome_by_values(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], given: Sequence[Tensor]
    ) -> Outcome:
        """Return the outcome of a function whose shapes may depend on values of the batch alone, such as a mask."""
        self._is_lasting = False
        twins = [tensor.clone() if self._state.is_common(tensor) else twin_of(tensor) for tensor in given]
        try:
            return outcome_with_twins(func, args, kwargs, twins, given)
        except NeedsValuesError as error:
            raise refusals.reads(self._state.stretch, str(error)) from error

    def function(self, apply: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a custom autograd function returns, with ghosts in place of tensors."""
        call = partial(_without_graph, apply)
        if self._state.inside:
            return call(*args, **kwargs)
        return self._event(name_of(apply), False, call, args, kwargs)

    def module(self, part: Part, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a module that is run as a whole returns, with ghosts in place of tensors."""
        if not part.is_metric:
            return self._event(part.name, part.module.training, partial(self._rehearse_part, part), args, kwargs)
        with without_functions():
            self._use(tensors_in(*args, *kwargs.values()))
        self._state.trail.note(part.name, 0)
        self._state.metrics |= {id(module): self._state.stretch for module in part.module.modules()}
        return self._metric(part)

    def inside(self, part: Part, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a module returns that is called inside another one, with ghosts in place of tensors."""
        if part.is_metric:
            return self._metric(part)
        return self._digital(part)(*args, **kwargs) if part.is_analog else part.call(*args, **kwargs)

    def _metric(self, part: Part) -> Unknown:
        return Unknown(refusals.reads(self._state.stretch, part.name))

    def _event(
        self,
        label: str,
        training: bool,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        with without_functions():
            given = tensors_in(*args, *kwargs.values())
            if self._state.stretch > self._state.own:
                self._use(_directly_in((*args, *kwargs.values())))
            key, outcome = self._outcomes.look_up(label, training, args, kwargs)
            if outcome is not None:
                self._use([given[number] for number in outcome.used])
                return self._imagined(label, outcome, given)
            before = [_writes(tensor) for tensor in given]
        result = self._rehearse(given, call, args, kwargs)
        with without_functions():
            changed = tuple(number for number, tensor in enumerate(given) if _writes(tensor) != before[number])
            used = tuple(number for number, tensor in enumerate(given) if id(tensor) in self._used)
            outcome = outcome_of(label, result, given, changed, used)
            # The outcome is remembered only if the call has no other effects: its arguments hold the same tensors as
            # before, and it has used no value except its arguments.
            after = tensors_in(*args, *kwargs.values())
            is_same = len(after) == len(given) and all(map(is_, after, given))
            is_alone = is_same and self._is_lasting and self._used <= set(map(id, given))
            if is_alone and key == self._outcomes.look_up(label, training, args, kwargs)[0]:
                self._outcomes.remember(key, outcome)
            return self._imagined(label, outcome, given, left_in((*args, *kwargs.values()), given))

    def _rehearse(
        self, given: Sequence[Tensor], call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run an event on ghosts, to find what it returns, uses and changes."""
        self._state.inside, self._is_lasting, self._used = True, True, set()
        try:
            with _uncompiled():
                return call(*args, **kwargs)
        except refusals.ReadsValueError as error:
            self._used = set(map(id, given))
            self.guessed = error
            return self._guess(given, error)
        finally:
            self._state.inside = False

    def _rehearse_part(self, part: Part, *args: Any, **kwargs: Any) -> Any:
        if part.is_analog:
            return self._digital(part)(*args, **kwargs)
        with without_backward_hooks(part.module):
            return part.call(*args, **kwargs)

    def _guess(self, given: Sequence[Tensor], error: UsageError) -> Any:
        """Return a guess at the result of a module that decides by values.

        The guess is a ghost shaped like the first floating-point tensor given, as most such modules keep the shape.
        Where the shape matters, the mark of the event (a hash that processes compare) shows whether the guess is right.
        """
        specs = [spec for spec in map(spec_of, given) if spec.dtype.is_floating_point]
        if not specs:
            return Unknown(error)
        spec = specs[0]._replace(requires_grad=torch.is_grad_enabled())
        with without_functions():
            return self._ghost(Slot(spec, None, None), None, Memory())

    def _digital(self, part: Part) -> Callable[..., Any]:
        """Return a function that finds the result of an analog layer by the layer's digital rule."""
        requires_grad = any(parameter.requires_grad for parameter in part.module.parameters())
        self._state.check_parameters(part.module.parameters())

        def like_weight(shape: tuple[int, ...]) -> Tensor:
            slot = Slot(Spec(torch.Size(shape), torch.float32, requires_grad), None, None)
            with without_functions():
                return self._ghost(slot, None, Memory())

        return lambda x: digital_result(part.module, x, like_weight)

    def _imagined(self, label: str, outcome: Outcome, given: Sequence[Tensor], left: Sequence[Tensor] = ()) -> Any:
        """Return what an event returns, with ghosts in place of tensors. Give the ghosts keys, and note the event."""
        state = self._state
        # Values that are made inside an event have no key.
        event = None if state.inside else state.trail.event
        for number in outcome.changed:
            self._overwrite(given[number], None if event is None else (state.stretch, event, -1 - number))
        slots = count()

        def make(slot: Slot) -> Tensor:
            number = next(slots)
            return self._made(slot, outcome, given, None if event is None else (state.stretch, event, number))

        result = outcome.fill(make)
        if event is None:
            return result
        for tensor in left:
            self._claim(tensor, (state.stretch, event, next(slots)))
        mark = outcome.mark
        if left and mark:
            mark = describe(label, tensors_in(result, *left), outcome.changed)
        state.trail.note(label, mark)
        return result

    def _made(self, slot: Slot, outcome: Outcome, given: Sequence[Tensor], key: Key | None) -> Tensor:
        if slot.same is not None:
            tensor = given[slot.same]
            is_single = type(outcome.result) is Slot
            if not is_single or slot.same in outcome.changed or self._state.is_common(tensor):
                return tensor
            slot = Slot(spec_of(tensor), None, slot.same)
        shared = None if slot.view is None else given[slot.view]
        return self._ghost(slot, key, shared.memory if shared is not None and is_ghost(shared) else Memory())

    def _ghost(self, slot: Slot, key: Key | None, memory: Memory) -> Ghost:
        return become_ghost(slot.tensor(), slot.spec, key, self._state.stretch, self._state.arrivals, memory)

    def _claim(self, tensor: Tensor, key: Key) -> None:
        """Give a key to a tensor that a module has left in a list."""
        if is_ghost(tensor):
            tensor.key = tensor.key or key
        elif not isinstance(tensor, nn.Parameter):
            become_ghost(tensor, spec_of(tensor), key, self._state.stretch, self._state.arrivals, Memory())

    def _overwrite(self, tensor: Tensor, key: Key | None) -> None:
        """Note that a tensor is changed in place. Turn it into a ghost if it is none yet."""
        if is_ghost(tensor):
            if key is None:
                tensor.writes += 1
            else:
                tensor.rename(key, self._state.stretch)
        elif not isinstance(tensor, nn.Parameter):
            is_buffer = any(tensor is buffer for buffer in self._state.setting.module.buffers())
            if is_buffer and key is None:
                return  # only the stage of a module knows what the module keeps in its buffers
            if is_buffer and self.watch is not None:
                self.watch.has_effects = True
            self._turn_into_ghost(tensor, key)

    def _turn_into_ghost(self, tensor: Tensor, key: Key | None) -> None:
        made, state = name_of_value(tensor), self._state
        if made is None:
            state.note_write(tensor)
        elif made[1] in state.kept:
            with torch.enable_grad():
                state.kept[made[1]] = tensor.view_as(tensor)
        become_ghost(tensor, spec_of(tensor), key, state.stretch, state.arrivals, Memory())

    def _use(self, tensors: Sequence[Tensor]) -> None:
        """Note that an event computes with ``tensors``."""
        if self._state.inside:
            self._used.update(id(tensor) for tensor in tensors if _has_key(tensor))
        if self._state.stretch > self._state.own:
            for tensor in tensors:
                self.need(tensor)

    def need(self, tensor: Tensor) -> None:
        """Note that a later stage computes with a tensor, or logs it."""
        if is_ghost(tensor):
            self._need_ghost(tensor)
        elif not isinstance(tensor, nn.Parameter):
            made, state = name_of_value(tensor), self._state
            if made is None and tensor.grad_fn is not None:
                raise refusals.hidden(state.stretch, state.own)
            if made is not None and made[0] is state.arrivals.token:
                self._need_key(made[1], tensor)

    def _need_ghost(self, ghost: Ghost) -> None:
        state = self._state
        if ghost.home is not state.arrivals or ghost.key is None or ghost.key[0] > state.own:
            return  # not for this process to send; the process that needs it reports if it cannot have it
        if ghost.key[0] < state.own and state.arrivals.writes(ghost):
            raise refusals.written_through_a_view(ghost.key[0], state.own)
        self._need_key(ghost.key, state.arrivals.recall(ghost))

    def _need_key(self, key: Key, value: Tensor) -> None:
        self._state.needs[key] = None
        if key[0] == self._state.own:
            self._state.kept[key] = value


def _without_graph(apply: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Apply a custom autograd function to ghosts, without a graph.

    Ghosts are leaves. With a graph, autograd would not let the function change them in place.
    """
    requires_grad = torch.is_grad_enabled() and any(spec_of(tensor).requires_grad for tensor in tensors_in(*args))
    with torch.no_grad():
        result = apply(*args, **kwargs)
    for tensor in tensors_in(result):
        if is_ghost(tensor) and requires_grad and tensor.spec.dtype.is_floating_point:
            tensor.require_grad()
    return result


def _uncompiled() -> AbstractContextManager[Any]:
    # torch.compile, if it is in use, cannot compile for ghosts.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _directly_in(values: tuple[Any, ...]) -> list[Tensor]:
    """Return the tensors that a module certainly uses: all except those in lists and dictionaries."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple):
            found += _directly_in(value)
    return found


def _has_key(tensor: Tensor) -> bool:
    return tensor.key is not None if is_ghost(tensor) else name_of_value(tensor) is not None


def _writes(tensor: Tensor) -> int:
    return tensor.writes if is_ghost(tensor) else -1
