"""This package holds the data modules of the experiments."""

from aimc_pl.data.datasets import CIFAR10, CIFAR100, MNIST, Digits, FashionMNIST, ImageFolder
from aimc_pl.data.images import InMemoryImages
from aimc_pl.data.text import PydocText

__all__ = ["CIFAR10", "CIFAR100", "MNIST", "Digits", "FashionMNIST", "ImageFolder", "InMemoryImages", "PydocText"]
