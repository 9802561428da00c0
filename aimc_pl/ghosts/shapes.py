"""Outcomes of functions, as far as shapes tell. Each is found once, by a call on meta tensors, and then looked up."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from aimc_pl.ghosts.functions import name_of
from aimc_pl.ghosts.values import Ghost, OpaqueError, Spec, Unknown, replace, signature, spec_of, tensors_in
from aimc_pl.private_torch import storage_of, version

_META = torch.device("meta")
_MOST = 10_000
"""How many signatures to remember. Shapes that change from batch to batch must not fill the memory."""


class NeedsValuesError(Exception):
    """The outcome of a function depends on values. The argument of the error is the name of the function."""


class Slot:
    """The place of a tensor in a result.

    A *given* tensor is one in the arguments of the call. Given tensors are numbered in their order.

    Attributes:
        spec: the shape and type of the tensor, and whether it requires grad.
        same: the number of the given tensor that is returned itself; ``None`` if the tensor is a new one.
        view: the number of the given tensor with which the tensor shares its memory; ``None`` if there is none.
    """

    __slots__ = ("_template", "same", "spec", "view")

    def __init__(self, spec: Spec, same: int | None, view: int | None) -> None:
        self.spec = spec
        self.same = same
        self.view = view
        self._template = torch.empty(spec.shape, dtype=spec.dtype, device=_META)

    def tensor(self) -> Tensor:
        """Return a new meta tensor for this place."""
        tensor = self._template.detach()  # faster than a new tensor
        return tensor.requires_grad_() if self.spec.requires_grad else tensor


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a call does, apart from the values that it computes.

    Attributes:
        result: the result, with slots in place of tensors.
        changed: the numbers of the given tensors that the call changes in place.
        used: the numbers of the given tensors that the call computes with.
        mark: a hash of the name and the shapes; 0 if only the stage of the call knows the shapes.
    """

    result: Any
    changed: tuple[int, ...]
    used: tuple[int, ...]
    mark: int

    def fill(self, make: Callable[[Slot], Tensor]) -> Any:
        """Return the result, with tensors that ``make`` makes in place of slots."""
        if type(self.result) is Slot:
            return make(self.result)
        return replace(self.result, lambda value: make(value) if type(value) is Slot else value)


class Outcomes:
    """The known outcomes of calls, which are looked up by name, modes, shapes and constants."""

    def __init__(self) -> None:
        self._known: dict[Any, Outcome] = {}

    def look_up(self, name: Any, training: bool, args: Any, kwargs: Any) -> tuple[Any, Outcome | None]:
        """Return a call's signature, or ``None`` if it has none, and its outcome, or ``None`` if that is not known."""
        try:
            key = (name, training, torch.is_grad_enabled(), signature(args), signature(kwargs) if kwargs else ())
            return key, self._known.get(key)
        except (OpaqueError, TypeError):
            return None, None

    def remember(self, key: Any, outcome: Outcome) -> None:
        """Store an outcome, unless the call has no signature or its result cannot be made again."""
        if key is None or not _is_plain(outcome.result):
            return
        if len(self._known) >= _MOST:
            self._known.clear()
        self._known[key] = outcome

    def of_operation(self, func: Callable[..., Any], args: Any, kwargs: Any, given: Sequence[Tensor]) -> Outcome:
        """Return the outcome of a torch function. No function mode may be active.

        Raises:
            NeedsValuesError: if the outcome depends on values.
        """
        key, outcome = self.look_up(func, False, args, kwargs)
        if outcome is None:
            outcome = outcome_with_twins(func, args, kwargs, [twin_of(tensor) for tensor in given], given)
            self.remember(key, outcome)
        return outcome


def describe(name: str, result: Sequence[Tensor], changed: Sequence[int]) -> int:
    """Return a mark: a hash that almost surely differs where names, shapes or changes in place differ."""
    shapes = [tensor.spec.shape if type(tensor) is Ghost else tensor.shape for tensor in result]
    return _mark(name, tuple(shapes), tuple(changed))


@lru_cache(_MOST)  # a look-up is faster than the hash
def _mark(name: str, shapes: tuple[torch.Size, ...], changed: tuple[int, ...]) -> int:
    return crc32(f"{name} {[*map(tuple, shapes)]} {changed}".encode()) or 1


def outcome_of(
    name: str, result: Any, given: Sequence[Tensor], changed: tuple[int, ...], used: tuple[int, ...]
) -> Outcome:
    """Return the outcome of a call that has been made on ghosts or on meta tensors."""
    numbers = {id(tensor): number for number, tensor in enumerate(given)}
    memories = {_memory(tensor): number for number, tensor in enumerate(given)}

    def slot(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return Slot(spec_of(value), numbers.get(id(value)), memories.get(_memory(value)))

    mark = 0 if isinstance(result, Unknown) else describe(name, tensors_in(result), changed)
    return Outcome(replace(result, slot), changed, used, mark)


def outcome_with_twins(
    func: Callable[..., Any], args: Any, kwargs: Any, twins: Sequence[Tensor], given: Sequence[Tensor]
) -> Outcome:
    """Return the outcome of a torch function, found by a call with other tensors in place of those given.

    Args:
        func: the function.
        args: its positional arguments.
        kwargs: its keyword arguments.
        twins: a tensor in place of each given tensor. Most twins are meta tensors, which have no values.
        given: the tensors in the arguments.

    Raises:
        NeedsValuesError: if the outcome depends on values that the twins do not have.
    """
    by_tensor = {id(tensor): twin for tensor, twin in zip(given, twins, strict=True)}
    twins = [by_tensor[id(tensor)] for tensor in given]  # a tensor may be given twice
    before = [version(twin) for twin in twins]
    name = name_of(func)
    try:
        result = _on_meta(name, func, args, kwargs, by_tensor)
    except (NotImplementedError, RuntimeError) as error:
        if "meta" in str(error).lower():
            raise NeedsValuesError(name) from error
        raise
    changed = tuple(number for number, twin in enumerate(twins) if version(twin) != before[number])
    return outcome_of(name, result, twins, changed, tuple(range(len(given))))


def _on_meta(name: str, func: Callable[..., Any], args: Any, kwargs: Any, twins: dict[int, Tensor]) -> Any:
    def twin(value: Any) -> Any:
        if isinstance(value, Tensor):
            return twins[id(value)]
        if isinstance(value, torch.Generator):
            return None
        return _META if isinstance(value, torch.device) else value

    args, kwargs = replace((args, kwargs), twin)
    if name in ("cpu", "cuda"):
        return args[0].view_as(args[0])
    if name == "to":
        args = tuple(_META if isinstance(value, str) else value for value in args)
    if not twins or isinstance(kwargs.get("device"), str | int):
        kwargs = {**kwargs, "device": _META}
    return func(*args, **kwargs)


def twin_of(tensor: Tensor) -> Tensor:
    """Return a meta tensor of the same shape and type as ``tensor``."""
    spec = spec_of(tensor)
    twin = torch.empty(spec.shape, dtype=spec.dtype, device=_META)
    # A twin that requires grad must be no leaf, since autograd lets no leaf be changed in place.
    return twin.requires_grad_().clone() if spec.requires_grad and torch.is_grad_enabled() else twin


def _memory(tensor: Tensor) -> int:
    return id(tensor.memory) if type(tensor) is Ghost else storage_of(tensor)


def _is_plain(result: Any) -> bool:
    try:
        signature(replace(result, lambda value: None if isinstance(value, Slot | Unknown) else value))
    except OpaqueError:
        return False
    return True
