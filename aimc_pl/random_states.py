"""The random states from which a step may draw: read, written and observed."""

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
    *((torch.random, "set_rng_state"), (torch.cuda, "manual_seed"), (torch.cuda, "manual_seed_all")),
    *((torch.cuda, "set_rng_state"), (random, "seed"), (random, "setstate")),
    *((np.random, "seed"), (np.random, "set_state")),
)


class RandomStates:
    """The random states of torch, NumPy and Python, and of further generators.

    Args:
        generators: the further generators, of torch, NumPy or Python.
    """

    def __init__(self, generators: Sequence[Any] = ()) -> None:
        self._generators = generators

    def read(self) -> list[Any]:
        """Return the current states."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        generators = [state_of(generator) for generator in self._generators]
        return [torch.get_rng_state(), cuda, np.random.get_state(), random.getstate(), generators]

    def write(self, states: list[Any]) -> bool:
        """Set the states that :meth:`read` has returned, in this process or in another one.

        Returns:
            Whether there are as many further generators as there were then. If not, their states stay as they are.
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
            set_state(generator, state)
        return True

    def have_moved(self, states: list[Any]) -> bool:
        """Return whether any random number has been drawn since ``states`` were read."""
        return not all(map(np.array_equal, tree_leaves(self.read()), tree_leaves(states)))


@contextmanager
def seeding_noticed(notice: Callable[[], None]) -> Iterator[None]:
    """Context manager that calls ``notice`` whenever code inside seeds a global random state or puts one back."""

    def noticed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            notice()
            return function(*args, **kwargs)

        return call

    with patched(*((module, name, noticed(getattr(module, name))) for module, name in _SETTERS)):
        yield


def state_of(generator: Any) -> Any:
    """Return the state of a generator of torch, NumPy or Python."""
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def set_state(generator: Any, state: Any) -> None:
    """Set the state that :func:`state_of` has returned."""
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)
