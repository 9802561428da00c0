"""This package holds the networks of the experiments."""

from aimc_pl.models.convnet import ConvNet
from aimc_pl.models.gpt import GPT
from aimc_pl.models.lenet import LeNet5
from aimc_pl.models.mlp import MLP
from aimc_pl.models.resnet import ResNet

__all__ = ["GPT", "MLP", "ConvNet", "LeNet5", "ResNet"]
