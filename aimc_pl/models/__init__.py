"""The networks of the experiments."""

from aimc_pl.models.lenet import LeNet5
from aimc_pl.models.mlp import MLP
from aimc_pl.models.resnet import ResNet

__all__ = ["MLP", "LeNet5", "ResNet"]
