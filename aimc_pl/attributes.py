"""What code leaves on modules while it runs: plain attributes, and what lists, dicts and sets there hold."""

import sys
from collections import OrderedDict, deque
from collections.abc import Iterable
from operator import is_
from typing import Any, NamedTuple

from torch import Tensor, nn

from aimc_pl.private_torch import parameters_of

CONTAINERS = (dict, list, set, deque, tuple)
PLAIN = (bool, int, float, str, type(None))
"""Types of values that cannot change."""

_OF_TORCH = vars(nn.Module()).keys() - {"training", "_buffers", "_parameters"}
_FLAGS = "requires_grad of parameters"
"""Stands among a module's attributes for what its parameters require."""

_BY_FINGERPRINT = ("_buffers", "_parameters")
_MISSING = object()
_MANY = 256

Place = tuple[int, str]
"""The number of a module (some modules compare in ways of their own) and an attribute's name."""


class _Look(NamedTuple):
    """The attributes of a module at some moment."""

    fingerprint: list[Any]
    """What is another object where an attribute has been set."""
    values: dict[str, Any]
    containers: list[str]


Snapshot = list[tuple[_Look, dict[str, Any]]]
"""For every module its attributes, and the frozen values of those that are containers."""


class Attributes:
    """The attributes of all modules of a network, to be read and written as a whole.

    Hooks do not count. Buffers and parameters do when they are bound anew or frozen, not when they are changed in
    place. A container with more than 256 elements (a vocabulary, say) counts as changed where their number has.

    Args:
        network: whose attributes.
    """

    def __init__(self, network: nn.Module) -> None:
        self._names, self._modules = zip(*network.named_modules(), strict=True)
        self._looks = [self._look(module) for module in self._modules]

    def read(self) -> Snapshot:
        """The attributes of this moment."""
        snapshot = []
        for number, module in enumerate(self._modules):
            look = self._looks[number]
            if not _is_same(_fingerprint(module), look.fingerprint):
                look = self._looks[number] = self._look(module)
            held = vars(module)
            containers = {name: _freeze(held[name]) for name in look.containers}
            snapshot.append((look, containers))
        return snapshot

    def changes(self, before: Snapshot) -> dict[Place, Any]:
        """The frozen values of what has been set, filled or deleted since ``before``."""
        changed: dict[Place, Any] = {}
        for number, (module, (look, containers)) in enumerate(zip(self._modules, before, strict=True)):
            if _is_same(_fingerprint(module), look.fingerprint):
                held = vars(module)
                for name, frozen in containers.items():
                    if not _is_unchanged(frozen, held[name]):
                        changed[number, name] = _freeze(held[name])
                continue
            now = _values(module)
            for name, frozen in (look.values | containers).items():
                value = now.pop(name, _MISSING)
                if value is not frozen and not _is_unchanged(frozen, value):
                    changed[number, name] = _freeze(value)
            for name, value in now.items():
                changed[number, name] = _freeze(value)
        return changed

    @staticmethod
    def select(snapshot: Snapshot, places: Iterable[Place]) -> dict[Place, Any]:
        """The frozen values of some attributes."""
        found = {}
        for number, name in places:
            look, containers = snapshot[number]
            found[number, name] = containers[name] if name in containers else look.values.get(name, _MISSING)
        return found

    def current(self, places: Iterable[Place]) -> dict[Place, Any]:
        """The frozen values that some attributes have now."""
        return {(number, name): _freeze(self._value(number, name)) for number, name in places}

    def write(self, values: dict[Place, Any]) -> None:
        """Set attributes (and fill containers) to frozen values."""
        # Flags last: they are those of the parameters that are bound by then.
        for (number, name), frozen in sorted(values.items(), key=lambda item: item[0][1] == _FLAGS):
            module = self._modules[number]
            if name == _FLAGS:
                _set_flags(module, frozen)
            elif frozen is _MISSING:
                vars(module).pop(name, None)
            else:
                vars(module)[name] = _thaw(frozen)

    def name(self, place: Place) -> str:
        """How the user writes the attribute, ``"net.hidden"``."""
        number, name = place
        return ".".join(part for part in (self._names[number], name.lstrip("_")) if part)

    def _value(self, number: int, name: str) -> Any:
        module = self._modules[number]
        return _flags(module) if name == _FLAGS else vars(module).get(name, _MISSING)

    def _look(self, module: nn.Module) -> _Look:
        values = _values(module)
        containers = [name for name, value in values.items() if _can_change(value) and name not in _BY_FINGERPRINT]
        frozen = {name: _freeze(value) for name, value in values.items() if name not in containers}
        return _Look(_fingerprint(module), frozen, containers)


