"""Placeholders for other stages' parameters, gradients and loss in user code outside of the step, that is, in hooks."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aimc_pl.ghosts import refusals
from aimc_pl.ghosts.functions import KNOWN, Kind, kind_of, name_of
from aimc_pl.ghosts.shapes import NeedsValuesError, Outcome, Outcomes, Slot
from aimc_pl.ghosts.values import Unknown, give_class, plainly, replace, running, tensors_in

_outcomes = Outcomes()


@dataclass(frozen=True)
class Exchange:
    """How processes that run the same code exchange values.

    Attributes:
        stage: the stage of this process.
        gather: takes the value of this stage, and returns those of all stages in order. All processes must call it.
    """

    stage: int
    gather: Callable[[Any], list[Any]]


class ForeignParameter(nn.Parameter):
    """A parameter of another stage: a placeholder that takes no memory.

    Attributes:
        stage: the stage of the parameter.
        label: the name of the parameter, for messages.
    """

    stage: int
    label: str

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return running[-1].intercept(func, args, kwargs or {}) if running else _compute(func, args, kwargs or {})

    def __deepcopy__(self, memo: Any) -> Any:
        raise refusals.foreign("copy.deepcopy", self.label, self.stage)


class Apart(Tensor):
    """A tensor, such as a gradient, whose values only the process of its stage has. In other processes it has a shape.

    The result of a computation with values of one stage is again a value of that stage. A write to such a value takes
    place only in the process of that stage. Where values of several stages meet, or Python reads a value, all processes
    exchange the values, which thereby become plain tensors. All processes take part, since all run the same hooks.

    Attributes:
        stage: the stage that has the values.
        label: the name of the parameter from which the tensor derives, or ``"loss"``.
        exchange: how the processes exchange the tensor. ``None`` if the tensor derives from a weight or from the loss:
            the process of its stage has these as plain tensors, and would not take part.
    """

    stage: int
    label: str
    exchange: Exchange | None

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _compute(func, args, kwargs or {})


@contextmanager
def gradients_known(parameters: Mapping[str, nn.Parameter], exchange: Exchange) -> Iterator[None]:
    """Context manager in which the parameters of all stages have gradients, which makes norms over all of them right.

    Args:
        parameters: the parameters of all stages, by name.
        exchange: how the processes of the stages exchange values.
    """
    own = {
        name: parameter.grad
        for name, parameter in parameters.items()
        if not isinstance(parameter, ForeignParameter) and parameter.grad is not None
    }
    for stage, names in enumerate(exchange.gather([*own])):
        for name in names:
            gradient, parameter = own.get(name), parameters[name]
            if gradient is None:
                parameter.grad = gradient = _stand_in(parameter.shape, parameter.dtype, parameter)
            _be_of(gradient, stage, name, exchange)
    try:
        yield
    finally:
        for parameter in parameters.values():
            if isinstance(parameter, ForeignParameter):
                parameter.grad = None
            elif type(parameter.grad) is Apart:
                give_class(parameter.grad, Tensor)


def loss_of(stage: int, device: torch.device) -> Tensor:
    """Return a placeholder, NaN, for the loss, which only the process of ``stage`` has."""
    loss = torch.full((), torch.nan, device=device)
    _be_of(loss, stage, "loss", None)
    return loss


def _compute(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the result of a torch function that was called on gradients, or on parameters of other stages."""
    kind = kind_of(func)
    if kind in KNOWN:
        return plainly(func, args, kwargs)
    if name_of(func) == "equal" and any(isinstance(value, ForeignParameter) for value in args):
        # Lightning calls this to find out whether an optimizer already has a parameter.
        return args[0] is args[1]
    given = tensors_in(*args, *kwargs.values())
    apart = [tensor for tensor in given if isinstance(tensor, Apart | ForeignParameter)]
    first = apart[0]
    if kind is Kind.NUMBER and _exchange_of(first) is None:
        return Unknown(refusals.foreign(name_of(func), first.label, first.stage))
    outcome = _outcome(kind, func, args, kwargs)
    if outcome is None or any(value.stage != first.stage for value in apart) or _leaks(outcome, given, first):
        _share(name_of(func), apart)
        return func(*args, **kwargs)
    if _is_here(first):
        result = plainly(func, args, kwargs)
    else:
        if kind is Kind.RANDOM:
            _draw(func, args, kwargs)
        result = outcome.fill(lambda slot: _imagined(slot, given, first))
    exchange = None if None in map(_exchange_of, apart) else _exchange_of(first)
    for tensor in tensors_in(result):
        if type(tensor) is Tensor:
            _be_of(tensor, first.stage, first.label, exchange)
    return result


