"""This module returns random numbers as slices of a long table, each of which starts at a random offset.

Drawing Gaussian noise would cost more than the products to which it is added. aihwkit's CPU tiles use a table too.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from aimc_pl.devices.mean_field.kernels import LENGTH, start


class TableGenerator(Generator):
    """A generator on the CPU that also chooses where slices of the tables begin.

    torch would take longer for one such number than a small layer for an update. Both kinds of numbers follow the seed
    and the state.

    Attributes:
        offsets: the state of the numbers that say where slices begin, see :func:`kernels.start`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.offsets = np.zeros(1, np.uint64)

    def manual_seed(self, seed: int) -> "TableGenerator":
        """See :meth:`torch.Generator.manual_seed`."""
        super().manual_seed(seed)
        self.offsets[0] = seed % 2**64
        return self

    def get_state(self) -> Tensor:
        """See :meth:`torch.Generator.get_state`."""
        return torch.cat([super().get_state(), torch.from_numpy(self.offsets.copy().view(np.uint8))])

    def set_state(self, new_state: Tensor) -> "TableGenerator":
        """See :meth:`torch.Generator.set_state`."""
        of_torch, of_offsets = new_state.tensor_split([super().get_state().numel()])
        super().set_state(of_torch)
        # The checkpoints of earlier versions hold the state of torch's generator alone.
        self.offsets[:] = of_offsets.numpy().view(np.uint64) if len(of_offsets) > 0 else self.initial_seed()
        return self

    def __reduce__(self) -> Any:
        return _restored, (self.get_state(),)


def _restored(state: Tensor) -> TableGenerator:
    return TableGenerator().set_state(state)


def gaussian(size: Sequence[int], generator: TableGenerator, device: torch.device) -> Tensor:
    """Return Gaussian numbers of mean 0 and variance 1. Do not write to the result: it may be a part of the table.

    Args:
        size: shape of the result.
        generator: chooses the slice.
        device: device of the result.
    """
    return _slices(_gaussians(device), torch.Size(size), generator)


def uniform(size: Sequence[int], generator: TableGenerator, device: torch.device) -> Tensor:
    """Return uniform numbers between 0 and 1. For the arguments see :func:`gaussian`; do not write to the result."""
    return _slices(_uniforms(device), torch.Size(size), generator)


@cache
def tables() -> tuple[np.ndarray, np.ndarray]:
    """Return the tables of :func:`uniform` and :func:`gaussian` on the CPU."""
    cpu = torch.device("cpu")
    return _uniforms(cpu).numpy(), _gaussians(cpu).numpy()


def _slices(table: Tensor, size: torch.Size, generator: TableGenerator) -> Tensor:
    slices = []
    for done in range(0, size.numel(), LENGTH):
        first = start(generator.offsets)
        slices.append(table[first : first + min(LENGTH, size.numel() - done)])
    return (slices[0] if len(slices) == 1 else torch.cat(slices)).view(size)


@cache
def _gaussians(device: torch.device) -> Tensor:
    return torch.randn(2 * LENGTH, generator=Generator().manual_seed(1)).to(device)


@cache
def _uniforms(device: torch.device) -> Tensor:
    return torch.rand(2 * LENGTH, generator=Generator().manual_seed(2)).to(device)
