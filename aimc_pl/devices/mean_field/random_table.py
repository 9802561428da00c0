"""This module returns random numbers as slices of a long table, each of which starts at a random offset.

Drawing Gaussian noise would cost more than the products to which it is added. aihwkit's CPU tiles use a table too.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Generator, Tensor

LENGTH = 2**22
"""The longest slice of the table."""


def gaussian(size: Sequence[int], generator: Generator, device: torch.device) -> Tensor:
    """Return Gaussian numbers of mean 0 and variance 1. Do not write to the result: it may be a part of the table.

    Args:
        size: shape of the result.
        generator: draws the offset; on the CPU.
        device: device of the result.
    """
    return _slices(_gaussians(device), torch.Size(size), generator)


def uniform(size: Sequence[int], generator: Generator, device: torch.device) -> Tensor:
    """Return uniform numbers between 0 and 1. For the arguments see :func:`gaussian`; do not write to the result."""
    return _slices(_uniforms(device), torch.Size(size), generator)


def starts(count: int, generator: Generator) -> np.ndarray:
    """Return where so many slices of the tables begin. Each may have up to :data:`LENGTH` numbers."""
    return torch.randint(LENGTH, (count,), generator=generator).numpy()


@cache
def tables() -> tuple[np.ndarray, np.ndarray]:
    """Return the tables of :func:`uniform` and :func:`gaussian` on the CPU."""
    cpu = torch.device("cpu")
    return _uniforms(cpu).numpy(), _gaussians(cpu).numpy()


def _slices(table: Tensor, size: torch.Size, generator: Generator) -> Tensor:
    slices = []
    for start in range(0, size.numel(), LENGTH):
        offset = int(torch.randint(LENGTH, (), generator=generator))
        slices.append(table[offset : offset + min(LENGTH, size.numel() - start)])
    return (slices[0] if len(slices) == 1 else torch.cat(slices)).view(size)


@cache
def _gaussians(device: torch.device) -> Tensor:
    return torch.randn(2 * LENGTH, generator=Generator().manual_seed(1)).to(device)


@cache
def _uniforms(device: torch.device) -> Tensor:
    return torch.rand(2 * LENGTH, generator=Generator().manual_seed(2)).to(device)
