"""Placeholders for the values of other stages: ghosts in place of tensors, and :class:`Unknown` in place of numbers."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import TypeIs

from aimc_pl.errors import UsageError
from aimc_pl.ghosts.functions import KNOWN, kind_of
from aimc_pl.private_torch import without_subclass_functions

Key = tuple[int, int, int]
"""Where a value was made, which is the same in all processes: the number of the stage, the number of the module call or
torch function (the *event*) in that stage, and the number of the tensor among the results of the event."""


class Spec(NamedTuple):
    """What all processes know of a tensor, whichever stage it belongs to."""

    shape: torch.Size
    dtype: torch.dtype
    requires_grad: bool


class Memory:
    """The memory that a ghost shares with its views. It records which stages have written to it.

    Attributes:
        written: the latest stage that has written through a tensor that it had made itself; -1 if there is none.
        torn: the stage that has written through a tensor that it had received; ``None`` if there is none. The other
            views do not see such a write.
    """

    __slots__ = ("torn", "written")

    def __init__(self) -> None:
        self.written = -1
        self.torn: int | None = None


class Interceptor(Protocol):
    """An object that decides what happens when a torch function is called on a ghost."""

    def intercept(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the result of the function."""
        ...

    def deliver(self, value: Tensor | Metric) -> Tensor | Metric:
        """Return a value that is to be logged in the last stage, as the last stage knows it."""
        ...


class Home(Protocol):
    """An object that may hold the value of a ghost."""

    def recall(self, ghost: "Ghost") -> Tensor:
        """Return the value of a ghost, or the ghost itself if the value is not here."""
        ...


running: list[Interceptor] = []
"""The forwards under way in this process. The innermost one is last."""


class Ghost(Tensor):
    """A placeholder for a tensor of another stage: it has a shape, a type and a key, but no data.

    Where a stage uses the value, it receives the value under the key. A plain tensor becomes a ghost by a change of its
    class, which all who hold the tensor see. Its contents are never read: every torch function that is called on a
    ghost is intercepted.

    Attributes:
        spec: the shape and type of the value, and whether it requires grad.
        key: the key of the value; ``None`` if a module of another stage made the value and did not return it.
        stage: the stage that made the value.
        home: the values that have arrived in the forward in which the ghost was made.
        memory: what the ghost shares with its views.
        writes: how often the value was changed in place.
    """

    spec: Spec
    key: Key | None
    stage: int
    home: Home
    memory: Memory
    writes: int

    def require_grad(self, requires_grad: bool = True) -> None:
        """Set whether the ghost requires grad, as its value does."""
        plainly(Tensor.requires_grad_, (self, requires_grad), {})
        self.spec = self.spec._replace(requires_grad=requires_grad)

    def rename(self, key: Key, stage: int) -> None:
        """Give the ghost a new key, after ``stage`` has changed its value in place."""
        if self.stage < stage:
            self.memory.torn = stage
            self.memory = Memory()
        else:
            self.memory.written = stage
        self.key, self.stage = key, stage
        self.writes += 1

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride], of a Tensor's
        return f"<a value of stage {self.stage}, {tuple(self.spec.shape)}, {self.spec.dtype}>"

    def __format__(self, format_spec: str) -> str:
        return repr(self)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if running:
            return running[-1].intercept(func, args, kwargs or {})
        # No forward is under way: a checkpoint recomputes with what it has received, or a value is logged.
        args = replace(args, _recall)
        named = replace(kwargs or {}, _recall)
        if any(map(is_ghost, tensors_in(args, named))):
            return plainly(func, args, named) if kind_of(func) in KNOWN else Unknown()
        return func(*args, **named)


def _recall(value: Any) -> Any:
    return value.home.recall(value) if is_ghost(value) else value


class Unknown:
    """A number that only another process has. Code can compute with it, format it and log it, but not decide by it."""

    error: Exception

    def __init__(self, error: Exception | None = None) -> None:
        self.__dict__["error"] = error or UsageError(
            "a value that a step has left behind is read outside of the step, and only the process of another stage "
            "has it: log it, decide by metrics that are logged, or train with devices=1"
        )

    def __getattr__(self, name: str) -> Self:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        raise self.error

    __hash__ = object.__hash__

    def __call__(self, *args: Any, **kwargs: Any) -> Self:
        """Return an unknown value, as the result of a call on it is unknown too."""
        return self

    def __repr__(self) -> str:
        return "unknown"

    def __format__(self, format_spec: str) -> str:
        return "unknown"


def _same(self: Unknown, *others: Any) -> Unknown:
    return self


def _decide(self: Unknown, *others: Any) -> Any:
    raise self.error


_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
_OTHERS = ("neg", "pos", "abs", "round", "getitem", "lt", "le", "gt", "ge", "eq", "ne")
_DECISIONS = ("bool", "int", "float", "index", "complex", "iter", "len", "contains", "array")
for _name in (*_ARITHMETIC, *(f"r{name}" for name in _ARITHMETIC), *_OTHERS):
    setattr(Unknown, f"__{_name}__", _same)
for _name in _DECISIONS:
    setattr(Unknown, f"__{_name}__", _decide)


