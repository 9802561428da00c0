"""Multi-layer perceptron."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import nn


class MLP(nn.Sequential):
    """Flatten, then linear layers with an activation between them: ``(batch, …)`` to ``(batch, sizes[-1])``.

    Args:
        sizes: input, hidden and output features, at least two numbers.
        activation: the class of the activation.

    Raises:
        ValueError: for fewer than two sizes.
    """

    def __init__(self, sizes: Sequence[int], activation: Callable[[], nn.Module] = nn.Sigmoid) -> None:
        if len(sizes) < 2:
            raise ValueError(f"an MLP needs at least an input and an output size, got sizes={list(sizes)}")
        layers: list[nn.Module] = [nn.Flatten()]
        for features, following in pairwise(sizes[:-1]):
            layers += [nn.Linear(features, following), activation()]
        super().__init__(*layers, nn.Linear(sizes[-2], sizes[-1]))
