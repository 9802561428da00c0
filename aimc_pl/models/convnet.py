"""A convolutional network for CIFAR-10 that trains within minutes on a CPU."""

from collections.abc import Sequence

from torch import nn

from aimc_pl.arguments import check_number
from aimc_pl.errors import UsageError


class ConvNet(nn.Sequential):
    """Convolutions of 3x3 in groups that halve the image: ``(batch, 3, height, width)`` to ``(batch, num_classes)``.

    A group is a convolution, max-pooling, and another convolution, each with batch norm and GELU. A convolution comes
    before the groups; the maximum over the last images and a Linear layer come after them. With three groups there are
    seven convolutions.

    Args:
        widths: the number of channels of each group.
        num_classes: number of classes.

    Raises:
        UsageError: if a number is out of range, or if there is no group.
    """

    def __init__(self, widths: Sequence[int] = (32, 64, 128), num_classes: int = 10) -> None:
        if not widths:
            raise UsageError("widths must name the channels of at least one group, got none")
        for width in widths:
            check_number("widths", width, at_least=1, whole=True)
        check_number("num_classes", num_classes, at_least=1, whole=True)
        super().__init__()
        self.stem = nn.Sequential(*_convolution(3, widths[0]))
        for index, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False)):
            pooled, rest = _convolution(before, width), _convolution(width, width)
            group = nn.Sequential(pooled[0], nn.MaxPool2d(2), *pooled[1:], *rest)
            self.add_module(f"group{index + 1}", group)
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(widths[-1], num_classes)


def _convolution(before: int, width: int) -> list[nn.Module]:
    return [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.GELU()]
