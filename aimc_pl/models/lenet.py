"""This module defines LeNet-5 (LeCun et al., 1998) with max pooling."""

from torch import nn

from aimc_pl.arguments import check_number


class LeNet5(nn.Sequential):
    """LeNet-5, two convolutions and three linear layers: ``(batch, 1, 28, 28)`` to logits ``(batch, num_classes)``.

    Args:
        num_classes: number of classes.
    """

    def __init__(self, num_classes: int = 10) -> None:
        check_number("num_classes", num_classes, at_least=1, whole=True)
        super().__init__(
            nn.Conv2d(1, 6, 5, padding=2),
            nn.Tanh(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.Tanh(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(400, 120),
            nn.Tanh(),
            nn.Linear(120, 84),
            nn.Tanh(),
            nn.Linear(84, num_classes),
        )
