"""What stands for the values of other stages: ghosts, and numbers that nobody here knows."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor
from typing_extensions import TypeIs

from aimc_pl.ghosts.functions import KNOWN, kind_of
from aimc_pl.private_torch import without_subclass_functions

Key = tuple[int, int, int]
"""Where a value was made, the same in all processes: stretch, event of the stretch, tensor of the event."""


class Spec(NamedTuple):
    """What is known of every value everywhere."""

    shape: torch.Size
    dtype: torch.dtype
    requires_grad: bool


class Memory:
    """What a ghost shares with its views: who has written to it.

    Attributes:
        written: the latest stage that wrote through one of the views it had made itself.
        torn: the stage that wrote to a view it had received: the other views do not see that.
    """

    __slots__ = ("torn", "written")

    def __init__(self) -> None:
        self.written = -1
        self.torn: int | None = None


class Interceptor(Protocol):
    """Decides what happens to a torch function that was called on a ghost."""

    def intercept(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the function returns."""
        ...

    def deliver(self, value: Tensor) -> Tensor:
        """The value as it is known in the last stage, to be logged there."""
        ...


class Home(Protocol):
    """Where the value of a ghost may be."""

    def recall(self, ghost: "Ghost") -> Tensor:
        """The value of a ghost."""
        ...


running: list[Interceptor] = []
"""The forwards under way in this process, innermost last."""


class Ghost(Tensor):
    """A value of another stage: shape and type, and a key by which it is received where it is used.

    A plain tensor becomes one by its class, so that whoever holds it already sees the change. What it contains is
    never read: every torch function that meets a ghost is intercepted.

    Attributes:
        key: ``None`` for what a module of another stage made and kept apart from its outputs.
        stage: that made it.
        home: what arrives in the forward in which it was made.
        writes: how often it was changed in place.
    """

    spec: Spec
    key: Key | None
    stage: int
    home: Home
    memory: Memory
    writes: int

    def require_grad(self, requires_grad: bool = True) -> None:
        """Set whether it requires grad, as its value does."""
        plainly(Tensor.requires_grad_, (self, requires_grad), {})
        self.spec = self.spec._replace(requires_grad=requires_grad)

    def rename(self, key: Key, stage: int) -> None:
        """It has been changed in place by a stage."""
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
        # Outside of forwards: where a checkpoint recomputes what it has received, or for logging.
        args = replace(args, _recall)
        named = replace(kwargs or {}, _recall)
        if any(map(is_ghost, tensors_in(args, named))):
            return plainly(func, args, named) if kind_of(func) in KNOWN else Unknown()
        return func(*args, **named)


def _recall(value: Any) -> Any:
    return value.home.recall(value) if is_ghost(value) else value


class Unknown:
    """A number that only another process has. It can be computed with, formatted and logged, but not be decided by."""

    error: Exception

    def __init__(self, error: Exception | None = None) -> None:
        self.__dict__["error"] = error or RuntimeError("a value of another stage is not known in this process")

    def __getattr__(self, name: str) -> Self:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        raise self.error

    __hash__ = object.__hash__

    def __call__(self, *args: Any, **kwargs: Any) -> Self:
        """What comes of a call is unknown too."""
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
    """A value of a step, which is to be known in the last stage, where it is logged."""
    return running[-1].deliver(value) if running and isinstance(value, Tensor) else value


def is_ghost(value: Any) -> TypeIs[Ghost]:
    """Whether a value stands for one of another stage."""
    return type(value) is Ghost


def plainly(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call a torch function as if ghosts were tensors."""
    with without_subclass_functions():
        return func(*args, **kwargs)


def spec_of(tensor: Tensor) -> Spec:
    """Shape, type and whether it requires grad, of a tensor or of what a ghost stands for."""
    return tensor.spec if type(tensor) is Ghost else Spec(tensor.shape, tensor.dtype, tensor.requires_grad)


def give_class[T: Tensor](tensor: Tensor, kind: type[T]) -> T:
    """Make a tensor one of another class, in place."""
    value: Any = tensor
    value.__class__ = kind
    return value


def become_ghost(tensor: Tensor, spec: Spec, key: Key | None, stage: int, home: Home, memory: Memory) -> Ghost:
    """Make a ghost of a tensor, in place."""
    ghost = give_class(tensor, Ghost)
    ghost.spec, ghost.key, ghost.stage, ghost.home, ghost.memory, ghost.writes = spec, key, stage, home, memory, 0
    return ghost


SIMPLE = frozenset({bool, int, float, str, type(None), torch.dtype, torch.device, slice, torch.memory_format})
"""What most values are that are no tensors. To find that they are no containers either would take longer."""


def tensors_in(*values: Any) -> list[Tensor]:
    """The tensors of nested tuples, lists, dictionaries, dataclasses and plain objects, in their order."""
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
    """Those of a dataclass, or of a plain object that holds no other such objects."""
    if isinstance(value, type):
        return {}
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return vars(value) if _is_plain(value) and not any(map(_is_plain, vars(value).values())) else {}


def _is_plain(value: Any) -> bool:
    return hasattr(value, "__dict__") and not callable(value) and not isinstance(value, Tensor | Enum | Unknown)


def replace(value: Any, function: Callable[[Any], Any]) -> Any:
    """A copy of such a nested value with ``function`` applied to what is no container."""
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
    """Like ``replace``, but lists and dictionaries, which a module may change, stay themselves."""
    if isinstance(value, tuple):
        items = [replace_directly(item, function) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return function(value)


def left_in(values: Iterable[Any], given: Sequence[Tensor]) -> list[Tensor]:
    """The tensors without a name that a call has left in the lists, dictionaries and objects it was given."""
    containers = [value for value in values if not isinstance(value, Tensor) and type(value) not in SIMPLE]
    if not containers:
        return []
    known = {id(tensor) for tensor in given}
    return [tensor for tensor in tensors_in(*containers) if id(tensor) not in known and "_made" not in vars(tensor)]


class OpaqueError(Exception):
    """A value has no signature: two of them cannot be told apart."""


_CONSTANTS = complex, bytes, type(...), type, range, Enum, torch.layout


def signature(value: Any) -> Any:
    """What a value is apart from what its tensors contain, to look up by.

    Raises:
        OpaqueError: for objects of other kinds.
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
