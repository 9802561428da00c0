"""What comes of functions as far as shapes tell: computed on meta tensors once, then looked up."""

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
"""Signatures to remember: shapes that change from batch to batch must not fill the memory."""


class NeedsValuesError(Exception):
    """A function's outcome depends on values; its argument is the function's name."""


class Slot:
    """The place of a tensor in a result.

    Attributes:
        same: the number of the given tensor that it is.
        view: the number of the given tensor whose memory it shares.
    """

    __slots__ = ("_template", "same", "spec", "view")

    def __init__(self, spec: Spec, same: int | None, view: int | None) -> None:
        self.spec = spec
        self.same = same
        self.view = view
        self._template = torch.empty(spec.shape, dtype=spec.dtype, device=_META)

    def tensor(self) -> Tensor:
        """A new meta tensor."""
        tensor = self._template.detach()  # faster than to make it from the specification
        return tensor.requires_grad_() if self.spec.requires_grad else tensor


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a call does, apart from values.

    Attributes:
        result: with slots in place of tensors.
        changed: the numbers of the given tensors that it changes in place.
        used: the numbers of the given tensors that it computes with.
        mark: tells its name and shapes; 0 if only its own stage knows them.
    """

    result: Any
    changed: tuple[int, ...]
    used: tuple[int, ...]
    mark: int

    def fill(self, make: Callable[[Slot], Tensor]) -> Any:
        """The result with tensors in place of slots."""
        if type(self.result) is Slot:
            return make(self.result)
        return replace(self.result, lambda value: make(value) if type(value) is Slot else value)


class Outcomes:
    """The outcomes of calls, by name, modes, shapes and constants."""

    def __init__(self) -> None:
        self._known: dict[Any, Outcome] = {}

    def look_up(self, name: Any, training: bool, args: Any, kwargs: Any) -> tuple[Any, Outcome | None]:
        """A call's signature, ``None`` if it has none, and its outcome, if that is known."""
        try:
            key = (name, training, torch.is_grad_enabled(), signature(args), signature(kwargs) if kwargs else ())
            return key, self._known.get(key)
        except (OpaqueError, TypeError):
            return None, None

    def remember(self, key: Any, outcome: Outcome) -> None:
        """Unless the call has no signature, or a result that cannot be made anew."""
        if key is None or not _is_plain(outcome.result):
            return
        if len(self._known) >= _MOST:
            self._known.clear()
        self._known[key] = outcome

    def of_operation(self, func: Callable[..., Any], args: Any, kwargs: Any, given: Sequence[Tensor]) -> Outcome:
        """The outcome of a torch function, while no function mode is active.

        Raises:
            NeedsValuesError: if it depends on values.
        """
        key, outcome = self.look_up(func, False, args, kwargs)
        if outcome is None:
            outcome = outcome_with_twins(func, args, kwargs, [twin_of(tensor) for tensor in given], given)
            self.remember(key, outcome)
        return outcome


def describe(name: str, result: Sequence[Tensor], changed: Sequence[int]) -> int:
    """A number that differs, all but surely, where names, shapes or what is changed in place do."""
    shapes = [tensor.spec.shape if type(tensor) is Ghost else tensor.shape for tensor in result]
    return _mark(name, tuple(shapes), tuple(changed))


@lru_cache(_MOST)  # looked up, as to write it out takes longer
def _mark(name: str, shapes: tuple[torch.Size, ...], changed: tuple[int, ...]) -> int:
    return crc32(f"{name} {[*map(tuple, shapes)]} {changed}".encode()) or 1


def outcome_of(
    name: str, result: Any, given: Sequence[Tensor], changed: tuple[int, ...], used: tuple[int, ...]
) -> Outcome:
    """The outcome of a call that has been made, on ghosts or on meta tensors."""
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
    """The outcome of a torch function with other tensors, most of them without values, in place of those given.

    Raises:
        NeedsValuesError: if it depends on values that the twins do not have.
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
    """A meta tensor of the same shape and type."""
    spec = spec_of(tensor)
    twin = torch.empty(spec.shape, dtype=spec.dtype, device=_META)
    # What requires grad is no leaf, so that it can be changed in place.
    return twin.requires_grad_().clone() if spec.requires_grad and torch.is_grad_enabled() else twin


def _memory(tensor: Tensor) -> int:
    return id(tensor.memory) if type(tensor) is Ghost else storage_of(tensor)


def _is_plain(result: Any) -> bool:
    try:
        signature(replace(result, lambda value: None if isinstance(value, Slot | Unknown) else value))
    except OpaqueError:
        return False
    return True
