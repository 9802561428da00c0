"""Random numbers faster than they can be drawn: slices of a long table, each from an offset drawn anew.

Drawing Gaussian numbers would cost more than the products they disturb. aihwkit's CPU tiles use a table too.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Generator, Tensor

_LENGTH = 2**22


def gaussian(size: Sequence[int], generator: Generator, device: torch.device) -> Tensor:
    """Numbers of mean 0 and variance 1, not to be written to.

    Args:
        size: of the result.
        generator: on the CPU, for the offset.
        device: of the result.
    """
    return _slices(_gaussians(device), torch.Size(size), generator)


def uniform(size: Sequence[int], generator: Generator, device: torch.device) -> Tensor:
    """Numbers between 0 and 1, not to be written to; for the arguments see :func:`gaussian`."""
    return _slices(_uniforms(device), torch.Size(size), generator)


def _slices(table: Tensor, size: torch.Size, generator: Generator) -> Tensor:
    slices = []
    for start in range(0, size.numel(), _LENGTH):
        offset = int(torch.randint(_LENGTH, (), generator=generator))
        slices.append(table[offset : offset + min(_LENGTH, size.numel() - start)])
    return (slices[0] if len(slices) == 1 else torch.cat(slices)).view(size)


@cache
def _gaussians(device: torch.device) -> Tensor:
    return torch.randn(2 * _LENGTH, generator=Generator().manual_seed(1)).to(device)


@cache
def _uniforms(device: torch.device) -> Tensor:
    return torch.rand(2 * _LENGTH, generator=Generator().manual_seed(2)).to(device)