def _outcome(kind: Kind, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Outcome | None:
    """Return what is known of the outcome of a call without values, or ``None`` if nothing is known."""
    if kind not in (Kind.OPERATION, Kind.RANDOM):
        return None
    try:
        return _outcomes.of_operation(func, args, kwargs, tensors_in(*args, *kwargs.values()))
    except NeedsValuesError:
        return None


def _leaks(outcome: Outcome, given: list[Tensor], first: Apart | ForeignParameter) -> bool:
    """Return whether a call writes to a tensor that all processes have, which would then differ between them."""
    changed = [given[number] for number in outcome.changed]
    own = (Apart, ForeignParameter, nn.Parameter) if _is_here(first) else (Apart, ForeignParameter)
    return not all(isinstance(tensor, own) for tensor in changed)


def _share(what: str, values: list[Any]) -> None:
    """Send values of one or several stages to all processes. The values become plain tensors.

    Raises:
        UsageError: if a value cannot be exchanged, or if another process does not call the same function.
    """
    values = [*{id(value): value for value in values}.values()]
    for value in values:
        if _exchange_of(value) is None:
            raise refusals.foreign(what, value.label, value.stage)
    exchange: Exchange = values[0].exchange
    labels = [value.label for value in values]
    for value in values:
        give_class(value, Tensor)
    everyone = exchange.gather((what, labels, [value.detach() for value in values if value.stage == exchange.stage]))
    for stage, (their_what, their_labels, _) in enumerate(everyone):
        if (their_what, their_labels) != (what, labels):
            raise refusals.other_hook(what, exchange.stage, their_what, stage)
    received = [iter(tensors) for _, _, tensors in everyone]
    for value in values:
        tensor = next(received[value.stage])
        if value.stage != exchange.stage:
            value.data = tensor.to(value.device)


def _draw(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Draw the random numbers of another stage, so that the generators of all processes stay in the same state."""
    with torch.no_grad():
        args, kwargs = replace((args, kwargs), lambda value: _zeros(value) if isinstance(value, Tensor) else value)
        func(*args, **kwargs)


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _is_here(value: Apart | ForeignParameter) -> bool:
    """Return whether this process has the values of a tensor."""
    exchange = _exchange_of(value)
    return exchange is not None and value.stage == exchange.stage


def _exchange_of(value: Apart | ForeignParameter) -> Exchange | None:
    return None if isinstance(value, ForeignParameter) else value.exchange


def _imagined(slot: Slot, given: list[Tensor], like: Tensor) -> Tensor:
    """Return a placeholder for a tensor of a result, or the given tensor if the result is that tensor."""
    return _stand_in(slot.spec.shape, slot.spec.dtype, like) if slot.same is None else given[slot.same]


def _stand_in(shape: torch.Size, dtype: torch.dtype, like: Tensor) -> Tensor:
    """Return a tensor of the given shape in which one element in memory stands for all."""
    return torch.zeros((), dtype=dtype, device=like.device).expand(shape)


def _be_of(tensor: Tensor, stage: int, label: str, exchange: Exchange | None) -> None:
    """Turn a tensor, in place, into one whose values belong to ``stage``."""
    value = give_class(tensor, Apart)
    value.stage, value.label, value.exchange = stage, label, exchange
