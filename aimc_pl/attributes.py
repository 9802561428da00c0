"""This module reads and writes what code leaves on modules while it runs.

These are plain attributes, and the contents of the lists, dicts and sets that attributes hold.
"""

import sys
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from aimc_pl.analog import OF_IMAGES, images_of_another_size, is_analog
from aimc_pl.private_torch import parameters_of
from aimc_pl.watch import Watch

CONTAINERS = (dict, list, set, deque, tuple)
PLAIN = (bool, int, float, str, type(None))
"""The types whose values cannot be changed in place."""

_COUNT = {"training", "_buffers", "_parameters"}
_OF_TORCH = vars(nn.Module()).keys() - _COUNT
_OF_TILES = _COUNT.union(OF_IMAGES)
"""The attributes of a tile that count."""

_FLAGS = "requires_grad of parameters"
"""A name among a module's attributes. Its value is the ``requires_grad`` of all parameters of the module."""

_MISSING = object()
_MANY = 256
_CALM = 1000

Place = tuple[int, str]
"""A module's number and an attribute's name. The number is used because some modules redefine how they compare."""

Snapshot = list[dict[str, Any]]
"""The frozen values of every module's attributes. The frozen value of a container also keeps its contents."""


class Attributes:
    """The attributes of all modules of a network, which are read and written as a whole.

    Hooks do not count. Buffers and parameters count as changed when they are replaced, and parameters also when their
    ``requires_grad`` changes. Changes in place do not count. A container with more than 256 elements (a vocabulary,
    for example) counts as changed when its length changes.

    Of the tiles of analog layers, only what follows from the size of a micro-batch's images counts. The rest, and all
    modules inside a tile, belongs to the crossbar, which all micro-batches share.

    Most modules never change, and are checked all at once. Modules that have been seen to change are read one by one,
    until they have not changed for 1,000 times.

    Args:
        network: the network whose attributes to read and write.
        besides: names of attributes of the network itself that do not count. On modules inside it, these names count.
    """

    def __init__(self, network: nn.Module, besides: Collection[str] = ()) -> None:
        tiles = [module for module in network.modules() if any(map(is_analog, parameters_of(module).values()))]
        inside = {id(part) for tile in tiles for part in tile.modules() if part is not tile}
        named = [(name, module) for name, module in network.named_modules() if id(module) not in inside]
        self._names, self._modules = zip(*named, strict=True)
        self._tiles = {number for number, module in enumerate(self._modules) if any(module is tile for tile in tiles)}
        self._besides = _OF_TORCH.union(besides)
        self._snapshot = [self._look(number) for number in range(len(self._modules))]
        self._restless: dict[int, int] = {}
        """For each module that has been seen to change, how often it has been read since its last change."""
        self._watch = self._watch_others()

    def read(self) -> Snapshot:
        """Return the current attributes. A module that has not changed since the last call keeps its dict."""
        is_quiet = self._watch.is_unchanged()
        if is_quiet and not self._restless:
            return self._snapshot
        before, self._snapshot = self._snapshot, [*self._snapshot]
        for number in [*self._restless] if is_quiet else range(len(before)):
            look = self._look(number)
            if _differences(before[number], look):
                self._restless[number] = 0
                self._snapshot[number] = look
            elif number in self._restless:
                self._restless[number] += 1
        calm = [number for number, unchanged in self._restless.items() if unchanged >= _CALM]
        for number in calm:
            del self._restless[number]
        if calm or not is_quiet:
            self._watch = self._watch_others()
        return self._snapshot

    def changes(self, before: Snapshot) -> dict[Place, Any]:
        """Return the frozen values of the attributes that have been set, filled or deleted since ``before``."""
        now = self.read()
        return {
            (number, name): now[number].get(name, _MISSING)
            for number, (old, new) in enumerate(zip(before, now, strict=True))
            if old is not new
            for name in _differences(old, new)
        }

    @staticmethod
    def select(snapshot: Snapshot, places: Iterable[Place]) -> dict[Place, Any]:
        """Return the frozen values that some attributes have in a snapshot."""
        return {(number, name): snapshot[number].get(name, _MISSING) for number, name in places}

    def current(self, places: Iterable[Place]) -> dict[Place, Any]:
        """Return the frozen values that some attributes have now."""
        return {(number, name): _freeze(self._value(number, name)) for number, name in places}

    def write(self, values: dict[Place, Any]) -> None:
        """Set attributes to frozen values, and give containers the contents that they had."""
        # The flags come last, because they belong to the parameters that are set before.
        for (number, name), frozen in sorted(values.items(), key=lambda item: item[0][1] == _FLAGS):
            module = self._modules[number]
            if name == _FLAGS:
                _set_flags(module, frozen)
            elif frozen is _MISSING:
                vars(module).pop(name, None)
            else:
                vars(module)[name] = _thaw(frozen)

    def check_images(self, changed: Iterable[Place]) -> None:
        """Check that a micro-batch before which others are under way has changed no size of a tile's images.

        Args:
            changed: the attributes that the micro-batch has set.

        Raises:
            UsageError: if it has. The message names the tile.
        """
        for number, name in changed:
            if name == "image_sizes":
                raise images_of_another_size(self._names[number])

    def name(self, place: Place) -> str:
        """Return the attribute's name as the user writes it, such as ``"net.hidden"``."""
        number, name = place
        return ".".join(part for part in (self._names[number], name.lstrip("_")) if part)

    def _value(self, number: int, name: str) -> Any:
        module = self._modules[number]
        return _flags(module) if name == _FLAGS else vars(module).get(name, _MISSING)

    def _look(self, number: int) -> dict[str, Any]:
        module, left_out = self._modules[number], _OF_TORCH if number else self._besides
        names = vars(module).keys() & _OF_TILES if number in self._tiles else vars(module).keys() - left_out
        look = {name: _freeze(vars(module)[name]) for name in names}
        if parameters_of(module):
            look[_FLAGS] = _flags(module)
        return look

    def _watch_others(self) -> Watch:
        """Return a watch on the modules that have not changed so far."""
        for number, look in enumerate(self._snapshot):
            if any(map(_is_beyond_watch, look.values())):
                self._restless.setdefault(number, 0)
        quiet = [number for number in range(len(self._modules)) if number not in self._restless]
        looks = [self._snapshot[number] for number in quiet]
        names = [look.keys() - {_FLAGS} for look in looks]
        views = [view for look in looks for frozen in look.values() for view in _views(frozen)]
        return Watch([self._modules[number] for number in quiet], names, views)