def delivered(value: Any) -> Any:
    """Return a value of a step, and have it sent to the last stage, where it is logged."""
    return running[-1].deliver(value) if running and isinstance(value, Tensor | Metric) else value


def is_ghost(value: Any) -> TypeIs[Ghost]:
    """Return whether ``value`` is a placeholder for a tensor of another stage."""
    return type(value) is Ghost


def plainly(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call a torch function as if ghosts were plain tensors."""
    with without_subclass_functions():
        return func(*args, **kwargs)


def spec_of(tensor: Tensor) -> Spec:
    """Return shape, type and whether it requires grad, of a tensor or of the value that a ghost stands for."""
    return tensor.spec if type(tensor) is Ghost else Spec(tensor.shape, tensor.dtype, tensor.requires_grad)


def give_class[T: Tensor](tensor: Tensor, kind: type[T]) -> T:
    """Change the class of a tensor in place, and return the tensor."""
    value: Any = tensor
    value.__class__ = kind
    return value


def become_ghost(tensor: Tensor, spec: Spec, key: Key | None, stage: int, home: Home, memory: Memory) -> Ghost:
    """Turn a tensor into a ghost in place, and return it."""
    ghost = give_class(tensor, Ghost)
    ghost.spec, ghost.key, ghost.stage, ghost.home, ghost.memory, ghost.writes = spec, key, stage, home, memory, 0
    return ghost


SIMPLE = frozenset({bool, int, float, str, type(None), torch.dtype, torch.device, slice, torch.memory_format})
"""The types of most values that are no tensors. A look-up here is faster than the tests for containers."""


def tensors_in(*values: Any) -> list[Tensor]:
    """Return the tensors in nested tuples, lists, dictionaries, dataclasses and plain objects, in their order."""
    found: list[Tensor] = []
    for value in values:
        _collect(value, found)
    return found


def _collect(value: Any, found: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        found.append(value)
    elif type(value) in SIMPLE:
        return
    elif isinstance(value, tuple | list):
        for item in value:
            _collect(item, found)
    elif isinstance(value, Mapping):
        for item in value.values():
            _collect(item, found)
    else:
        for item in _attributes(value).values():
            _collect(item, found)


def _attributes(value: Any) -> Mapping[str, Any]:
    """Return the attributes of a dataclass, or of a plain object that holds no other plain objects; else none."""
    if isinstance(value, type):
        return {}
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return vars(value) if _is_plain(value) and not any(map(_is_plain, vars(value).values())) else {}


def _is_plain(value: Any) -> bool:
    return hasattr(value, "__dict__") and not callable(value) and not isinstance(value, Tensor | Enum | Unknown)


def replace(value: Any, function: Callable[[Any], Any]) -> Any:
    """Return a copy of a nested value, with ``function`` applied to everything in it that is no container."""
    if isinstance(value, Tensor) or type(value) in SIMPLE:
        return function(value)
    if isinstance(value, tuple):
        items = [replace(item, function) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, list):
        return [replace(item, function) for item in value]
    if isinstance(value, Mapping):
        mapping: Any = copy.copy(value)
        for name, item in value.items():
            mapping[name] = replace(item, function)
        return mapping
    attributes = _attributes(value)
    if not attributes:
        return function(value)
    value = copy.copy(value)
    for name, item in attributes.items():
        object.__setattr__(value, name, replace(item, function))
    return value


def replace_directly(value: Any, function: Callable[[Any], Any]) -> Any:
    """Replace like :func:`replace`, but only in tuples. Lists and dictionaries, which modules may change, are kept."""
    if isinstance(value, tuple):
        items = [replace_directly(item, function) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return function(value)


def left_in(values: Iterable[Any], given: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors without a key that a call has left in the lists, dictionaries and objects it was given."""
    containers = [value for value in values if not isinstance(value, Tensor) and type(value) not in SIMPLE]
    if not containers:
        return []
    known = {id(tensor) for tensor in given}
    return [tensor for tensor in tensors_in(*containers) if id(tensor) not in known and "_made" not in vars(tensor)]


class OpaqueError(Exception):
    """A value has no signature, because it cannot be told apart from other values of its type."""


_CONSTANTS = complex, bytes, type(...), type, range, Enum, torch.layout


def signature(value: Any) -> Any:
    """Return a signature: what a value is, apart from the contents of its tensors, as a key to look up by.

    Raises:
        OpaqueError: if the value is of a kind that has no signature.
    """
    kind = type(value)
    if kind is Ghost:
        return value.spec
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.requires_grad
    if kind is slice:
        return slice, signature(value.start), signature(value.stop), signature(value.step)
    if kind in SIMPLE:
        return kind, value
    if isinstance(value, tuple | list):
        return kind, *map(signature, value)
    if isinstance(value, Mapping):
        return kind, *value, *map(signature, value.values())
    if isinstance(value, _CONSTANTS):
        return kind, value
    if kind is Unknown:
        raise value.error
    attributes = _attributes(value)
    if attributes:
        return kind, *attributes, *map(signature, attributes.values())
    raise OpaqueError
