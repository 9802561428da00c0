"""This module defines a multi-layer perceptron."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import nn

from aimc_pl.arguments import check_callable, check_list, check_number
from aimc_pl.errors import UsageError


class MLP(nn.Sequential):
    """A multi-layer perceptron: ``(batch, …)`` to ``(batch, sizes[-1])``.

    The input is flattened. Linear layers follow, with an activation between them.

    Args:
        sizes: numbers of input, hidden and output features; at least two numbers.
        activation: the class of the activation function.

    Raises:
        UsageError: if there are fewer than two sizes, or if a size is below 1.
    """

    def __init__(self, sizes: Sequence[int], activation: Callable[[], nn.Module] = nn.Sigmoid) -> None:
        check_list("sizes", sizes, int, "whole numbers")
        for size in sizes:
            check_number("each of sizes", size, at_least=1, whole=True)
        check_callable("activation", activation)
        if len(sizes) < 2:
            raise UsageError(f"an MLP needs at least an input and an output size, got sizes={list(sizes)}")
        layers: list[nn.Module] = [nn.Flatten()]
        for features, following in pairwise(sizes[:-1]):
            layers += [nn.Linear(features, following), activation()]
        super().__init__(*layers, nn.Linear(sizes[-2], sizes[-1]))