def is_alike(a: Any, b: Any) -> bool:
    """Return whether two frozen values have the same type and size. Numbers and strings must also be equal."""
    if type(a) is _Container and type(b) is _Container:
        return len(a.contents) == len(b.contents) and all(map(is_alike, a.contents, b.contents))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape
    return type(a) is type(b) and (not isinstance(a, bool | int | float | str) or a == b)


class _Container(NamedTuple):
    """A list, dict, set, deque or tuple, and its contents."""

    value: Any
    contents: list[Any]


class _Large(NamedTuple):
    """A container with more than 256 elements, of which only the length is compared."""

    value: Any
    length: int


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [name for name in old | new if not _is_same(old.get(name, _MISSING), new.get(name, _MISSING))]


def _flags(module: nn.Module) -> str:
    # Interned, because unchanged values are recognised by identity.
    return sys.intern("".join("1" if p.requires_grad else "0" for p in parameters_of(module).values() if p is not None))


def _set_flags(module: nn.Module, flags: str) -> None:
    parameters = [parameter for parameter in parameters_of(module).values() if parameter is not None]
    for parameter, flag in zip(parameters, flags, strict=True):
        if parameter.requires_grad != (flag == "1"):
            parameter.requires_grad_(flag == "1")


def contents_of(container: Any) -> list[Any]:
    """Return the elements of a list, set, deque or tuple, or the keys and values of a dict in turn."""
    # The methods are those of the built-in class, because the user's subclass may override them.
    base = _built_in(container)
    return (
        [held for pair in base.items(container) for held in pair]
        if issubclass(base, dict)
        else [*base.__iter__(container)]
    )


def fill(container: Any, contents: list[Any]) -> None:
    """Replace the contents of a list, dict, set or deque by contents that :func:`contents_of` has returned."""
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
    # Most attributes are plain, and a test of the exact type is fastest.
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
    """Return whether two frozen values are the same object, with the same contents."""
    if type(a) is _Container and type(b) is _Container:
        return a.value is b.value and len(a.contents) == len(b.contents) and all(map(_is_same, a.contents, b.contents))
    if type(a) is _Large and type(b) is _Large:
        return a.value is b.value and a.length == b.length
    return a is b


def _views(frozen: Any) -> Iterator[Any]:
    """Yield the containers to watch (of dicts, their views): the value itself, if it is one, and those inside it."""
    if type(frozen) is _Container:
        base, value = _built_in(frozen.value), frozen.value
        yield from (base.keys(value), base.values(value)) if issubclass(base, dict) else (value,)
        for held in frozen.contents:
            yield from _views(held)


def _is_beyond_watch(frozen: Any) -> bool:
    """Return whether a value cannot be watched. It may be large, or of a user's class that redefines iteration."""
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
