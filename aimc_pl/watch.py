"""This module finds out within microseconds whether anything has been set on modules."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from operator import attrgetter, call, is_, itemgetter
from typing import Any

from torch import nn

_call: Any = call  # It is typed as Any because its declared type does not fit map.
_requires_grad = attrgetter("requires_grad")


class Watch:
    """A check whether modules still hold the objects that they held when the watch was made.

    The check is one pass over all objects, without a loop in Python.

    Args:
        modules: the modules to watch.
        names: for each module, the names of the attributes to watch, two or more.
        containers: containers whose contents to watch too: views of dicts, lists, sets, deques and tuples.
    """

    def __init__(self, modules: Sequence[nn.Module], names: Iterable[Iterable[str]], containers: Sequence[Any]) -> None:
        self._modules = modules
        self._held = [*map(vars, modules)]
        self._getters = [itemgetter(*each) for each in names]
        self._containers = containers
        parameters = [held.get("_parameters", {}) for held in self._held]  # a scripted module has no such entry
        self._parameters = [p for each in parameters for p in each.values() if p is not None]
        self._seen = [*self._read()]

    def is_unchanged(self) -> bool:
        """Return whether the modules hold the same objects as at the start, and the same parameters require grad."""
        try:
            return all(map(is_, self._read(), self._seen))
        except KeyError:  # an attribute has been deleted
            return False

    def _read(self) -> Iterator[Any]:
        # Lengths and truth values can be compared by identity too: Python keeps one object for each small number.
        return chain(
            map(vars, self._modules),
            map(len, self._held),
            map(len, self._containers),
            chain.from_iterable(map(_call, self._getters, self._held)),
            chain.from_iterable(self._containers),
            map(_requires_grad, self._parameters),
        )
