"""Tells in microseconds whether anything has been set on modules."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from operator import attrgetter, call, is_, itemgetter
from typing import Any

from torch import nn

_call: Any = call  # its type says nothing of map
_requires_grad = attrgetter("requires_grad")


class Watch:
    """Remembers which objects modules hold, and compares: one pass over them, without a loop in Python.

    Args:
        modules: to watch.
        names: of the attributes of each module that count, two or more.
        containers: what their containers hold counts too: views of dicts, lists, sets, deques and tuples.
    """

    def __init__(self, modules: Sequence[nn.Module], names: Iterable[Iterable[str]], containers: Sequence[Any]) -> None:
        self._modules = modules
        self._held = [*map(vars, modules)]
        self._getters = [itemgetter(*each) for each in names]
        self._containers = containers
        parameters = [held.get("_parameters", {}) for held in self._held]  # a scripted module has none of its own
        self._parameters = [p for each in parameters for p in each.values() if p is not None]
        self._seen = [*self._read()]

    def is_unchanged(self) -> bool:
        """Whether the modules hold the objects that they held at the start, and the same ones require grad."""
        try:
            return all(map(is_, self._read(), self._seen))
        except KeyError:  # a name is gone
            return False

    def _read(self) -> Iterator[Any]:
        # Lengths and truth values are compared as objects too: Python has one of each small number.
        return chain(
            map(vars, self._modules),
            map(len, self._held),
            map(len, self._containers),
            chain.from_iterable(map(_call, self._getters, self._held)),
            chain.from_iterable(self._containers),
            map(_requires_grad, self._parameters),
        )