def is_alike(a: Any, b: Any) -> bool:
    """Whether two frozen values are of the same kind and size."""
    if type(a) is _Container and type(b) is _Container:
        return len(a.contents) == len(b.contents) and all(map(is_alike, a.contents, b.contents))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape
    return type(a) is type(b) and (not isinstance(a, bool | int | float | str) or a == b)


class _Container(NamedTuple):
    """A list, dict, set, deque or tuple, and what it holds."""

    value: Any
    contents: list[Any]


class _Large(NamedTuple):
    """A container that is not looked into."""

    value: Any
    length: int


def _fingerprint(module: nn.Module) -> list[Any]:
    held = vars(module)
    # A scripted module has none of its own.
    parameters, buffers = held.get("_parameters", {}), held.get("_buffers", {})
    flags = [parameter is not None and parameter.requires_grad for parameter in parameters.values()]
    return [*held, *held.values(), *parameters, *parameters.values(), *buffers, *buffers.values(), *flags]


def _is_same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(map(is_, a, b))


def _values(module: nn.Module) -> dict[str, Any]:
    values = {name: value for name, value in vars(module).items() if name not in _OF_TORCH}
    if parameters_of(module):
        values[_FLAGS] = _flags(module)
    return values


def _flags(module: nn.Module) -> str:
    # Interned, as unchanged values are recognised by their identity.
    return sys.intern("".join("1" if p.requires_grad else "0" for p in parameters_of(module).values() if p is not None))


def _set_flags(module: nn.Module, flags: str) -> None:
    parameters = [parameter for parameter in parameters_of(module).values() if parameter is not None]
    for parameter, flag in zip(parameters, flags, strict=True):
        if parameter.requires_grad != (flag == "1"):
            parameter.requires_grad_(flag == "1")


def contents_of(container: Any) -> list[Any]:
    """What a list, set, deque or tuple holds; the keys and values of a dict, in turns."""
    # The methods of the built-in class: those of the user's own may do something else.
    base = _built_in(container)
    return (
        [held for pair in base.items(container) for held in pair]
        if issubclass(base, dict)
        else [*base.__iter__(container)]
    )


def fill(container: Any, contents: list[Any]) -> None:
    """Let a list, dict, set or deque hold what :func:`contents_of` has returned."""
    base = _built_in(container)
    base.clear(container)
    if issubclass(base, dict):
        for key, value in zip(contents[::2], contents[1::2], strict=True):
            base.__setitem__(container, key, value)
    elif base is set:
        set.update(container, contents)
    else:
        base.extend(container, contents)


def _built_in(container: Any) -> Any:
    return next(kind for kind in (OrderedDict, *CONTAINERS) if isinstance(container, kind))


def _can_change(value: Any) -> bool:
    # Most attributes are plain; a test of the exact type is fastest.
    if type(value) in PLAIN or not isinstance(value, CONTAINERS):
        return False
    return not isinstance(value, tuple) or not all(type(item) in PLAIN for item in value)


def _freeze(value: Any, around: tuple[int, ...] = ()) -> Any:
    if not _can_change(value) or id(value) in around:
        return value
    if len(value) > _MANY:
        return _Large(value, len(value))
    return _Container(value, [_freeze(item, (*around, id(value))) for item in contents_of(value)])


def _is_unchanged(frozen: Any, value: Any) -> bool:
    if type(frozen) is _Large:
        return frozen.value is value and frozen.length == len(value)
    if type(frozen) is not _Container:
        return frozen is value
    if frozen.value is not value:
        return False
    contents = contents_of(value)
    return len(contents) == len(frozen.contents) and all(map(_is_unchanged, frozen.contents, contents))


def _thaw(frozen: Any) -> Any:
    if type(frozen) is _Large:
        return frozen.value
    if type(frozen) is not _Container:
        return frozen
    contents = [_thaw(item) for item in frozen.contents]
    if not isinstance(frozen.value, tuple):
        fill(frozen.value, contents)
    return frozen.value
