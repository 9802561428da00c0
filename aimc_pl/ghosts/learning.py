"""What a stage finds out about a step, so that it need not run again what other stages do."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from aimc_pl.ghosts.shapes import Outcomes
from aimc_pl.ghosts.values import Key

_MOST = 1000
"""Ways to remember: they must not fill the memory if every batch takes another."""


class Learned:
    """For the forwards to come.

    Attributes:
        outcomes: of calls.
        wanted: all values of this stage that later ones have ever needed.
    """

    def __init__(self, own: int) -> None:
        self.outcomes = Outcomes()
        self.wanted: set[Key] = set()
        self._own = own
        self._needs: dict[Any, tuple[Key, ...]] = {}

    def needs(self, way: Any) -> tuple[Key, ...] | None:
        """What the stages after this one need when the step has taken this way so far, if that is known."""
        return self._needs.get(way)

    def remember(self, way: Any, needs: tuple[Key, ...]) -> None:
        """Note what the stages after this one have needed, when the step had taken this way."""
        if len(self._needs) >= _MOST:
            self._needs.clear()
        self._needs[way] = needs
        self.wanted.update(key for key in needs if key[0] == self._own)


class Watch:
    """Looks, while the step runs on after this stage's stretch, whether that can be left out next time.

    It cannot if it decides by random numbers what to compute with. Nor if it writes to attributes of modules (counters,
    lists) that this stage may read next time.

    Args:
        modules: whose attributes this stage may read.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.has_effects = False
        self._modules = modules
        self._attributes = _attributes(modules)
        self._drawn: Any = None

    def begin(self) -> None:
        """A stretch begins, with generators of a new state."""
        self._drawn = _generators()

    def end(self) -> None:
        """A stretch ends."""
        self.has_effects |= self._drawn != _generators()

    def finish(self) -> bool:
        """The step ends. Returns whether it can be left out."""
        self.end()
        before, after = self._attributes, _attributes(self._modules)
        is_same = len(before) == len(after) and all(old is new for old, new in zip(before, after, strict=True))
        return is_same and not self.has_effects


def _generators() -> Any:
    _, numbers, position, *_ = np.random.get_state()
    return random.getstate(), np.asarray(numbers).tobytes(), position


def _attributes(modules: Sequence[nn.Module]) -> list[Any]:
    """The objects in the modules' attributes, and in lists and dictionaries there."""
    found: list[Any] = []
    for module in modules:
        for value in vars(module).values():
            found.append(value)
            if isinstance(value, Mapping):
                found += (*value, *value.values())
            elif isinstance(value, list | tuple | set):
                found += value
    return found
