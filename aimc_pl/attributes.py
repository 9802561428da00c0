"""What code leaves on modules while it runs: plain attributes, and what lists, dicts and sets there hold."""

import sys
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from aimc_pl.private_torch import parameters_of
from aimc_pl.watch import Watch

CONTAINERS = (dict, list, set, deque, tuple)
PLAIN = (bool, int, float, str, type(None))
"""Types of values that cannot change."""

_OF_TORCH = vars(nn.Module()).keys() - {"training", "_buffers", "_parameters"}
_FLAGS = "requires_grad of parameters"
"""Stands among a module's attributes for what its parameters require."""

_MISSING = object()
_MANY = 256

Place = tuple[int, str]
"""The number of a module (some modules compare in ways of their own) and an attribute's name."""

Snapshot = list[dict[str, Any]]
"""The frozen values of every module's attributes."""


class Attributes:
    """The attributes of all modules of a network, to be read and written as a whole.

    Hooks do not count. Buffers and parameters do when they are bound anew or frozen, not when they are changed in
    place. A container with more than 256 elements (a vocabulary, say) counts as changed where their number has.

    Most modules never change, and are watched together. Those that have been seen to change are read one by one.

    Args:
        network: whose attributes.
        besides: names of attributes of the network itself, not of modules inside it, that do not count.
    """

    def __init__(self, network: nn.Module, besides: Collection[str] = ()) -> None:
        self._names, self._modules = zip(*network.named_modules(), strict=True)
        self._besides = _OF_TORCH.union(besides)
        self._snapshot = [self._look(number) for number in range(len(self._modules))]
        self._restless: set[int] = set()
        self._watch = self._watch_others()

    def read(self) -> Snapshot:
        """The attributes of this moment; a module that has not changed since the last call has the same dict."""
        is_quiet = self._watch.is_unchanged()
        if is_quiet and not self._restless:
            return self._snapshot
        before, self._snapshot = self._snapshot, [*self._snapshot]
        changed = set()
        for number in self._restless if is_quiet else range(len(before)):
            look = self._look(number)
            if _differences(before[number], look):
                changed.add(number)
                self._snapshot[number] = look
        if not is_quiet:
            self._restless |= changed
            self._watch = self._watch_others()
        return self._snapshot

    def changes(self, before: Snapshot) -> dict[Place, Any]:
        """The frozen values of what has been set, filled or deleted since ``before``."""
        now = self.read()
        return {
            (number, name): now[number].get(name, _MISSING)
            for number, (old, new) in enumerate(zip(before, now, strict=True))
            if old is not new
            for name in _differences(old, new)
        }

    @staticmethod
    def select(snapshot: Snapshot, places: Iterable[Place]) -> dict[Place, Any]:
        """The frozen values of some attributes."""
        return {(number, name): snapshot[number].get(name, _MISSING) for number, name in places}

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

    def _look(self, number: int) -> dict[str, Any]:
        module, left_out = self._modules[number], _OF_TORCH if number else self._besides
        look = {name: _freeze(value) for name, value in vars(module).items() if name not in left_out}
        if parameters_of(module):
            look[_FLAGS] = _flags(module)
        return look

    def _watch_others(self) -> Watch:
        """Watch the modules that have not changed so far."""
        for number, look in enumerate(self._snapshot):
            if any(map(_is_beyond_watch, look.values())):
                self._restless.add(number)
        quiet = [number for number in range(len(self._modules)) if number not in self._restless]
        looks = [self._snapshot[number] for number in quiet]
        names = [look.keys() - {_FLAGS} for look in looks]
        views = [view for look in looks for frozen in look.values() for view in _views(frozen)]
        return Watch([self._modules[number] for number in quiet], names, views)


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


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [name for name in old | new if not _is_same(old.get(name, _MISSING), new.get(name, _MISSING))]


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


def _is_same(a: Any, b: Any) -> bool:
    """Whether two frozen values are one object, with the same contents."""
    if type(a) is _Container and type(b) is _Container:
        return a.value is b.value and len(a.contents) == len(b.contents) and all(map(_is_same, a.contents, b.contents))
    if type(a) is _Large and type(b) is _Large:
        return a.value is b.value and a.length == b.length
    return a is b


def _views(frozen: Any) -> Iterator[Any]:
    """What to watch of a value: what it holds, and what its containers hold."""
    if type(frozen) is _Container:
        base, value = _built_in(frozen.value), frozen.value
        yield from (base.keys(value), base.values(value)) if issubclass(base, dict) else (value,)
        for held in frozen.contents:
            yield from _views(held)


def _is_beyond_watch(frozen: Any) -> bool:
    """Whether a value has to be read: it is large, or a class of the user's own that iterates in its own way."""
    if type(frozen) is not _Container:
        return type(frozen) is _Large
    base, kind = _built_in(frozen.value), type(frozen.value)
    own = not issubclass(base, dict) and (kind.__iter__ is not base.__iter__ or kind.__len__ is not base.__len__)
    return own or any(map(_is_beyond_watch, frozen.contents))


def _thaw(frozen: Any) -> Any:
    if type(frozen) is _Large:
        return frozen.value
    if type(frozen) is not _Container:
        return frozen
    contents = [_thaw(item) for item in frozen.contents]
    if not isinstance(frozen.value, tuple):
        fill(frozen.value, contents)
    return frozen.value
