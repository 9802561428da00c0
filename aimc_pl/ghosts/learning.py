"""What a stage remembers of a step, to leave out the code of later stages next time.

A *stretch* is the part of the step that one stage computes.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from aimc_pl.ghosts.shapes import Outcomes
from aimc_pl.ghosts.values import SIMPLE, Key, is_ghost
from aimc_pl.private_torch import version
from aimc_pl.reachable import is_own

_MOST = 1000
"""How many ways to remember. They must not fill the memory if every batch takes another way."""


class Learned:
    """What past forwards of a stage have shown, for the forwards to come.

    A *way* is all that decides how the step goes on after this stage's stretch: its inputs, the events so far and the
    modes.

    Attributes:
        outcomes: the outcomes of calls.
        wanted: the keys of all values of this stage that later stages have ever needed.
    """

    def __init__(self, own: int) -> None:
        self.outcomes = Outcomes()
        self.wanted: set[Key] = set()
        self._own = own
        self._needs: dict[Any, tuple[Key, ...]] = {}

    def needs(self, way: Any) -> tuple[Key, ...] | None:
        """Return what the later stages need when the step has taken this way, or ``None`` if that is not known."""
        return self._needs.get(way)

    def remember(self, way: Any, needs: tuple[Key, ...]) -> None:
        """Note what the later stages have needed when the step had taken this way."""
        if len(self._needs) >= _MOST:
            self._needs.clear()
        self._needs[way] = needs
        self.wanted.update(key for key in needs if key[0] == self._own)


class Watch:
    """A check whether the code after this stage's stretch can be left out next time. It is made while that code runs.

    The code cannot be left out if it draws random numbers in Python, since it may decide by them what to compute with.
    Nor can it be left out if it writes to attributes of modules (counters, lists, tensors) that this stage may read
    next time.

    Args:
        modules: the modules whose attributes this stage may read.

    Attributes:
        has_effects: whether the code is known to have such an effect.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.has_effects = False
        self._modules = modules
        self._attributes = _attributes(modules)
        self._drawn: Any = None

    def begin(self) -> None:
        """Begin a stretch, for which the random number generators have been seeded again."""
        self._drawn = _generators()

    def end(self) -> None:
        """End a stretch: check whether it has drawn random numbers."""
        self.has_effects |= self._drawn != _generators()

    def finish(self) -> bool:
        """End the step. Return whether the code after this stage's stretch can be left out."""
        self.end()
        before, after = self._attributes, _attributes(self._modules)
        is_same = len(before) == len(after) and all(
            old is new or _are_equal_counts(old, new) for old, new in zip(before, after, strict=True)
        )
        return is_same and not self.has_effects


def _are_equal_counts(old: Any, new: Any) -> bool:
    return type(old) is type(new) is int and old == new


def _generators() -> Any:
    """Return the states of the generators of ``random`` and ``numpy.random``."""
    _, numbers, position, *_ = np.random.get_state()
    return random.getstate(), np.asarray(numbers).tobytes(), position


def _attributes(modules: Sequence[nn.Module]) -> list[Any]:
    """Return the objects in the modules' attributes, and how often tensors among them have been changed.

    The objects in collections, and in attributes of the user's own objects, are included.
    """
    found: list[Any] = []
    seen: set[int] = set()
    for module in modules:
        for value in vars(module).values():
            _add(value, found, seen)
    return found


def _add(value: Any, found: list[Any], seen: set[int]) -> None:
    found.append(value)
    if isinstance(value, Tensor):
        found.append(None if is_ghost(value) or isinstance(value, nn.Parameter) else version(value))
    elif type(value) not in SIMPLE and id(value) not in seen:
        seen.add(id(value))
        for item in _contents(value):
            _add(item, found, seen)


def _contents(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return [*value, *value.values()]
    if isinstance(value, list | tuple | set):
        return value
    is_object = hasattr(value, "__dict__") and not isinstance(value, nn.Module | type)
    return vars(value).values() if is_object and is_own(type(value).__module__) else ()
