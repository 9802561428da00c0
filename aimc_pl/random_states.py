"""The random states that a step may draw from."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from aimc_pl.patches import patched
from aimc_pl.private_torch import tree_leaves

_SETTERS = (
    *((torch, "manual_seed"), (torch, "set_rng_state"), (torch.random, "manual_seed")),
    *((torch.random, "set_rng_state"), (random, "seed"), (random, "setstate")),
    *((np.random, "seed"), (np.random, "set_state")),
)


class RandomStates:
    """Torch's, numpy's and Python's random states, and those of further generators."""

    def __init__(self, generators: Sequence[Any] = ()) -> None:
        self._generators = generators

    def read(self) -> list[Any]:
        """The states of this moment."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        generators = [_state_of(generator) for generator in self._generators]
        return [torch.get_rng_state(), cuda, np.random.get_state(), random.getstate(), generators]

    def write(self, states: list[Any]) -> bool:
        """Go back to what :meth:`read` has returned, here or in another process.

        Returns:
            Whether there are as many generators as then; otherwise they stay as they are.
        """
        cpu, cuda, numpys, pythons, generators = states
        torch.set_rng_state(cpu)
        for index, state in enumerate(cuda[: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, index)
        np.random.set_state(numpys)
        random.setstate(pythons)
        if len(generators) != len(self._generators):
            return False
        for generator, state in zip(self._generators, generators, strict=True):
            _set_state(generator, state)
        return True

    def have_moved(self, states: list[Any]) -> bool:
        """Whether anything has been drawn since ``states`` were read."""
        return not all(map(np.array_equal, tree_leaves(self.read()), tree_leaves(states)))


@contextmanager
def seeding_noticed(notice: Callable[[], None]) -> Iterator[None]:
    """Call ``notice`` whenever code inside sets a global random state, to seed it or to put it back."""

    def noticed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            notice()
            return function(*args, **kwargs)

        return call

    with patched(*((module, name, noticed(getattr(module, name))) for module, name in _SETTERS)):
        yield


def _state_of(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)
