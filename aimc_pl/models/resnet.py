"""This module defines residual networks for small images (He et al., arXiv 1512.03385, section 4.2)."""

import torch.nn.functional as F
from torch import Tensor, nn

from aimc_pl.arguments import check_number
from aimc_pl.errors import UsageError


class _Block(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.added_channels = channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        # the paper's option A: a shortcut without parameters
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added_channels))
        return F.relu(out + shortcut)


class ResNet(nn.Sequential):
    """ResNet of 6n+2 layers (8, 14, 20, …): images ``(batch, 3, height, width)`` to logits ``(batch, num_classes)``.

    Args:
        depth: 6n+2 for n residual blocks in each of three groups.
        num_classes: number of classes.
        width: number of channels of the first group. The second and the third have twice and four times as many.

    Raises:
        UsageError: if the depth is not 6n+2, or if a number is out of range.
    """

    def __init__(self, depth: int = 20, num_classes: int = 10, width: int = 16) -> None:
        check_number("depth", depth, at_least=8, whole=True)
        check_number("num_classes", num_classes, at_least=1, whole=True)
        check_number("width", width, at_least=1, whole=True)
        blocks, rest = divmod(depth - 2, 6)
        if rest:
            raise UsageError(f"a CIFAR ResNet has 6n+2 layers (8, 14, 20, 32, 44, 56, …), got depth={depth}")
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        for group in range(3):
            channels = width * 2**group
            first = _Block(channels // 2 if group else width, channels, 2 if group else 1)
            rest_of_group = [_Block(channels, channels, 1) for _ in range(blocks - 1)]
            self.add_module(f"group{group + 1}", nn.Sequential(first, *rest_of_group))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(4 * width, num_classes)
