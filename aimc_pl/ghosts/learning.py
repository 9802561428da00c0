"""What a stage remembers of a step, to leave out the code of later stages next time.

A *stretch* is the part of the step that one stage computes.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from aimc_pl.ghosts.shapes import Outcomes
from aimc_pl.ghosts.values import Key

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
    Nor can it be left out if it writes to attributes of modules (counters, lists) that this stage may read next time.

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
        is_same = len(before) == len(after) and all(old is new for old, new in zip(before, after, strict=True))
        return is_same and not self.has_effects


def _generators() -> Any:
    """Return the states of the generators of ``random`` and ``numpy.random``."""
    _, numbers, position, *_ = np.random.get_state()
    return random.getstate(), np.asarray(numbers).tobytes(), position


def _attributes(modules: Sequence[nn.Module]) -> list[Any]:
    """Return the objects in the modules' attributes, and in collections there."""
    found: list[Any] = []
    for module in modules:
        for value in vars(module).values():
            found.append(value)
            if isinstance(value, Mapping):
                found += (*value, *value.values())
            elif isinstance(value, list | tuple | set):
                found += value
    return found
